"""Many adapters, requests and samples in the padded layout: each is as it is alone, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.families import save_random, small_config
from tests.engine.reference import TinyTrainer
from tests.engine.sampling_jobs import job, run, run_all
from tests.engine.test_padded_families import FAMILIES
from training.engine.interface import ForwardBackwardJob
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.loading import load_base_model
from training.engine.torch.padded.model_cache import bytes_remembered
from training.types import AdamParams, ForwardBackwardOutput, LoraConfig

CHANGES = dict(FAMILIES)
KINDS = ("qwen3_5_text", "granitemoehybrid", "lfm2", "falcon", "mamba2", "deepseek_v3")
"""A gated delta rule, Mamba 2, convolutions, an attention outside the registry, a state space
without attention, latent attention with experts."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory) -> str:
    config = small_config(request.param, **CHANGES[request.param])
    return save_random(config, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def trainer(folder: str) -> TinyTrainer:
    """Two adapters of different ranks."""
    base_model = load_base_model(folder, dtype="float32", device="cpu", layout="padded")
    trainer = TinyTrainer(base_model)
    for seed, (name, rank) in enumerate({"a": 4, "b": 8}.items()):
        trainer.create_adapter(name, LoraConfig(rank=rank, alpha=8.0))
        trainer.randomise(name, seed)
        trainer.set_weights(name, 0.2 * trainer.adapter_state(name)["weights"])
    return trainer


def jobs_of(make_datum: Any) -> list[ForwardBackwardJob]:
    """Two requests of one adapter around one of the other, of ragged lengths."""
    lengths = [("a", (5, 30, 60)), ("b", (17, 3)), ("a", (30, 31))]
    return [
        ForwardBackwardJob(
            adapter_name=name,
            data=[make_datum(n, seed) for n in ns],
            loss_fn="cross_entropy",
        )
        for seed, (name, ns) in enumerate(lengths)
    ]


def test_requests_in_one_pass_are_what_each_is_alone(trainer: TinyTrainer, make_datum) -> None:
    jobs = jobs_of(make_datum)
    alone = [trainer.forward_backward([each])[0] for each in jobs]
    expected = {name: trainer.grad(name) for name in "ab"}
    for name in "ab":
        trainer.drop_gradient(name)

    together = trainer.forward_backward(jobs)

    for ours, theirs in zip(together, alone, strict=True):
        assert isinstance(ours, ForwardBackwardOutput), ours
        assert isinstance(theirs, ForwardBackwardOutput), theirs
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_array_equal(a, b)
    for name in "ab":
        np.testing.assert_array_equal(trainer.grad(name), expected[name])


def passes_over_the_decoder(trainer: TinyTrainer, jobs: list[ForwardBackwardJob]) -> int:
    calls: list[object] = []
    trainer.forward_backward(jobs)  # the first may be preceded by passes that measure its memory
    hook = trainer._base_model._decoder.register_forward_hook(lambda *_: calls.append(_))
    trainer.forward_backward(jobs)
    hook.remove()
    return len(calls)


def test_requests_of_equal_padded_lengths_share_a_pass(trainer: TinyTrainer, make_datum) -> None:
    assert trainer._base_model.shared_tokens >= 64
    assert passes_over_the_decoder(trainer, jobs_of(make_datum)) == 3  # of 16, 32 and 64 tokens


def test_requests_whose_bits_would_depend_on_it_share_no_pass(tmp_path, make_datum) -> None:
    """Mamba multiplies its states by a vector of each token, a product with a kernel of its own."""
    folder = save_random(small_config("mamba"), tmp_path)
    base_model = load_base_model(folder, dtype="float32", device="cpu", layout="padded")
    assert base_model.shared_tokens == 0
    trainer = TinyTrainer(base_model)
    for name in "ab":
        trainer.create_adapter(name, LoraConfig(rank=4))
    assert passes_over_the_decoder(trainer, jobs_of(make_datum)) == 6  # of 16, 32 and 64 of each


def test_a_run_that_is_loaded_again_continues_to_the_bit(
    trainer: TinyTrainer, make_datum, tmp_path: Path
) -> None:
    """A restart reads a snapshot and repeats the requests after it, with other batch-mates."""
    first, other, last = jobs_of(make_datum)
    trainer.forward_backward([first, other])
    trainer.optim_step("a", AdamParams(learning_rate=1e-2))
    trainer.save_adapter("a", tmp_path / "snapshot")
    trainer.forward_backward([other, last])
    trainer.optim_step("a", AdamParams(learning_rate=1e-2))
    expected = trainer.adapter_state("a")

    trainer.load_adapter("a", tmp_path / "snapshot")
    trainer.forward_backward([last])
    trainer.optim_step("a", AdamParams(learning_rate=1e-2))

    for name, values in trainer.adapter_state("a").items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_jobs_sampled_together_are_what_each_is_alone(trainer: TinyTrainer) -> None:
    base_model = trainer._base_model
    text = ChatRenderer(base_model.tokenizer, base_model.info.vocab_size)
    sampler = ContinuousSampler(base_model, text, cache_tokens=4096, prefill_chunk_tokens=16)
    for name in "ab":
        sampler.publish(name, trainer.capture_adapter(name))
    jobs = {
        "base": job([9], max_tokens=8),
        "many": job(list(range(40, 60)), version="a", num_samples=5, max_tokens=8),
        "other": job([7] * 37, version="b", seed=4, max_tokens=8),
        "same": job([5, 6], version="b", num_samples=2, max_tokens=8),
    }
    alone = {key: run(sampler, each).sequences for key, each in jobs.items()}
    together = run_all(sampler, jobs)
    assert {key: output.sequences for key, output in together.items()} == alone


def test_recurrent_states_count_as_memory_and_a_request_alone_always_starts(tmp_path) -> None:
    """Per token: keys and values of one layer of attention, 2 heads of 4, float32: 64 bytes. Per
    sequence: the convolution of two layers, 3 inputs of 16 channels, 384 bytes: 6 tokens."""
    changes = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
    folder = save_random(small_config("lfm2", **changes), tmp_path)
    base_model = load_base_model(folder, dtype="float32", device="cpu", layout="padded")
    assert bytes_remembered(base_model, lambda n: n) == (384, 64)
    text = ChatRenderer(base_model.tokenizer, base_model.info.vocab_size)
    sampler = ContinuousSampler(base_model, text, cache_tokens=40)
    for key in "ab":
        sampler.submit(key, job([7] * 10, max_tokens=8))  # 17 tokens and the states each
    sampler.poll(0)
    assert len(sampler._runner._reserved) == 1
    assert sampler.active == 2
    while sampler.active:
        sampler.poll(0)
    alone = run(sampler, job([7] * 30, max_tokens=10))  # 39 tokens, and more than 40 with states
    assert len(alone.sequences[0].tokens) <= 10
