"""What a server is asked for, what is left to the built-in sampler, and that both mean the same.

All of it runs with a double and, marked ``vllm``, with vLLM itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.contract.conftest import step
from tests.engine.sampling_jobs import job
from tests.engine.vllm.double import VllmDouble
from tests.engine.vllm.engines import Server, engine_with_server
from tests.engine.vllm.test_server_failures import here
from training.engine.factory import engine_over
from training.engine.interface import Engine, SampleJob, SampleOutput
from training.engine.torch.base_model import BaseModel
from training.engine.vllm.requests import sequence_seed
from training.types import LoraConfig, ScoringParams
from training.vllm_server import MAX_LOGPROBS

TOLERANCE = 1e-4
"""In nats: rounding in float32, of adapters that change much."""


@pytest.fixture(params=["server", pytest.param("vllm", marks=pytest.mark.vllm)])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """An engine with a server and one without, with the same version ``v`` of an adapter."""
    model = "wide" if request.param == "vllm" else "tied"
    server: Server = request.getfixturevalue(f"{request.param}_of_{model}")
    base_model: BaseModel = request.getfixturevalue(f"{model}_base_model")
    engine = engine_with_server(base_model, server, tmp_path / "server")
    built_in = engine_over(base_model)
    built_in.trainer.create_adapter("a", LoraConfig(rank=2, seed=1))
    for _ in range(2):
        step(built_in.trainer, "a")
    for each in (engine, built_in):
        each.sampler.publish("v", built_in.trainer.capture_adapter("a"))
    yield engine, built_in
    engine.sampler.close()


def answer(engine: Engine, one: SampleJob) -> SampleOutput:
    engine.sampler.submit("one", one)
    while True:
        if result := engine.sampler.poll(60):
            assert isinstance(result["one"], SampleOutput), result
            return result["one"]


def scored(engine: Engine, one: SampleJob, output: SampleOutput) -> list[list[float]]:
    """The log-probability of each sampled token, computed here by reading it."""
    found = []
    for sequence in output.sequences:
        read = job(
            [*one.prompt.tolist(), *sequence.tokens],
            version=one.version,
            max_tokens=0,
            prompt_logprobs=True,
        )
        logprobs = answer(engine, read).prompt_logprobs
        assert logprobs is not None
        found.append(logprobs[len(one.prompt) :])
    return found


@pytest.mark.parametrize("version", [None, "v"])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_sampled_log_probabilities_are_those_of_the_trainers_model(
    both: tuple[Engine, Engine], version: str | None, temperature: float
) -> None:
    engine, built_in = both
    asked = job(version=version, num_samples=3, temperature=temperature, max_tokens=40)
    output = answer(engine, asked)
    assert not here(engine)
    for sequence, expected in zip(output.sequences, scored(built_in, asked, output), strict=True):
        assert len(sequence.tokens) == 40
        np.testing.assert_allclose(sequence.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_tempered_log_probabilities_are_of_the_whole_tempered_distribution(
    both: tuple[Engine, Engine], temperature: float
) -> None:
    """By the formula, from the untempered log-probabilities of all tokens."""
    engine, built_in = both
    vocab_size = built_in.trainer.info.vocab_size
    asked = job(version="v", temperature=temperature, max_tokens=1)
    output = answer(engine, asked)
    assert not here(engine)
    everything = replace(
        job(version="v", max_tokens=1), scoring=ScoringParams(topk_sample_logprobs=vocab_size)
    )
    top = answer(built_in, everything).sequences[0].top
    assert top is not None
    logprobs = np.zeros(vocab_size)
    logprobs[top.token_ids[0]] = top.logprobs[0]
    tempered = logprobs / temperature
    tempered -= np.logaddexp.reduce(tempered)
    (sequence,) = output.sequences
    assert sequence.logprobs == pytest.approx([tempered[sequence.tokens[0]]], abs=TOLERANCE)


def test_greedy_tokens_are_the_same_here_and_there(both: tuple[Engine, Engine]) -> None:
    engine, built_in = both
    asked = job(version="v", temperature=0.0, max_tokens=60)
    assert answer(engine, asked).sequences[0].tokens == answer(built_in, asked).sequences[0].tokens


@pytest.mark.parametrize("last_n", [None, 2])
def test_prompt_scores_are_the_same_here_and_there(
    both: tuple[Engine, Engine], last_n: int | None
) -> None:
    engine, built_in = both
    asked = replace(
        job(np.arange(3, 40).tolist(), version="v", prompt_logprobs=True, num_samples=2),
        scoring=ScoringParams(topk_prompt_logprobs=4, prompt_logprobs_last_n=last_n),
    )
    theirs, ours = answer(engine, asked), answer(built_in, asked)
    assert not here(engine)
    np.testing.assert_allclose(theirs.prompt_logprobs, ours.prompt_logprobs, atol=TOLERANCE)
    assert theirs.scores.top is not None
    assert ours.scores.top is not None
    np.testing.assert_array_equal(theirs.scores.top.token_ids, ours.scores.top.token_ids)
    np.testing.assert_allclose(theirs.scores.top.logprobs, ours.scores.top.logprobs, atol=1e-4)


@pytest.mark.parametrize("is_followed", [False, True])
def test_likely_tokens_are_complete_and_of_the_tempered_distribution(
    both: tuple[Engine, Engine], is_followed: bool
) -> None:
    engine, built_in = both
    asked = replace(
        job(version="v", temperature=0.0, max_tokens=20),
        scoring=ScoringParams(topk_sample_logprobs=3),
        is_followed=is_followed,
    )
    theirs, ours = answer(engine, asked).sequences[0], answer(built_in, asked).sequences[0]
    assert theirs.tokens == ours.tokens
    assert theirs.top is not None
    assert ours.top is not None
    np.testing.assert_array_equal(theirs.top.token_ids, ours.top.token_ids)
    np.testing.assert_allclose(theirs.top.logprobs, ours.top.logprobs, atol=1e-4)

    hot = replace(
        job(version="v", temperature=1.7, max_tokens=30, num_samples=4),
        scoring=ScoringParams(topk_sample_logprobs=3),
    )
    for sequence in answer(engine, hot).sequences:  # most sampled tokens are not among the three
        assert sequence.top is not None
        assert sequence.top.logprobs.shape == (30, 3)
        assert (np.diff(sequence.top.logprobs, axis=1) <= 0).all()
        assert (sequence.top.logprobs > -100).all()


@pytest.mark.parametrize("is_followed", [False, True])
@pytest.mark.parametrize("scores", [False, True])
def test_a_stop_string_ends_a_sequence_by_its_text(
    both: tuple[Engine, Engine], is_followed: bool, scores: bool
) -> None:
    engine, _ = both
    free = job(version="v", max_tokens=60, num_samples=2)
    free_output = answer(engine, free)
    text = free_output.sequences[0].text
    stop = text[10:13]
    first = text.index(stop)
    stopped = replace(
        job(
            version="v",
            max_tokens=60,
            num_samples=2,
            stop=(stop,),
            prompt_logprobs=scores,
            ignore_eos=True,
        ),
        is_followed=is_followed,
    )
    output = answer(engine, stopped)
    assert not here(engine)
    assert output.sequences[0].text == text[:first]
    assert output.sequences[0].stop_reason == "stop"
    length = len(output.sequences[0].tokens)
    assert output.sequences[0].tokens == free_output.sequences[0].tokens[:length]
    assert (output.prompt_logprobs is not None) == scores


def test_end_tokens_are_ours(both: tuple[Engine, Engine]) -> None:
    engine, _ = both
    free = answer(engine, job(version="v", max_tokens=60)).sequences[0].tokens
    last = free[20]
    ended = answer(engine, job(version="v", max_tokens=60, stop=(last,))).sequences[0]
    assert ended.tokens == free[: free.index(last) + 1]
    assert ended.stop_reason == "stop"
    assert len(ended.logprobs) == len(ended.tokens)
    hidden = answer(engine, job(version="v", max_tokens=60, stop_token_ids=(last,))).sequences[0]
    assert hidden.tokens == ended.tokens
    assert len(hidden.text) < len(ended.text)


def test_reading_a_prompt_samples_nothing(both: tuple[Engine, Engine]) -> None:
    engine, _ = both
    output = answer(engine, job(max_tokens=0, prompt_logprobs=True, num_samples=2))
    assert not here(engine)
    assert [sequence.tokens for sequence in output.sequences] == [[], []]
    assert output.prompt_logprobs is not None


def test_a_job_may_fill_the_whole_context(both: tuple[Engine, Engine]) -> None:
    engine, _ = both
    prompt = [7] * 500
    assert len(answer(engine, job(prompt, max_tokens=None)).sequences[0].tokens) == 12
    assert not here(engine)
    full = job([7] * 512, max_tokens=0, prompt_logprobs=True)
    assert answer(engine, full).sequences[0].tokens == []
    assert here(engine) == {"a prompt without room for one more token": 1}


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"logit_bias": ((5, 2.0),)},
        {"temperature": 0.005},
    ],
)
def test_what_the_server_defines_otherwise_is_computed_here(
    both: tuple[Engine, Engine], params: dict[str, object]
) -> None:
    engine, built_in = both
    asked = job(version="v", **params)
    theirs, ours = answer(engine, asked).sequences, answer(built_in, asked).sequences
    assert [(s.tokens, s.logprobs) for s in theirs] == [(s.tokens, s.logprobs) for s in ours]
    assert sum(here(engine).values()) == 1


@pytest.mark.parametrize(
    "scoring",
    [
        ScoringParams(target_prompt_logprobs=np.full((4, 2), 3)),
        ScoringParams(prompt_alt_tokens_k=2),
        ScoringParams(topk_sample_logprobs=MAX_LOGPROBS + 1),
        ScoringParams(topk_prompt_logprobs=MAX_LOGPROBS + 1),
    ],
)
def test_scores_that_the_server_does_not_have_are_computed_here(
    both: tuple[Engine, Engine], scoring: ScoringParams
) -> None:
    engine, _ = both
    answer(engine, replace(job(), scoring=scoring))
    assert sum(here(engine).values()) == 1


def test_greedy_jobs_with_a_cut_go_to_the_server(both: tuple[Engine, Engine]) -> None:
    engine, built_in = both
    asked = job(version="v", temperature=0.0, top_p=0.9, top_k=3)
    assert answer(engine, asked).sequences[0].tokens == answer(built_in, asked).sequences[0].tokens
    assert not here(engine)


def test_samples_of_neighbouring_seeds_are_different(both: tuple[Engine, Engine]) -> None:
    """vLLM's own sample i of seed s is its sample i - 1 of seed s + 1."""
    engine, _ = both
    found = [
        tuple(sequence.tokens)
        for seed in (3, 4, -3)
        for sequence in answer(engine, job(seed=seed, num_samples=3)).sequences
    ]
    assert len(set(found)) == 9


def test_seeds_are_whole_numbers_that_the_server_takes() -> None:
    seeds = {
        sequence_seed(seed, number) for seed in (0, 1, -1, 2**63, -(2**70)) for number in range(4)
    }
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_prompts_are_kept_apart_by_user(both: tuple[Engine, Engine]) -> None:
    engine, _ = both
    asked = job((np.arange(300) % 200 + 3).tolist())
    cached = [
        answer(engine, replace(asked, group=group)).cached_prompt_tokens
        for group in ("anna", "anna", "berta")
    ]
    assert cached[0] == cached[2] == 0
    assert 0 < cached[1] < 300


def test_more_prompts_than_one_step_reads_do_not_end_the_server(
    both: tuple[Engine, Engine],
) -> None:
    engine, _ = both
    jobs = {
        str(number): job((np.arange(400) * number % 200 + 3).tolist(), max_tokens=2)
        for number in range(1, 41)
    }
    for key, one in jobs.items():
        engine.sampler.submit(key, one)
    results: dict[str, object] = {}
    while engine.sampler.active:
        results |= engine.sampler.poll(60)
    assert all(isinstance(result, SampleOutput) for result in results.values())
    assert len(results) == len(jobs)
    figures = engine.sampler.figures()["vllm"]
    assert figures["life"] == 1
    assert not figures["sampled_here"]


def test_a_cancelled_job_leaves_the_server(server: VllmDouble, engine_of_server: Engine) -> None:
    sampler = engine_of_server.sampler
    answer(engine_of_server, job())
    server.hold.clear()
    server.holds.clear()
    sampler.submit("one", job())
    assert server.holds.wait(60)
    sampler.cancel("one")
    server.hold.set()
    answer(engine_of_server, job())
    assert server.requests[-2]["request_id"] in [
        name.removeprefix("generate-tokens-") for name in server.aborted
    ]
