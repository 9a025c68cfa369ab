"""The contract of every sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.contract.conftest import PROMPT, step
from training.engine.interface import Engine, SampleJob, SampleOutput, Sampler
from training.errors import (
    CheckpointNotFound,
    ContextLengthExceeded,
    InvalidRequest,
    TrainingError,
)
from training.types import SampledSequence, SamplingParams

LONG_SECONDS = 60.0
"""More than any of these jobs takes: a poll that would wait for it makes the test hang."""


def job(version: str | None = None, *, num_samples: int = 2, **params: object) -> SampleJob:
    defaults = {"max_tokens": 20, "seed": 3, "stop": ()}
    return SampleJob(
        prompt=np.array(PROMPT, np.int32),
        sampling_params=SamplingParams(**{**defaults, **params}),
        num_samples=num_samples,
        version=version,
    )


def run_all(sampler: Sampler, jobs: Mapping[str, SampleJob]) -> dict[str, list[SampledSequence]]:
    for key, each in jobs.items():
        sampler.submit(key, each)
    return finish(sampler)


def finish(sampler: Sampler) -> dict[str, list[SampledSequence]]:
    return {key: output.sequences for key, output in finish_outputs(sampler).items()}


def finish_outputs(sampler: Sampler) -> dict[str, SampleOutput]:
    """Poll until no job is active; each must end well, and be returned once."""
    found: dict[str, SampleOutput] = {}
    while sampler.active:
        for key, result in sampler.poll(LONG_SECONDS).items():
            assert isinstance(result, SampleOutput), result
            assert key not in found
            found[key] = result
    return found


def sample(sampler: Sampler, one: SampleJob) -> list[SampledSequence]:
    return run_all(sampler, {"one": one})["one"]


@pytest.fixture
def sampler(engine: Engine) -> Sampler:
    """Versions ``before`` and ``after`` of one adapter, which has taken further steps since."""
    for version in ("before", "after"):
        engine.sampler.publish(version, engine.trainer.capture_adapter("a", with_optimizer=False))
        step(engine.trainer, "a")
    return engine.sampler


# -- versions --------------------------------------------------------------------------------------


def test_a_version_is_what_the_adapter_was_when_it_was_captured(engine: Engine) -> None:
    captured = engine.trainer.capture_adapter("a", with_optimizer=False)
    engine.sampler.publish("at once", captured)
    expected = sample(engine.sampler, job("at once"))
    step(engine.trainer, "a")
    engine.sampler.publish("later", captured)
    engine.sampler.publish("new", engine.trainer.capture_adapter("a"))

    for version in ("at once", "later"):
        assert sample(engine.sampler, job(version)) == expected
    assert sample(engine.sampler, job("new")) != expected
    assert sample(engine.sampler, job(None)) != expected


def test_a_version_outlives_its_adapter(engine: Engine, sampler: Sampler) -> None:
    expected = sample(sampler, job("before"))
    engine.trainer.drop_adapter("a")
    assert sample(sampler, job("before")) == expected


def test_publishing_a_version_again_changes_nothing(engine: Engine, sampler: Sampler) -> None:
    expected = sample(sampler, job("before"))
    sampler.publish("before", engine.trainer.capture_adapter("a"))
    assert sample(sampler, job("before")) == expected


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_checkpoint_samples_as_the_adapter_that_wrote_it(
    engine: Engine, sampler: Sampler, tmp_path: Path, with_optimizer: bool
) -> None:
    sampler.publish("captured", engine.trainer.capture_adapter("a"))
    engine.trainer.save_adapter("a", tmp_path / "saved", with_optimizer=with_optimizer)
    step(engine.trainer, "a")
    sampler.publish("read", tmp_path / "saved")

    assert sample(sampler, job("read")) == sample(sampler, job("captured"))
    assert sorted(engine.trainer.adapter_names()) == ["a", "b"]


def test_a_folder_that_is_no_checkpoint_publishes_nothing(sampler: Sampler, tmp_path: Path) -> None:
    before = dict(sampler.versions)
    with pytest.raises(CheckpointNotFound):
        sampler.publish("read", tmp_path / "nowhere")
    assert sampler.versions == before
    with pytest.raises(InvalidRequest):
        sampler.submit("one", job("read"))


def test_a_version_that_is_retired_serves_its_jobs_to_their_end(sampler: Sampler) -> None:
    expected = sample(sampler, job("before"))
    sampler.submit("started", job("before"))
    sampler.poll(0)
    sampler.submit("submitted", job("before"))
    sampler.retire("before")

    assert sampler.versions["before"] == 2
    with pytest.raises(InvalidRequest, match="before"):
        sampler.submit("too late", job("before"))
    assert finish(sampler) == {"started": expected, "submitted": expected}
    assert "before" not in sampler.versions


def test_a_version_is_kept_until_it_is_retired(sampler: Sampler) -> None:
    for _ in range(2):
        sample(sampler, job("before"))
    assert sampler.versions == {"before": 0, "after": 0}
    sampler.retire("before")
    assert sampler.versions == {"after": 0}


def test_a_version_may_be_published_again_while_its_last_jobs_run(
    engine: Engine, sampler: Sampler
) -> None:
    expected = sample(sampler, job("before"))
    sampler.submit("old", job("before"))
    sampler.retire("before")
    sampler.publish("before", engine.trainer.capture_adapter("a"))

    assert run_all(sampler, {"new": job("before")}) == {"old": expected, "new": expected}
    assert sampler.versions["before"] == 0


def test_retiring_what_is_not_published_does_nothing(sampler: Sampler) -> None:
    sampler.retire("never published")
    assert sampler.versions == {"before": 0, "after": 0}


# -- jobs ------------------------------------------------------------------------------------------


def test_jobs_of_several_versions_run_together_as_each_does_alone(sampler: Sampler) -> None:
    jobs = {
        "base": job(None),
        "before": job("before"),
        "after": job("after", num_samples=1),
        "before too": job("before", seed=4, temperature=0.5),
    }
    alone = {key: sample(sampler, each) for key, each in jobs.items()}

    assert run_all(sampler, jobs) == alone
    assert alone["base"] != alone["before"]
    assert alone["before"][:1] != alone["after"]


def test_a_job_that_comes_later_is_what_it_is_alone(sampler: Sampler) -> None:
    expected = sample(sampler, job("after"))
    sampler.submit("first", job("before"))
    for _ in range(3):
        sampler.poll(0)
    assert run_all(sampler, {"later": job("after")})["later"] == expected


def test_a_sequence_depends_on_the_seed_and_its_number_only(sampler: Sampler) -> None:
    many = sample(sampler, job("before", num_samples=4))
    assert sample(sampler, job("before", num_samples=2)) == many[:2]
    assert sample(sampler, job("before", num_samples=4, seed=4)) != many
    assert len({tuple(sequence.tokens) for sequence in many}) == 4


def test_a_repeated_prompt_says_how_much_of_it_was_cached(sampler: Sampler) -> None:
    asked = replace(job("before", num_samples=4), prompt=np.arange(3, 103, dtype=np.int32))
    cached = []
    for group in ("anna", "anna", "berta"):
        sampler.submit("one", replace(asked, group=group))
        (output,) = finish_outputs(sampler).values()
        cached.append(output.cached_prompt_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] < 100  # not all samplers keep what they have read


def test_polling_without_an_active_job_returns_at_once(sampler: Sampler) -> None:
    assert sampler.poll(10 * LONG_SECONDS) == {}
    sample(sampler, job())
    assert sampler.poll(10 * LONG_SECONDS) == {}


def test_polling_without_time_gets_on_and_polling_with_time_returns_what_finished_first(
    sampler: Sampler,
) -> None:
    sampler.submit("long", job(max_tokens=200))
    sampler.submit("short", job(max_tokens=2))
    assert list(sampler.poll(LONG_SECONDS)) == ["short"]
    assert sampler.active == 1
    while sampler.active:
        sampler.poll(0)


def test_a_cancelled_job_is_forgotten(sampler: Sampler) -> None:
    kept = sample(sampler, job("before"))
    sampler.submit("kept", job("before"))
    sampler.submit("cancelled", replace(job("after", max_tokens=400), is_followed=True))
    finished: dict[str, Any] = {}
    while not any(sampler.progress("cancelled")):
        finished |= sampler.poll(0)

    assert 0 < sampler.cancel("cancelled") <= 2 * 400
    # A server computes both at the same time, and may finish the short one first.
    assert (sampler.active, sampler.versions["after"]) == (1 - len(finished), 0)
    early = {key: output.sequences for key, output in finished.items()}
    assert early | finish(sampler) == {"kept": kept}
    assert sampler.cancel("cancelled") == sampler.cancel("never submitted") == 0
    assert len(run_all(sampler, {"cancelled": job("after")})["cancelled"]) == 2  # the key is free


def test_nothing_is_counted_for_a_job_that_is_cancelled_before_its_turn(sampler: Sampler) -> None:
    sampler.submit("cancelled", job("after"))
    sampler.retire("after")
    assert sampler.cancel("cancelled") == 0
    assert sampler.versions == {"before": 0}
    assert sampler.poll(LONG_SECONDS) == {}


def test_a_key_names_one_job_at_a_time(sampler: Sampler) -> None:
    sampler.submit("one", job())
    with pytest.raises(ValueError, match="'one'"):
        sampler.submit("one", job())
    with pytest.raises(ValueError, match="'two'"):
        sampler.progress("two")
    assert sampler.active == 1


@pytest.mark.parametrize("stop", [(), ("never said!",)])
def test_what_is_told_of_a_job_is_a_beginning_of_what_it_turns_out_to_be(
    sampler: Sampler, stop: tuple[str, ...]
) -> None:
    sampler.submit("one", replace(job("before", stop=stop, max_tokens=40), is_followed=True))
    told = [sampler.progress("one")]
    while not (finished := sampler.poll(0)):
        told.append(sampler.progress("one"))

    output = finished["one"]
    assert isinstance(output, SampleOutput)
    assert len({tuple(texts) for texts in told}) > 3
    for number, sequence in enumerate(output.sequences):
        texts = [*(texts[number] for texts in told), sequence.text]
        assert texts[0] == ""
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def prompt_of(tokens: list[int]) -> SampleJob:
    params = SamplingParams(seed=1)
    return SampleJob(prompt=np.array(tokens, np.int32), sampling_params=params)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (prompt_of([]), InvalidRequest),
        (prompt_of([10**6]), InvalidRequest),
        (prompt_of([-1]), InvalidRequest),
        (prompt_of([1] * 513), ContextLengthExceeded),
        (job("never published"), InvalidRequest),
    ],
)
def test_a_refused_job_leaves_nothing_behind(
    sampler: Sampler, bad: SampleJob, error: type[TrainingError]
) -> None:
    expected = sample(sampler, job("before"))
    sampler.submit("good", job("before"))
    with pytest.raises(error):
        sampler.submit("bad", bad)

    assert (sampler.active, sampler.versions) == (1, {"before": 1, "after": 0})
    assert finish(sampler) == {"good": expected}
    assert run_all(sampler, {"bad": job("before")}) == {"bad": expected}  # the key is free


def test_the_caller_shows_its_life_while_it_polls(sampler: Sampler) -> None:
    signs: list[None] = []
    sampler.report_progress(lambda: signs.append(None))
    sample(sampler, job("before", max_tokens=200))
    assert len(signs) > 3


# -- memory ----------------------------------------------------------------------------------------


def test_sampling_leaves_the_trainer_as_it_was(
    engine: Engine, sampler: Sampler, same_state: Callable[..., None]
) -> None:
    expected = engine.trainer.adapter_state("a")
    sample(sampler, job("after"))
    same_state(engine.trainer.adapter_state("a"), expected)
