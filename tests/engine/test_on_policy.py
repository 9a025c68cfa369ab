"""On a CPU a token has one log-probability, to the bit: sampled, scored and trained on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.engine.families import save_random, small_config
from tests.engine.reference import TinyTrainer
from tests.engine.sampling_jobs import job, run, run_all
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import ForwardBackwardJob, SampleJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.pass_figures import pass_figures
from training.types import Datum, ForwardBackwardOutput, LoraConfig

LONG = {"max_position_embeddings": 1024, "initializer_range": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LONG,
    "qwen3": LONG,
    "gemma2": {
        **LONG,
        "initializer_range": 0.05,  # less steep: the check at the start is strict in bfloat16
        "sliding_window": 40,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**LONG, "sliding_window": 40},
    "gpt_oss": {**LONG, "sliding_window": 40},
    "gpt2": LONG,
    "qwen3_moe": LONG,
}
"""Plain attention; with normed heads; capped; with windows; with sinks and experts; with biases and
learned positions; with experts."""
DTYPES = ["float32", "bfloat16"]
RANKS = [1, 2, 5, 8, 16]


@cache
def folder_of(family: str) -> str:
    return save_random(small_config(family, **FAMILIES[family]), Path(mkdtemp()) / family)


@cache
def model_of(family: str, dtype: str) -> BaseModel:
    return load_base_model(folder_of(family), device="cpu", dtype=dtype, layout="packed")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


class Policies:
    """Adapters that are trained and sampled: ``a0``, ``a1``, ..."""

    def __init__(self, base_model: BaseModel, ranks: Sequence[int], **options: int) -> None:
        """``options``: of the trainer."""
        self.base_model = base_model
        self.trainer = TinyTrainer(base_model, **options)
        self.names = [f"a{number}" for number in range(len(ranks))]
        for name, rank in zip(self.names, ranks, strict=True):
            self.trainer.create_adapter(name, LoraConfig(rank=rank, train_unembed=rank % 2 == 0))
            self.trainer.randomise(name, seed=rank)

    def sampler(self, **options: int) -> ContinuousSampler:
        text = ChatRenderer(self.base_model.tokenizer, VOCAB_SIZE)
        sampler = ContinuousSampler(self.base_model, text, **options)
        for name in self.names:
            sampler.publish(name, self.trainer.capture_adapter(name, with_optimizer=False))
        return sampler


def sampled(sampler: ContinuousSampler, jobs: dict[str, SampleJob]) -> dict[str, SampleOutput]:
    found = {}
    for key, result in run_all(sampler, jobs).items():
        assert isinstance(result, SampleOutput), result
        found[key] = result
    return found


def datums_of(wanted: SampleJob, output: SampleOutput) -> list[Datum]:
    """For a policy gradient with an advantage of 1 for each sampled token."""
    data = []
    for sequence in output.sequences:
        tokens = np.asarray([*wanted.prompt, *sequence.tokens], np.int32)
        num_before = len(wanted.prompt) - 1
        logprobs = [0.0] * num_before + list(sequence.logprobs)
        is_sampled = np.arange(len(tokens) - 1) >= num_before
        inputs = {
            "target_tokens": tokens[1:].astype(np.int64),
            "logprobs": np.asarray(logprobs, np.float32),
            "advantages": is_sampled.astype(np.float32),
        }
        data.append(Datum(model_input=tokens[:-1], loss_fn_inputs=inputs))
    return data


def score(sampler: ContinuousSampler, version: str | None, data: Sequence[Datum]) -> list[Any]:
    """The prompt scores of the datums' targets, all in one call."""
    jobs = {}
    for number, datum in enumerate(data):
        tokens = [datum.model_input[0], *datum.loss_fn_inputs["target_tokens"]]
        jobs[str(number)] = job(tokens, version=version, max_tokens=0, prompt_logprobs=True)
    outputs = sampled(sampler, jobs)
    return [
        np.asarray(outputs[str(number)].prompt_logprobs, np.float32)[1:]
        for number in range(len(data))
    ]


def assert_same(ours: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_one_policy(
    wanted: SampleJob, output: SampleOutput, trained: Sequence[NDArray[np.float32]]
) -> None:
    """The trainer's log-probabilities of the samples' targets are the sampler's."""
    for sequence, logprobs in zip(output.sequences, trained, strict=True):
        own = logprobs[len(wanted.prompt) - 1 :]
        np.testing.assert_array_equal(own, np.asarray(sequence.logprobs, np.float32))


@st.composite
def crowds(draw: st.DrawFn, versions: Sequence[str | None]) -> dict[str, SampleJob]:
    """Jobs of two owners, many of which begin in the same way."""
    beginnings = [prompt_of(230, seed) for seed in range(2)]
    jobs = {}
    for number in range(draw(st.integers(1, 3))):
        begin = draw(st.sampled_from(beginnings))[: draw(st.integers(1, 230))]
        prompt = [*begin, *prompt_of(draw(st.integers(0, 40)), draw(st.integers(2, 4)))]
        jobs[str(number)] = replace(
            job(
                prompt,
                version=draw(st.sampled_from(versions)),
                num_samples=draw(st.integers(1, 3)),
                max_tokens=draw(st.integers(1, 40)),
                seed=draw(st.integers(0, 9)),
            ),
            group=draw(st.sampled_from(["anna", "berta"])),
        )
    return jobs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_a_tokens_log_probability_is_one_number(
    family: str, dtype: str, data: st.DataObject
) -> None:
    """With batch-mates, cached prefixes and preemption; shared prefixes, micro-batches, and
    activations that are computed again."""
    ranks = data.draw(st.lists(st.sampled_from(RANKS), min_size=1, max_size=2, unique=True))
    policies = Policies(
        model_of(family, dtype),
        ranks,
        token_budget=data.draw(st.sampled_from([64, 500, 4096])),
        activation_bytes=data.draw(st.sampled_from([0, 1])),
    )
    jobs = data.draw(crowds(policies.names))
    longest = max(
        len(each.prompt) + (each.sampling_params.max_tokens or 0) for each in jobs.values()
    )
    sampler = policies.sampler(
        cache_tokens=longest + BLOCK_TOKENS * data.draw(st.integers(1, 8)),
        prefill_chunk_tokens=data.draw(st.sampled_from([7, 32, 100, 256])),
        max_sequences=data.draw(st.sampled_from([4, 9, 64])),
    )
    for _ in range(2):  # the second time over what the first has left
        outputs = sampled(sampler, jobs)
    training = [
        ForwardBackwardJob(
            adapter_name=wanted.version,
            data=datums_of(wanted, outputs[key]),
            loss_fn=data.draw(st.sampled_from(["importance_sampling", "ppo"])),
        )
        for key, wanted in jobs.items()
    ]
    for forward_only in (True, False):
        some = [replace(each, forward_only=forward_only) for each in training]
        results = policies.trainer.forward_backward(some)
        for (key, wanted), each, result in zip(jobs.items(), training, results, strict=True):
            assert isinstance(result, ForwardBackwardOutput), result
            assert_one_policy(wanted, outputs[key], result.logprobs)
            assert_same(score(sampler, wanted.version, each.data), result.logprobs)
            assert result.loss == -sum(len(s.tokens) for s in outputs[key].sequences)
            config: dict[str, float] = {}
            figures = pass_figures(
                each.data, result.logprobs, loss_fn=each.loss_fn, loss_fn_config=config
            )
            assert figures["ratio_mean"] == 1
            assert figures["kl_k1"] == figures["kl_k3"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_long_sequence_has_one_log_probability_for_each_token(family: str, dtype: str) -> None:
    """Over many blocks and tiles, alone and with others, with activations computed again."""
    policies = Policies(model_of(family, dtype), [8], activation_bytes=1, token_budget=2048)
    wanted = job(prompt_of(800), version="a0", num_samples=2, max_tokens=230)
    sampler = policies.sampler(cache_tokens=1600)
    output = run(sampler, wanted)
    data = datums_of(wanted, output)
    for some in (data, data[:1]):
        result = policies.trainer.train_one("a0", some, "importance_sampling")
        assert result.memory is not None
        assert result.memory.recomputed
        whole = replace(output, sequences=output.sequences[: len(some)])
        assert_one_policy(wanted, whole, result.logprobs)
        assert_same(score(sampler, "a0", some), result.logprobs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cold_samples_scores_are_those_of_the_untempered_model(dtype: str) -> None:
    """Sampled log-probabilities are tempered; scores and the trainer's are not, whatever the
    temperature, and those of temperature 0 are not either."""
    policies = Policies(model_of("llama", dtype), [8])
    sampler = policies.sampler()
    for temperature in (0.0, 0.5):
        wanted = job(prompt_of(50), version="a0", max_tokens=40, temperature=temperature)
        output = run(sampler, wanted)
        data = datums_of(wanted, output)
        trained = policies.trainer.train_one("a0", data, "importance_sampling").logprobs
        assert_same(score(sampler, "a0", data), trained)
        own = trained[0][49:]
        is_same = own == np.asarray(output.sequences[0].logprobs, np.float32)
        assert is_same.all() == (temperature == 0.0)


CHILD = """
import sys
from tests.engine.test_on_policy import facts_of_a_start
for folder in sys.argv[1:]:
    print(facts_of_a_start(folder, "bfloat16"))
"""


def facts_of_a_start(folder: str, dtype: str) -> str:
    """The bits of some samples and of their training in this process."""
    base_model = load_base_model(folder, device="cpu", dtype=dtype, layout="packed")
    policies = Policies(base_model, [8])
    wanted = job(prompt_of(90), version="a0", num_samples=2, max_tokens=20)
    output = run(policies.sampler(), wanted)
    trained = policies.trainer.train_one("a0", datums_of(wanted, output), "importance_sampling")
    sampled_bits = [np.asarray(s.logprobs, np.float32).tobytes().hex() for s in output.sequences]
    return " ".join([*sampled_bits, *(logprobs.tobytes().hex() for logprobs in trained.logprobs)])


def test_a_restart_changes_no_bit() -> None:
    folders = [folder_of(family) for family in ("llama", "gemma3_text", "qwen3_moe")]
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, *folders], capture_output=True, text=True, check=True
    )
    expected = [facts_of_a_start(folder, "bfloat16") for folder in folders]
    assert finished.stdout.split("\n")[:-1] == expected
