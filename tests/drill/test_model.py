"""The drill's own base model is one that the engine loads."""

from __future__ import annotations

from pathlib import Path

from tinkerapi.drill.job import BAD_TOKEN, TEXT_TOKENS
from tinkerapi.drill.model import CONTEXT_TOKENS, VOCAB_SIZE, make_tiny_model
from training.engine.torch.loading import load_base_model


def test_the_engine_loads_it_and_its_tokens_are_bytes(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny", seed=1)
    model = load_base_model(str(folder), name="tiny", device="cpu", dtype="float32")
    assert (model.info.vocab_size, model.info.max_context_tokens) == (VOCAB_SIZE, CONTEXT_TOKENS)
    assert len(model.tokenizer.encode("<|im_start|>hi")) == 3
    assert TEXT_TOKENS[1] < VOCAB_SIZE <= BAD_TOKEN


def test_a_seed_fixes_its_weights(tmp_path: Path) -> None:
    files = [
        make_tiny_model(tmp_path / name, seed=seed) / "model.safetensors"
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    ]
    one, again, other = (file.read_bytes() for file in files)
    assert one == again != other
