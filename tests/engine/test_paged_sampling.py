"""Blocks while sampling: shared, found again, given up and read again; no bit depends on it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.engine.families import save_random, small_config
from tests.engine.sampling_jobs import MakeSampler, job, run, run_all, sample
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import SampleJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.errors import LimitExceeded
from training.types import ScoringParams

LONG = {"max_position_embeddings": 512, "initializer_range": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LONG,
    "qwen3": LONG,
    "gemma2": {
        **LONG,
        "initializer_range": 0.05,  # less steep: the check at the start is strict in bfloat16
        "sliding_window": 40,
        "attn_logit_softcapping": 20.0,
    },
    "gemma3_text": {**LONG, "sliding_window": 40},
    "gpt_oss": {**LONG, "sliding_window": 40},
    "gpt2": LONG,
}
DTYPES = ["float32", "bfloat16"]


@cache
def folder_of(family: str) -> str:
    return save_random(small_config(family, **FAMILIES[family]), Path(mkdtemp()) / family)


@cache
def model_of(family: str, dtype: str) -> BaseModel:
    return load_base_model(folder_of(family), device="cpu", dtype=dtype, layout="packed")


def sampler_of(base_model: BaseModel, **options: int) -> ContinuousSampler:
    return ContinuousSampler(base_model, ChatRenderer(base_model.tokenizer, VOCAB_SIZE), **options)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def outputs(sampler: ContinuousSampler, jobs: dict[str, SampleJob]) -> dict[str, SampleOutput]:
    found = {}
    for key, result in run_all(sampler, jobs).items():
        assert isinstance(result, SampleOutput), result
        found[key] = result
    return found


@st.composite
def crowds(draw: st.DrawFn) -> dict[str, SampleJob]:
    """Jobs of two owners, many of which begin in the same way."""
    beginnings = [prompt_of(170, seed) for seed in range(2)]
    jobs = {}
    for number in range(draw(st.integers(2, 4))):
        begin = draw(st.sampled_from(beginnings))[: draw(st.integers(1, 170))]
        prompt = [*begin, *prompt_of(draw(st.integers(0, 40)), draw(st.integers(2, 4)))]
        jobs[str(number)] = replace(
            job(
                prompt,
                num_samples=draw(st.integers(1, 4)),
                max_tokens=draw(st.integers(0, 60)),
                seed=draw(st.integers(0, 9)),
                prompt_logprobs=draw(st.booleans()),
            ),
            group=draw(st.sampled_from(["anna", "berta"])),
        )
    return jobs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=2)
def test_no_bit_depends_on_company_cached_beginnings_or_preemption(
    family: str, dtype: str, data: st.DataObject
) -> None:
    base_model = model_of(family, dtype)
    jobs = data.draw(crowds())
    alone = {key: run(sampler_of(base_model), each) for key, each in jobs.items()}
    longest = max(
        len(each.prompt) + (each.sampling_params.max_tokens or 0) for each in jobs.values()
    )
    sampler = sampler_of(
        base_model,
        cache_tokens=longest + BLOCK_TOKENS * data.draw(st.integers(1, 8)),
        prefill_chunk_tokens=data.draw(st.sampled_from([7, 32, 100, 256])),
        max_sequences=data.draw(st.sampled_from([4, 9, 64])),
    )
    for _ in range(2):  # the second time over what the first has left
        for key, output in outputs(sampler, jobs).items():
            assert output.sequences == alone[key].sequences
            np.testing.assert_array_equal(
                np.asarray(output.prompt_logprobs, np.float32),
                np.asarray(alone[key].prompt_logprobs, np.float32),
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_stock_transformers(family: str) -> None:
    prompt = prompt_of(150)
    wanted = replace(job(prompt, num_samples=3, max_tokens=90), prompt_logprobs=True)
    # Room for one whole sequence and a half: the others are preempted, and read again.
    output = run(sampler_of(model_of(family, "float32"), cache_tokens=384), wanted)
    stock = AutoModelForCausalLM.from_pretrained(folder_of(family), attn_implementation="eager")
    assert output.prompt_logprobs is not None
    for sequence in output.sequences:
        tokens = torch.tensor([[*prompt, *sequence.tokens]])
        with torch.no_grad():
            logits = stock(input_ids=tokens[:, :-1], use_cache=False).logits[0]
        expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()
        ours = [*output.prompt_logprobs[1:], *sequence.logprobs]
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_jobs_of_adapters_are_the_same_over_cached_beginnings_and_preempted(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    beginning = prompt_of(70)
    jobs = {
        key: replace(each, prompt=np.asarray([*beginning, *each.prompt], np.int32))
        for key, each in crowd.items()
    }
    alone = {key: run(make_sampler(), each) for key, each in jobs.items()}
    sampler = make_sampler(cache_tokens=5 * BLOCK_TOKENS, prefill_chunk_tokens=16)
    for _ in range(2):
        for key, output in outputs(sampler, jobs).items():
            assert output.sequences == alone[key].sequences


# -- room ------------------------------------------------------------------------------------------


def test_a_group_that_could_never_be_held_at_once_is_sampled_all_the_same(
    make_sampler: MakeSampler,
) -> None:
    wanted = job(prompt_of(50), num_samples=8, max_tokens=100)
    small, large = make_sampler(cache_tokens=256), make_sampler()
    output = run(small, wanted)  # of 8 * 149 tokens
    assert output.sequences == run(large, wanted).sequences
    assert small.figures()["preemptions"] >= 7  # no two ever fit together to their ends
    assert large.figures()["preemptions"] == 0


def test_samples_of_a_prompt_share_its_blocks(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    sampler.submit("one", job(prompt_of(3 * BLOCK_TOKENS + 5), num_samples=8, max_tokens=9))
    sampler.poll(0)
    sampler.poll(0)
    pool = sampler._runner.tables.pool  # type: ignore[attr-defined]
    # Three full ones together; of the fourth the first has the original and the others copies.
    assert pool.num_blocks - pool.num_available == 3 + 8
    assert sampler.figures() == {
        "cache_tokens": pool.num_blocks * BLOCK_TOKENS,
        "cache_tokens_held": (3 + 8) * BLOCK_TOKENS,
        "preemptions": 0,
    }


def test_blocks_are_taken_as_tokens_come(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    pool = sampler._runner.tables.pool  # type: ignore[attr-defined]
    sampler.submit("one", job(prompt_of(BLOCK_TOKENS), max_tokens=3 * BLOCK_TOKENS))
    used = []
    while sampler.active:
        sampler.poll(0)
        used.append(pool.num_blocks - pool.num_available)
    assert used == [1, *[2] * 32, *[3] * 32, *[4] * 30, 0]


def test_what_can_never_fit_is_refused_with_the_length_that_would(
    make_sampler: MakeSampler,
) -> None:
    sampler = make_sampler(cache_tokens=128, max_sequences=4)
    with pytest.raises(LimitExceeded, match=r"5 prompt and 125 .*room for 128 .*at most 124"):
        sampler.submit("one", job(num_samples=2, max_tokens=125))
    with pytest.raises(LimitExceeded, match="fewer than the prompt has"):
        sampler.submit("one", job(prompt_of(129), max_tokens=1))
    assert len(run(sampler, job(num_samples=2, max_tokens=124)).sequences[1].tokens) == 124


def test_a_full_cache_takes_from_the_greediest_and_not_from_the_modest(
    make_sampler: MakeSampler,
) -> None:
    sampler = make_sampler(cache_tokens=10 * BLOCK_TOKENS)
    greedy = replace(job(prompt_of(40), num_samples=6, max_tokens=200), group="greedy")
    modest = replace(job(prompt_of(40, 1), max_tokens=20), group="modest")
    sampler.submit("greedy", greedy)
    for _ in range(60):
        sampler.poll(0)
    sampler.submit("modest", modest)
    steps, results = 0, {}
    while "modest" not in results:
        results |= sampler.poll(0)
        steps += 1
    # Its prompt and each of its tokens, in turns with what the other reads again meanwhile.
    assert steps <= 2 * 20 + 2
    results |= run_all(sampler, {})
    assert results["modest"].sequences == run(make_sampler(), modest).sequences
    assert results["greedy"].sequences == run(make_sampler(), greedy).sequences


# -- beginnings ------------------------------------------------------------------------------------


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    first = job(prompt_of(200), max_tokens=40)
    answer = sample(sampler, first).tokens
    second = job([*prompt_of(200), *answer, *prompt_of(20, 5)], max_tokens=8)
    output = run(sampler, second)
    stored = 200 + 39  # the last token of an answer is never read
    assert output.cached_prompt_tokens == stored // BLOCK_TOKENS * BLOCK_TOKENS
    assert output.sequences == run(make_sampler(), second).sequences


def test_a_repeated_prompt_is_read_but_for_its_end(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    for prompt_tokens, expected in ((BLOCK_TOKENS - 1, 0), (64, 32), (65, 64), (100, 96)):
        wanted = job(prompt_of(prompt_tokens, prompt_tokens), num_samples=2)
        assert run(sampler, wanted).cached_prompt_tokens == 0
        assert run(sampler, wanted).cached_prompt_tokens == expected


def test_rows_that_are_scored_are_read(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    prompt = prompt_of(100)
    run(sampler, job(prompt))
    assert run(sampler, job(prompt, prompt_logprobs=True)).cached_prompt_tokens == 0
    last = ScoringParams(prompt_logprobs_last_n=30)
    some = replace(job(prompt, prompt_logprobs=True), scoring=last)
    again = run(sampler, some)
    assert again.cached_prompt_tokens == 64  # the row of token 69 predicts the first scored one
    np.testing.assert_array_equal(
        np.asarray(again.prompt_logprobs), np.asarray(run(make_sampler(), some).prompt_logprobs)
    )


def test_nobody_learns_what_another_owner_has_sent(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    wanted = job(prompt_of(100))
    run(sampler, replace(wanted, group="anna"))
    assert run(sampler, replace(wanted, group="berta")).cached_prompt_tokens == 0
    assert run(sampler, replace(wanted, group="anna")).cached_prompt_tokens == 96


def test_a_version_keeps_its_own_and_takes_it_along_when_it_is_retired(
    make_sampler: MakeSampler,
) -> None:
    sampler = make_sampler()
    pool = sampler._runner.tables.pool  # type: ignore[attr-defined]
    wanted = job(prompt_of(100))
    run(sampler, wanted)
    base = pool.num_kept
    assert run(sampler, replace(wanted, version="narrow")).cached_prompt_tokens == 0
    assert run(sampler, replace(wanted, version="narrow")).cached_prompt_tokens == 96
    sampler.submit("last", replace(wanted, version="narrow"))
    sampler.retire("narrow")
    run_all(sampler, {})
    assert pool.num_kept == base
    assert run(sampler, wanted).cached_prompt_tokens == 96


def test_kept_blocks_go_when_others_need_their_memory(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(cache_tokens=256)
    older, newer = (job(prompt_of(64, seed), max_tokens=1) for seed in (1, 2))
    run_all(sampler, {"older": older, "newer": newer})
    run(sampler, job(prompt_of(180, 3), max_tokens=8))  # four free blocks and two others
    assert run(sampler, newer).cached_prompt_tokens == 32
    assert run(sampler, older).cached_prompt_tokens == 0
