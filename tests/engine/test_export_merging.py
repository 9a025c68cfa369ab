"""Exports merged as people merge them: the merged model is what was trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.reference import TinyTrainer, peft_warnings_ignored
from training.types import Datum, LoraConfig

TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, 250, 24)]


def our_logprobs(trainer: TinyTrainer) -> np.ndarray:
    inputs = {
        "target_tokens": np.array(TOKENS[1:], np.int64),
        "weights": np.ones(len(TOKENS) - 1, np.float32),
    }
    datum = Datum(model_input=np.array(TOKENS[:-1], np.int32), loss_fn_inputs=inputs)
    return trainer.train_one("a", [datum], forward_only=True).logprobs[0]


def logprobs_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        logits = model.eval()(torch.tensor([TOKENS])).logits[0].double()
    predicted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])
    return predicted[:, 0].numpy()


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def export(make_engine: Callable[..., TinyTrainer], tmp_path: Path) -> Callable[..., np.ndarray]:
    """Export a random adapter to ``tmp_path / "export"``; the log-probabilities it has here."""

    def make(*, tied: bool, **config: Any) -> np.ndarray:
        trainer = make_engine(tied=tied)
        trainer.create_adapter("a", LoraConfig(rank=4, **config))
        trainer.randomise("a")
        trainer.save_peft("a", tmp_path / "export")
        return our_logprobs(trainer)

    return make


def test_a_default_export_of_a_model_with_its_own_head_merges_unchanged(
    export, untied_folder, tmp_path
):
    ours = export(tied=False)
    with peft_warnings_ignored():
        loaded = peft.PeftModel.from_pretrained(base_of(untied_folder), tmp_path / "export")
        np.testing.assert_allclose(logprobs_of(loaded), ours, atol=2e-4)
        np.testing.assert_allclose(logprobs_of(loaded.merge_and_unload()), ours, atol=2e-4)


def test_an_export_without_the_head_merges_unchanged_into_a_tied_model(
    export, tied_folder, tmp_path
):
    ours = export(tied=True, train_unembed=False)
    with peft_warnings_ignored():
        loaded = peft.PeftModel.from_pretrained(base_of(tied_folder), tmp_path / "export")
        np.testing.assert_allclose(logprobs_of(loaded.merge_and_unload()), ours, atol=2e-4)
    assert "Before you merge" not in (tmp_path / "export" / "README.md").read_text()


def test_the_readme_of_an_export_of_a_tied_head_merges_it_right(
    export, tied_folder, tmp_path, monkeypatch
):
    ours = export(tied=True)
    readme = (tmp_path / "export" / "README.md").read_text()
    assert "Before you merge" in readme
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.S))
    code = re.sub(r"from_pretrained\('[^']*'\)", f"from_pretrained({str(tied_folder)!r})", code)
    monkeypatch.chdir(tmp_path / "export")
    names: dict[str, Any] = {}
    with peft_warnings_ignored():
        exec(code, names)  # noqa: S102  (the README's own code)
    np.testing.assert_allclose(logprobs_of(names["model"]), ours, atol=2e-4)
    np.testing.assert_allclose(logprobs_of(names["merged"]), ours, atol=2e-4)
    again = base_of(Path("untied-base"))
    assert again.config.tie_word_embeddings is False
    with peft_warnings_ignored():
        merged = peft.PeftModel.from_pretrained(again, ".").merge_and_unload()
    np.testing.assert_allclose(logprobs_of(merged), ours, atol=2e-4)
    merged.save_pretrained("merged")
    np.testing.assert_allclose(logprobs_of(base_of(Path("merged"))), ours, atol=2e-4)
