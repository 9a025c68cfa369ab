"""The order in which jobs start if not all fit at once."""

from __future__ import annotations

from dataclasses import replace

from tests.engine.sampling_jobs import MakeSampler, job
from training.engine.interface import SampleOutput
from training.engine.sampler.continuous_batching import ContinuousSampler


def order_of_ends(sampler: ContinuousSampler) -> list[str]:
    """Keys in the order in which their jobs end; those of one step in any order."""
    ended: list[str] = []
    while sampler.active:
        results = sampler.poll(0)
        assert all(isinstance(result, SampleOutput) for result in results.values())
        ended += results
    return ended


def test_one_job_passes_a_long_queue_of_another_group(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(max_sequences=4)
    for number in range(20):
        sampler.submit(f"greedy-{number}", replace(job(seed=number), group="greedy"))
    sampler.poll(0)
    sampler.submit("modest", replace(job(), group="modest"))

    ended = order_of_ends(sampler)

    # Four were under way; it is among the four that follow them.
    assert ended.index("modest") < 8
    assert len(ended) == 21


def test_groups_share_what_there_is(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(max_sequences=4)
    for group in ("a", "b"):
        for number in range(6):
            sampler.submit(f"{group}{number}", replace(job(seed=number), group=group))

    ended = order_of_ends(sampler)

    for first in range(0, 12, 4):
        assert sorted(key[0] for key in ended[first : first + 4]) == ["a", "a", "b", "b"]


def test_a_group_of_its_own_keeps_its_order(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(max_sequences=1)
    for number in range(4):
        sampler.submit(str(number), job(seed=number))

    assert order_of_ends(sampler) == ["0", "1", "2", "3"]


def test_a_large_job_is_not_passed_by_for_ever(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(max_sequences=4)
    for number in range(8):
        sampler.submit(f"small-{number}", replace(job(seed=number), group="small"))
    sampler.poll(0)
    sampler.submit("large", replace(job(num_samples=4), group="large"))

    assert order_of_ends(sampler).index("large") == 4


def test_turns_change_no_text(make_sampler: MakeSampler) -> None:
    jobs = {f"{group}{n}": replace(job(seed=n), group=group) for group in "ab" for n in range(3)}
    texts = []
    for max_sequences in (2, 64):
        sampler = make_sampler(max_sequences=max_sequences)
        for key, each in jobs.items():
            sampler.submit(key, each)
        found: dict[str, list[int]] = {}
        while sampler.active:
            for key, result in sampler.poll(0).items():
                assert isinstance(result, SampleOutput)
                found[key] = list(result.sequences[0].tokens)
        texts.append(found)
    assert texts[0] == texts[1]
