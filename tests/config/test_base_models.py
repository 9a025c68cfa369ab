"""Base models from variables and from a file: accepted values, and refused ones by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from tests.base_models import base_model_configs
from tinkerapi.config.base_models import base_models_from_file
from training.base_model_config import BaseModelConfig
from training.base_models import base_model_of


def read(folder: Path, text: str) -> list[BaseModelConfig]:
    path = folder / "tinkerapi.toml"
    path.write_text(text)
    return base_models_from_file(path)


def test_a_variable_names_a_hub_name_a_folder_or_both() -> None:
    hub, folder, both = base_model_configs("Qwen/Qwen3-8B", "/models/a=b", "Qwen/Qwen3-4B=/m/qwen")

    assert (hub.name, hub.path) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B")
    assert (folder.name, folder.path) == ("a=b", "/models/a=b")
    assert (both.name, both.path) == ("Qwen/Qwen3-4B", "/m/qwen")


@pytest.mark.parametrize("value", ["name=", "=/folder", "="])
def test_a_variable_with_half_a_pair_is_refused(value: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="expected NAME, FOLDER or NAME=PATH, got"):
        base_model_configs(value)


def test_a_file_says_everything_of_each(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        """
        [[base_model]]
        name = "Qwen/Qwen3-8B"
        path = "/models/qwen"
        device = "cuda:1"
        dtype = "bfloat16"
        layout = "packed"
        cache_bytes = 60_000_000_000
        activation_bytes = 4_000_000_000

        [[base_model]]
        path = "./small"
        """,
    )

    assert first == BaseModelConfig(
        name="Qwen/Qwen3-8B",
        path="/models/qwen",
        device="cuda:1",
        dtype="bfloat16",
        layout="packed",
        cache_bytes=60_000_000_000,
        activation_bytes=4_000_000_000,
    )
    assert second == BaseModelConfig(name="small", path=str(tmp_path / "small"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"expected one or more \[\[base_model\]\] tables"),
        ("base_model = 1", r"expected one or more \[\[base_model\]\] tables"),
        ("[base_model]\nname = 'a'", r"expected one or more \[\[base_model\]\] tables"),
        ("[[base_models]]\nname = 'a'", "unknown key 'base_models'; did you mean base_model"),
        ("[[base_model]]\ndevcie = 'cpu'", r"base_model\[0\]: unknown key 'devcie'; did you mean"),
        ("[[base_model]]\ndevice = 'cpu'", r"base_model\[0\]: name is missing"),
        ("[[base_model]]\nname = 1", r"base_model\[0\].name: expected a text, got 1"),
        ("[[base_model]]\nname = ' '", r"base_model\[0\].name: expected a text, got ' '"),
        (
            "[[base_model]]\nname = 'a'\ndevice = 'gpu'",
            "device: expected auto, cpu, cuda or cuda:N",
        ),
        ("[[base_model]]\nname = 'a'\ndtype = 'int8'", "dtype: expected one of auto, bfloat16"),
        ("[[base_model]]\nname = 'a'\nlayout = 'odd'", "layout: expected one of auto, packed"),
        (
            "[[base_model]]\nname = 'a'\ncache_bytes = '4GiB'",
            "cache_bytes: expected a whole number",
        ),
        ("[[base_model]]\nname = 'a'\nworkers = 0", "workers: expected 1 to 64 workers, got 0"),
        ("[[base_model]]\nname = 'a'\nworkers = 65", "workers: expected 1 to 64 workers, got 65"),
        ("[[base_model]]\nname = 'a'\nworkers = true", "workers: expected .*, got True"),
        ("[[base_model]]\nname = 'a'\ndevices = []", "workers: expected .*, got 0"),
        ("[[base_model]]\nname = 'a'\ndevices = 'cpu'", "devices: expected a list of .*'cpu'"),
        ("[[base_model]]\nname = 'a'\ndevices = ['gpu']", "devices: expected a list of .*'gpu'"),
        (
            "[[base_model]]\nname = 'a'\ndevices = ['cpu']\ndevice = 'cpu'",
            "device and devices are both given; .*leave device out",
        ),
        (
            "[[base_model]]\nname = 'a'\ndevices = ['cpu', 'cpu']\nworkers = 3",
            "devices: expected one for each of the 3 workers, got 2",
        ),
        ("[[base_model]]\nname = 'a'\ntp_size = 0", "tp_size: expected 1 to 64 devices, got 0"),
        ("[[base_model]]\nname = 'a'\nfsdp_size = '2'", "fsdp_size: expected .*, got '2'"),
        (
            "[[base_model]]\nname = 'a'\ntp_size = 2\nfsdp_size = 2",
            "tp_size 2 and fsdp_size 2 cannot be combined; leave one of them out",
        ),
        (
            "[[base_model]]\nname = 'a'\ntp_size = 4\nep_size = 2",
            "ep_size: expected 1, or 4 like tp_size, got 2",
        ),
        ("[[base_model]]\nname = 'a'\nfsdp_size = 2\nep_size = 2", "ep_size: expected 1"),
        (
            "[[base_model]]\nname = 'a'\ntp_size = 2\ndevices = ['cpu', 'cpu', 'cpu']",
            "devices: expected one for each of the 1 workers times 2 ranks of each, got 3",
        ),
        (
            "[[base_model]]\nname = 'a'\ntp_size = 2\ndevice = 'cuda:0'",
            "ranks of a worker need 2 different GPUs, .*got cuda:0, cuda:0; name them in devices",
        ),
        (
            "[[base_model]]\nname = 'a'\nfsdp_size = 2\ndevices = ['cuda:0', 'cpu']",
            "need 2 different GPUs, or cpu for all",
        ),
        (
            "[[base_model]]\nname = 'a'\nactivation_bytes = 1.5",
            "activation_bytes: expected a whole number",
        ),
        ("[[base_model]]\nname = 'a'\ncache_bytes = -1", "cache_bytes: expected .*, got -1"),
        ("[[base_model]]\nname = 'a'\ncache_bytes = true", "cache_bytes: expected .*, got True"),
        ("[[base_model]", "is not TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=sentence):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"gone\.toml cannot be read: No such file"):
        base_models_from_file(tmp_path / "gone.toml")


def test_a_name_of_its_own_may_have_any_folder(tmp_path: Path) -> None:
    config = BaseModelConfig(name="Qwen/Qwen3-8B", path="/models/qwen")

    base_model = base_model_of(config, tmp_path)

    assert base_model.name == "Qwen/Qwen3-8B"
    assert base_model.folder == Path("/models/qwen")
    assert base_model.queue == "engine-qwen-qwen3-8b"


@pytest.mark.parametrize(
    ("keys", "workers", "devices"),
    [
        ("", 1, ()),
        ("workers = 3", 3, ()),
        ("devices = ['cuda:0', 'cuda:1']", 2, ("cuda:0", "cuda:1")),
        ("devices = ['cpu', 'auto']\nworkers = 2", 2, ("cpu", "auto")),
    ],
)
def test_workers_follow_from_their_devices(
    tmp_path: Path, keys: str, workers: int, devices: tuple[str, ...]
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(f"[[base_model]]\nname = 'a'\n{keys}\n")

    [config] = base_models_from_file(file)

    assert (config.workers, config.devices) == (workers, devices)


def test_a_worker_of_several_ranks_has_a_device_for_each(tmp_path: Path) -> None:
    [config] = read(
        tmp_path,
        """
        [[base_model]]
        name = "a"
        tp_size = 2
        ep_size = 2
        devices = ["cuda:4", "cuda:5", "cuda:6", "cuda:7"]
        """,
    )
    assert (config.workers, config.num_ranks, config.num_processes) == (2, 2, 4)
    assert config.device_of_process(2) == "cuda:6"  # the first rank of the second worker
