"""The job and the plan of kills are fixed by a seed and complete."""

from __future__ import annotations

from collections import Counter

import pytest

from tinkerapi.drill.job import STYLES, Request, make_job, num_requests
from tinkerapi.drill.kills import TARGETS, TARGETS_WITH_VLLM, plan_kills
from tinkerapi.drill.moments import MOMENTS


def requests(seed: int) -> list[Request]:
    job = make_job(seed=seed, steps=20, trainees=6)
    return [request for trainee in job for request in trainee.requests]


def test_a_seed_fixes_the_job_to_the_last_token() -> None:
    assert requests(1) == requests(1)
    assert requests(1) != requests(2)


def test_no_two_requests_share_a_name() -> None:
    names = [request.name for request in requests(1)]
    assert len(set(names)) == len(names) == num_requests(make_job(seed=1, steps=20, trainees=6))


def test_every_style_trains_samples_saves_and_goes_back() -> None:
    job = make_job(seed=1, steps=20, trainees=6)
    assert {(trainee.style, trainee.owner) for trainee in job} == {
        (style, owner) for style in STYLES for owner in (0, 1)
    }
    for trainee in job:
        kinds = {request.kind for request in trainee.requests}
        wanted = {"create", "forward_backward", "optim_step", "save", "load", "keep", "sample_kept"}
        assert kinds - {"sample"} == wanted
        assert ("sample" in kinds) == (trainee.style != "numbered")


def test_what_is_loaded_was_saved_in_an_earlier_step() -> None:
    for trainee in make_job(seed=1, steps=40, trainees=3):
        saved: set[str] = set()
        for step in trainee.steps:
            loads = [request.fields["name"] for request in step if request.kind == "load"]
            assert saved.issuperset(loads)
            saved |= {request.fields["name"] for request in step if request.kind == "save"}


def test_a_seed_fixes_the_plan() -> None:
    assert plan_kills(seed=1, kills=20, requests=500) == plan_kills(seed=1, kills=20, requests=500)
    assert plan_kills(seed=1, kills=20, requests=500) != plan_kills(seed=2, kills=20, requests=500)


def test_a_hundred_kills_hit_each_target_in_its_share_at_every_moment() -> None:
    plan = plan_kills(seed=3, kills=100, requests=5000)
    assert Counter(kill.target for kill in plan) == TARGETS
    with_vllm = plan_kills(seed=3, kills=100, requests=5000, shares=TARGETS_WITH_VLLM)
    assert Counter(kill.target for kill in with_vllm) == TARGETS_WITH_VLLM
    assert {kill.moment for kill in plan} == set(MOMENTS)


@pytest.mark.parametrize("kills", [0, 1, 7, 10, 33])
def test_the_plan_has_as_many_kills_as_were_asked_for_in_order(kills: int) -> None:
    plan = plan_kills(seed=0, kills=kills, requests=100)
    places = [kill.after_answers for kill in plan]
    assert len(plan) == kills
    assert places == sorted(places)
    assert all(place < 90 for place in places)
