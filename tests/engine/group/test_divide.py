"""How the datums of a pass are divided among ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from training.engine.interface import ForwardBackwardJob
from training.engine.torch.packing.plan import PlannedJob
from training.engine.torch.sharding.share_of_pass import divide
from training.types import Datum

MakeDatum = Callable[..., Datum]


@pytest.fixture
def plan(make_datum: MakeDatum) -> Callable[..., PlannedJob]:
    def make(*lengths: int, adapter_name: str = "a", loss_fn: str = "cross_entropy") -> PlannedJob:
        job = ForwardBackwardJob(
            adapter_name=adapter_name, data=[make_datum(n) for n in lengths], loss_fn=loss_fn
        )
        return PlannedJob(job=job, config={}, part=(adapter_name, 0))

    return make


def indices(jobs: list[PlannedJob], num_ranks: int) -> list[list[int]]:
    """By job, the indices of all its datums, in the order of ranks."""
    shares = divide(jobs, num_ranks)
    return [sorted(i for share in shares for i in share.get(each, ())) for each in jobs]


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_each_datum_goes_to_one_rank(plan: Callable[..., PlannedJob], num_ranks: int) -> None:
    jobs = [plan(5), plan(3, 900, 4), plan(*range(1, 30)), plan(7, 7, adapter_name="b")]
    assert indices(jobs, num_ranks) == [[0], [0, 1, 2], [*range(29)], [0, 1]]


def test_ranks_get_about_as_many_tokens(plan: Callable[..., PlannedJob]) -> None:
    job = plan(10, 10, 10, 10, 400, 10, 10, 10, 10)
    tokens = [
        sum(len(job.job.data[i].model_input) for i in share[job]) for share in divide([job], 2)
    ]
    assert sorted(tokens) == [40, 440]
    even = plan(*[30] * 10)
    assert [len(share[even]) for share in divide([even], 2)] == [5, 5]


def test_requests_of_one_datum_take_turns(plan: Callable[..., PlannedJob]) -> None:
    jobs = [plan(20) for _ in range(6)]
    numbers = [sum(len(share[each]) for each in jobs) for share in divide(jobs, 2)]
    assert numbers == [3, 3]


def test_other_adapters_do_not_change_an_adapters_ranks(plan: Callable[..., PlannedJob]) -> None:
    own = [plan(4, 9, 2), plan(6)]
    others = [plan(8, adapter_name="b"), plan(3, 3, 3, adapter_name="c")]
    alone = divide(own, 2)
    mixed = divide([others[0], own[0], others[1], own[1]], 2)
    assert [[share[each] for each in own] for share in alone] == [
        [share[each] for each in own] for share in mixed
    ]


def test_a_clients_own_loss_stays_together(plan: Callable[..., PlannedJob]) -> None:
    job = plan(5, 6, 7, loss_fn="custom")
    first, second = divide([job], 2)
    assert list(first[job]) == [0, 1, 2]
    assert job not in second
