"""The engine on a GPU that is none: what it computes there, and when it waits for the device.

The same training and sampling runs on the CPU and on the pretended GPU, where the engine takes its
paths for a GPU. No tensor may be on the wrong device, the results are equal up to rounding, and the
host waits in a few known places only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engine.families import RIGHT, save_random, small_config
from tests.engine.gpu.pretend import PretendGpu, pretend_gpu
from tests.engine.reference import TinyTrainer
from tests.engine.sampling_jobs import job, run_all
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import ForwardBackwardJob, SampleJob
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.loading import load_base_model
from training.errors import TrainingError
from training.types import AdamParams, Datum, LoraConfig, ScoringParams

RESULTS = {
    "engine.torch.passes._scatter_scores",  # after all passes of a call
    "engine.torch.adapters.all_finite",  # whether the new gradient, or weights, are kept
    "engine.torch.adamw.adamw_step",  # the gradient's norm, which is returned
    "engine.sampler.logits.choose_tokens",  # a step's tokens, which may be the last
    "engine.sampler.logits._top",  # the likeliest ones that a request asked for
    "engine.sampler.prompt_logprobs.PromptScorer.add",
    "engine.sampler.prompt_logprobs._numpy",
}
"""Where the host reads results."""

EXPERTS = {
    "engine.torch.experts.products.grouped_times",
    "engine.torch.experts.products.grouped_sums",
    "engine.torch.experts.products._groups",
}
"""A grouped product needs bfloat16 and ranks that are multiples of 8; others are computed expert by
expert."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a run."""

    layout: str
    logprobs: list[NDArray[np.float32]]
    grads: dict[str, NDArray[np.float32]]
    grad_norms: list[float]
    samples: dict[str, list[tuple[Any, Any]]]
    """Tokens and log-probabilities of each sequence, by job."""
    scores: NDArray[np.float32]


def datum(num_tokens: int, seed: int, *, loss_fn: str = "cross_entropy", shared: int = 0) -> Datum:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB_SIZE, num_tokens).astype(np.int32)
    tokens[:shared] = np.arange(shared)
    inputs: dict[str, Any] = {"target_tokens": rng.integers(0, VOCAB_SIZE, num_tokens)}
    if loss_fn == "cross_entropy":
        inputs["weights"] = (rng.random(num_tokens) < 0.7).astype(np.float32)
    else:
        inputs["logprobs"] = (rng.normal(size=num_tokens) - 5).astype(np.float32)
        inputs["advantages"] = rng.normal(size=num_tokens).astype(np.float32)
    return Datum(model_input=tokens, loss_fn_inputs=inputs)


def jobs() -> list[ForwardBackwardJob]:
    """Of two adapters: ragged, a shared prefix, a padded block, two losses, and no gradient."""
    sft = [datum(36, 1, shared=18), datum(20, 2, shared=18), datum(5, 3)]
    rl = [datum(30, 4, loss_fn="ppo"), datum(40, 5, loss_fn="ppo")]
    return [
        ForwardBackwardJob(adapter_name="a", data=sft, loss_fn="cross_entropy"),
        ForwardBackwardJob(adapter_name="b", data=rl, loss_fn="ppo"),
        ForwardBackwardJob(adapter_name="a", data=[datum(17, 6)], loss_fn="cross_entropy"),
        ForwardBackwardJob(
            adapter_name="b", data=[datum(9, 7)], loss_fn="cross_entropy", forward_only=True
        ),
    ]


def sample_jobs() -> dict[str, SampleJob]:
    """Of every kind, to be sampled side by side."""
    scored = job([2, 7, 1, 8], max_tokens=4, prompt_logprobs=True, seed=6)
    return {
        "group": job([5, 6, 7] * 8, version="a", num_samples=3, max_tokens=8),
        "cut": job([9] * 5, version="b", max_tokens=5, top_k=5, top_p=0.9, min_p=0.01),
        "nucleus": job([9] * 4, version="b", max_tokens=4, top_p=0.7),
        "greedy": job([3] * 4, max_tokens=4, temperature=0.0),
        "penalized": job(
            [3, 1, 4],
            version="a",
            max_tokens=5,
            frequency_penalty=0.5,
            repetition_penalty=1.2,
            logit_bias=((7, 1.0),),
        ),
        "scored": replace(
            scored, scoring=ScoringParams(topk_prompt_logprobs=2, topk_sample_logprobs=2)
        ),
    }


class Parts:
    """The places in which the host waited, by part of a run."""

    def __init__(self, seen: PretendGpu | None = None) -> None:
        self._seen = seen
        self.places: dict[str, set[str]] = {}

    def end(self, name: str) -> None:
        """End a part."""
        if self._seen is not None:
            self.places[name] = {place for place, _ in self._seen.waits}
            self._seen.waits.clear()


def run(folder: str, device: str, parts: Parts, *, dtype: str, rank: int) -> Outcome:
    base_model = load_base_model(folder, dtype=dtype, device=device)
    trainer = TinyTrainer(base_model)
    for name, own_rank in (("a", rank), ("b", 8)):
        trainer.create_adapter(name, LoraConfig(rank=own_rank, alpha=2.0 * own_rank))
        trainer.randomise(name, ord(name))
    parts.end("start")
    results = trainer.forward_backward(jobs())
    parts.end("passes")
    for result in results:
        assert not isinstance(result, TrainingError), result
    grads = {name: trainer.grad(name) for name in "ab"}
    parts.end("read")
    steps = [trainer.optim_step(name, AdamParams(learning_rate=1e-3)) for name in "ab"]
    parts.end("steps")
    sampler = ContinuousSampler(
        base_model, ChatRenderer(base_model.tokenizer, VOCAB_SIZE), cache_tokens=1024
    )
    for name in "ab":
        sampler.publish(name, trainer.capture_adapter(name, with_optimizer=False))
    if base_model.is_padded:  # passes side by side are in threads, which do not pretend
        samples = run_all(sampler, {"scored": sample_jobs()["scored"]})
    else:
        samples = run_all(sampler, sample_jobs())
    parts.end("samples")
    return Outcome(
        layout=base_model.info.layout,
        logprobs=[each for result in results for each in result.logprobs],
        grads=grads,
        grad_norms=[step.grad_norm for step in steps],
        samples={key: [(s.tokens, s.logprobs) for s in o.sequences] for key, o in samples.items()},
        scores=samples["scored"].scores.top.logprobs,
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # groups of query heads
    "gemma3_text": {},  # windows
    "gpt_oss": {},  # experts, windows and sinks
    "llama4_text": {},  # experts and chunks
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},  # the padded layout
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_what_a_cpu_does_without_waiting(family: str, tmp_path: Path) -> None:
    folder = save_random(small_config(family, **FAMILIES[family]), tmp_path)
    expected = run(folder, "cpu", Parts(), dtype="float32", rank=2)
    with pretend_gpu() as seen:
        parts = Parts(seen)
        found = run(folder, "cuda", parts, dtype="float32", rank=2)
    assert found.layout == expected.layout
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=RIGHT)
    for name, grad in expected.grads.items():
        assert np.linalg.norm(found.grads[name] - grad) < RIGHT * np.linalg.norm(grad)
    np.testing.assert_allclose(found.grad_norms, expected.grad_norms, rtol=RIGHT)
    for key, sequences in expected.samples.items():
        for (tokens, logprobs), (own_tokens, own) in zip(
            sequences, found.samples[key], strict=True
        ):
            assert list(own_tokens) == list(tokens), key
            np.testing.assert_allclose(own, logprobs, atol=RIGHT)
    np.testing.assert_allclose(found.scores[1:], expected.scores[1:], atol=RIGHT)
    allowed = RESULTS | EXPERTS
    assert {name: parts.places[name] - allowed for name in ("passes", "steps", "samples")} == {
        "passes": set(),
        "steps": set(),
        "samples": set(),
    }


def test_experts_in_bfloat16_do_not_make_the_host_wait(tmp_path: Path) -> None:
    folder = save_random(small_config("qwen3_moe", initializer_range=0.05), tmp_path)
    with pretend_gpu() as seen:
        parts = Parts(seen)
        run(folder, "cuda", parts, dtype="bfloat16", rank=8)
    assert not parts.places["passes"] - RESULTS
    assert not parts.places["samples"] - RESULTS
