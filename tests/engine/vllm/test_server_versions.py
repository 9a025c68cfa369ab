"""Versions at a server: names, files, and when the files may go."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.sampling_jobs import job
from tests.engine.vllm.double import Refused, VllmDouble
from tests.engine.vllm.test_server_failures import finish, here, sample, state
from tests.waiting import wait_for
from training.engine.interface import Engine, SampleOutput
from training.engine.vllm import server_link
from training.engine.vllm.folders import VersionFolders
from training.types import LoraConfig


def folders_in(tmp_path: Path) -> list[str]:
    """The names of all versions' folders."""
    own = (tmp_path / "server" / "versions").glob("*/*")
    return sorted(path.name for path in own if path.is_dir())


def publish(engine: Engine, name: str) -> None:
    engine.sampler.publish(name, engine.trainer.capture_adapter("a"))


def test_a_version_is_written_and_loaded_once_and_only_when_it_is_sampled(
    engine_of_server: Engine, server: VllmDouble, tmp_path: Path
) -> None:
    publish(engine_of_server, "v")
    sample(engine_of_server.sampler, job())
    assert folders_in(tmp_path) == []
    for _ in range(3):
        sample(engine_of_server.sampler, job(version="v"))
    (name,) = folders_in(tmp_path)
    assert server.loaded[name] == 1


def test_a_name_is_never_used_again(
    engine_of_server: Engine, server: VllmDouble, tmp_path: Path
) -> None:
    for _ in range(3):
        publish(engine_of_server, "v")
        sample(engine_of_server.sampler, job(version="v"))
        engine_of_server.sampler.retire("v")
        wait_for(lambda: not folders_in(tmp_path))
    assert set(server.loaded.values()) == {1}
    assert len(server.loaded) == 3 + 2 + 2  # the check: of two parts, and in two slots


def test_many_versions_come_and_go_while_the_engine_lives(
    engine_of_server: Engine, server: VllmDouble, tmp_path: Path
) -> None:
    """More than the server keeps in memory: it reads an adapter's files again when a request needs
    them, and dies if they are gone."""
    sampler = engine_of_server.sampler
    count = 0
    for number in range(12):
        publish(engine_of_server, f"v{number}")
        for seed in range(4):
            sampler.submit(f"{number} {seed}", job(version=f"v{number}", seed=seed))
        sampler.retire(f"v{number}")
        if number % 3 == 2:
            sampler.cancel(f"{number} 0")
            count += len(sampler.poll(0))
    while sampler.active:
        for result in sampler.poll(60).values():
            assert isinstance(result, SampleOutput), result
            count += 1
    assert count == 12 * 4 - 4
    assert not server.is_dead
    assert not here(engine_of_server)
    wait_for(lambda: not folders_in(tmp_path))
    assert not server.adapters


def test_files_stay_while_a_request_may_need_them(
    engine_of_server: Engine, server: VllmDouble, tmp_path: Path
) -> None:
    sampler = engine_of_server.sampler
    sample(sampler, job())
    publish(engine_of_server, "v")
    server.hold.clear()
    server.holds.clear()
    sampler.submit("slow", job(version="v"))
    sampler.retire("v")
    assert server.holds.wait(60)
    publish(engine_of_server, "w")
    sampler.submit("other", job(version="w"))
    wait_for(lambda: len(folders_in(tmp_path)) == 2)
    server.hold.set()
    assert set(finish(sampler)) == {"slow", "other"}
    wait_for(lambda: len(folders_in(tmp_path)) == 1)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(rank=16), "a rank above max_lora_rank"),
        (LoraConfig(rank=8), None),
        (LoraConfig(rank=1, train_unembed=False), None),
        (LoraConfig(rank=4, train_mlp=False, train_attn=False), None),
    ],
)
def test_an_adapter_that_the_server_does_not_take_is_sampled_here(
    engine_of_server: Engine, config: LoraConfig, reason: str | None
) -> None:
    engine_of_server.trainer.create_adapter("b", config)
    engine_of_server.sampler.publish("v", engine_of_server.trainer.capture_adapter("b"))
    sample(engine_of_server.sampler, job(version="v"))
    assert here(engine_of_server) == ({} if reason is None else {reason: 1})


def test_two_samplers_of_one_server_do_not_touch_each_others_versions(
    make_engine_of: Callable[..., Engine], server: VllmDouble
) -> None:
    one, other = make_engine_of(), make_engine_of()
    for engine in (one, other):
        publish(engine, "v")
        sample(engine.sampler, job(version="v"))
    one.sampler.retire("v")
    wait_for(lambda: len(server.adapters) == 1 or None)
    sample(other.sampler, job(version="v"))
    assert not here(other)


def test_a_version_whose_files_cannot_be_written_is_sampled_here(
    engine_of_server: Engine, server: VllmDouble, built_in: Engine, tmp_path: Path
) -> None:
    """As on a full disk, or after somebody has cleaned the folder up."""
    sample(engine_of_server.sampler, job())
    captured = engine_of_server.trainer.capture_adapter("a")
    for each in (engine_of_server, built_in):
        each.sampler.publish("v", captured)
    folder = tmp_path / "server" / "versions"
    shutil.rmtree(folder)
    folder.touch()
    asked = job(version="v")
    assert sample(engine_of_server.sampler, asked) == sample(built_in.sampler, asked)
    assert here(engine_of_server) == {"not answered by the server": 1}
    sample(engine_of_server.sampler, job())
    assert here(engine_of_server) == {"not answered by the server": 1}
    assert state(engine_of_server) == "ready"


def test_a_server_that_cannot_read_the_versions_samples_the_base_model_only(
    make_engine_of: Callable[..., Engine],
    server: VllmDouble,
    built_in: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one on another machine, without the data folder under the same path."""

    def load(body: dict[str, Any]) -> str:
        raise Refused(404, "No adapter found")

    monkeypatch.setattr(server, "load", load)
    engine = make_engine_of()
    captured = engine.trainer.capture_adapter("a")
    for each in (engine, built_in):
        each.sampler.publish("v", captured)
    sample(engine.sampler, job())
    assert not here(engine)
    asked = job(version="v")
    assert sample(engine.sampler, asked) == sample(built_in.sampler, asked)
    assert len(here(engine)) == 1


def test_what_a_dead_sampler_has_left_is_deleted(
    make_engine_of: Callable[..., Engine],
    server: VllmDouble,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_link, "ABANDONED_SECONDS", 0.05)
    dead = VersionFolders(tmp_path / "server" / "versions")
    living = VersionFolders(tmp_path / "server" / "versions")
    for folders in (dead, living):
        folder = folders.new()
        folder.mkdir()
        server.adapters[folder.name] = str(folder)
    dead.unlock()
    sample(make_engine_of().sampler, job())
    wait_for(lambda: not (tmp_path / "server" / "versions" / dead.owner).exists())
    assert [name for name in server.adapters if name.startswith(dead.owner)] == []
    assert [name for name in server.adapters if name.startswith(living.owner)]
    assert living.abandoned() == []
    living.unlock()
