"""Base models on several GPUs: each gets its own while there are enough."""

from __future__ import annotations

import pytest

from training.base_model_config import BaseModelConfig
from training.devices import device_of, num_sharing, num_threads
from training.errors import DeviceNotFound


def devices(*asked: str, gpu_count: int) -> list[str]:
    configs = [
        BaseModelConfig(name=f"m{index}", path=f"/m{index}", device=device)
        for index, device in enumerate(asked)
    ]
    return [device_of(config, among=configs, gpu_count=gpu_count) for config in configs]


@pytest.mark.parametrize(
    ("asked", "gpu_count", "expected"),
    [
        (["auto"], 0, ["cpu"]),
        (["auto"], 2, ["cuda:0"]),
        (["auto", "auto"], 2, ["cuda:0", "cuda:1"]),
        (["auto", "cpu", "cuda"], 2, ["cuda:0", "cpu", "cuda:1"]),
        (["auto", "cuda:0"], 2, ["cuda:1", "cuda:0"]),
        (["cuda:1", "auto", "auto"], 3, ["cuda:1", "cuda:0", "cuda:2"]),
        (["auto", "auto", "auto"], 2, ["cuda:0", "cuda:1", "cuda:0"]),
        (["cuda:0", "auto"], 1, ["cuda:0", "cuda:0"]),
    ],
)
def test_no_two_share_a_gpu_while_another_is_free(
    asked: list[str], gpu_count: int, expected: list[str]
) -> None:
    assert devices(*asked, gpu_count=gpu_count) == expected


@pytest.mark.parametrize(
    ("device", "gpu_count", "sentence"),
    [
        ("cuda", 0, "m0 is for cuda and torch sees no GPU;"),
        ("cuda:0", 0, "m0 is for cuda:0 and torch sees no GPU;"),
        ("cuda:1", 1, "m0 is for cuda:1 and torch sees 1 GPU;"),
        ("cuda:2", 2, "m0 is for cuda:2 and torch sees 2 GPUs;"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(device: str, gpu_count: int, sentence: str) -> None:
    with pytest.raises(DeviceNotFound, match=sentence):
        devices(device, gpu_count=gpu_count)


def test_the_workers_of_a_base_model_have_devices_of_their_own() -> None:
    several = BaseModelConfig(name="a", path="/a", workers=3)
    named = BaseModelConfig(name="b", path="/b", workers=2, devices=("cuda:1", "cpu"))
    among = [several, named]

    def devices(config: BaseModelConfig, gpu_count: int) -> list[str]:
        return [
            device_of(config, number, among=among, gpu_count=gpu_count)
            for number in range(config.workers)
        ]

    assert devices(several, 4) == ["cuda:0", "cuda:2", "cuda:3"]
    assert devices(several, 2) == ["cuda:0", "cuda:0", "cuda:0"]
    assert devices(named, 4) == ["cuda:1", "cpu"]
    assert num_sharing(several, 1, among=among, gpu_count=2) == 3
    assert num_sharing(several, 1, among=among, gpu_count=0) == 4  # of the machine's memory
    assert num_sharing(named, 0, among=among, gpu_count=4) == 1


@pytest.mark.parametrize(
    ("asked", "torchs_own", "workers", "expected"),
    [(0, 8, 1, 7), (0, 9, 2, 4), (0, 2, 2, 1), (0, 1, 1, 1), (3, 8, 2, 3)],
)
def test_workers_share_the_processors(
    asked: int, torchs_own: int, workers: int, expected: int
) -> None:
    assert num_threads(asked, torchs_own, processes=workers) == expected
