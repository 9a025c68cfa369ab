"""The GPU benchmark runs from end to end, on a CPU with tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu


def test_every_part_runs_and_is_stored(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--small", "--results", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    names = {figure["name"] for figure in stored["figures"]}
    for shape in gpu.SMALL:
        for figure in (
            "training",
            "4NT",
            "2 adapters against one, time",
            "1100 tokens, activations kept: estimate",
            "1100 tokens, activations recomputed: estimate",
            "3 prompts of 128 tokens, 4 sampled each, prefill included",
            "sampled against forward, each token",
        ):
            assert f"{shape.name}: {figure}" in names
    assert all(figure["goal_met"] in (None, True) for figure in stored["figures"])
    (drift,) = (f for f in stored["figures"] if f["name"].startswith("small llama: sampled ag"))
    assert drift["max"] < 1e-5
    assert drift["n"] == 3 * 4


def test_a_part_that_fails_stops_no_other_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: gpu.Benchmark, *of: object) -> None:
        raise RuntimeError("of this part")

    for part in ("judge", "measure"):
        monkeypatch.setattr(gpu.Benchmark, part, fail)
    assert gpu.main(["--device", "cpu", "--small", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "failed: correctness of llama, small llama, small qwen3" in printed
    assert json.loads((tmp_path / "gpu.json").read_text())["figures"]


def test_no_part_begins_after_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--small", "--minutes", "-1", "--results", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert "the device: not begun, the time is up" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().out == (
        "torch sees no GPU here; try the benchmark itself with --device cpu --small.\n"
    )
