"""A tenant's training does not affect another's: the same numbers, alone or with batch-mates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from futures.models import Future
from futures.payload import decode, encode
from tests.conftest import InProcessWorker
from tests.isolation.conftest import Tenant
from training.engine.fake.engine import fake_engine
from training.engine.fake.trainer import ADAPTER_BYTES
from training.models import Run

Request = tuple[str, dict[str, Any]]


def turn(text: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]]


def script(name: str, words: Sequence[str], rate: float) -> list[Request]:
    """A separate training run, in the quick reference's dialect, with samples."""
    model = {"model_id": name}
    requests: list[Request] = []
    for number, word in enumerate(words):
        requests += [
            ("/fwdbwd", {**model, "data": turn(word)}),
            ("/fwdbwd", {**model, "data": turn(word + "!")}),
            ("/optim_step", {**model, "adam_params": {"learning_rate": rate}}),
            (
                "/api/v1/asample",
                {
                    **model,
                    "prompt": word,
                    "sampling_params": {"seed": number, "max_tokens": 8, "temperature": 1},
                },
            ),
        ]
    return requests


ZELDA = script("m", ["link", "hyrule", "triforce"], 0.1)
BOB = script("m", ["sponge", "patrick", "squid", "crab"], 0.7)


def play(tenant: Tenant, requests: Sequence[Request]) -> list[str]:
    """Submit them in order; the ids of their futures."""
    ids = []
    for path, body in requests:
        answer = tenant.ask("POST", path, body)
        assert answer.status_code == 200, answer.content
        ids.append(str(answer.json()["request_id"]))
    return ids


def results(ids: Sequence[str]) -> list[bytes]:
    """The stored results of each, to the bit."""
    rows = Future.objects.in_bulk(ids)
    assert {row.state for row in rows.values()} == {"ready"}
    return [bytes(rows[request_id].result or b"") for request_id in ids]


def state(work: InProcessWorker, tenant: Tenant) -> dict[str, Any]:
    """Weights, gradient, moments and step of the tenant's model."""
    run = Run.objects.get(owner_id=tenant.user_id, name="m")
    return work.engine.trainer.adapter_state(work.loop.adapter_cache.bring_run(run))


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in one.keys() | other.keys():
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture
def alone(
    tenant: Callable[[str], Tenant], work: InProcessWorker
) -> tuple[list[bytes], dict[str, Any]]:
    """The results of Zelda's script without other tenants, for comparison."""
    twin = tenant("twin")
    ids = play(twin, [*ZELDA, ("/fwdbwd", {"model_id": "m", "data": turn("half a step")})])
    work()
    return results(ids), state(work, twin)


@pytest.mark.parametrize("order", ["before", "after", "in turns"])
def test_a_run_is_the_same_to_the_bit_whoever_trains_beside_it(
    tenant: Callable[[str], Tenant],
    work: InProcessWorker,
    alone: tuple[list[bytes], dict[str, Any]],
    order: str,
) -> None:
    zelda, bob = tenant("zelda"), tenant("bob")
    mine = [*ZELDA, ("/fwdbwd", {"model_id": "m", "data": turn("half a step")})]
    if order == "before":
        play(bob, BOB)
        ids = play(zelda, mine)
    elif order == "after":
        ids = play(zelda, mine)
        play(bob, BOB)
    else:
        ids = []
        for index in range(max(len(mine), len(BOB))):
            play(bob, BOB[index : index + 1])
            ids += play(zelda, mine[index : index + 1])
    work()
    assert results(ids) == alone[0]
    assert_equal(state(work, zelda), alone[1])


def test_anothers_optimizer_step_leaves_a_gradient_where_it_was(
    tenant: Callable[[str], Tenant], work: InProcessWorker
) -> None:
    zelda, bob = tenant("zelda"), tenant("bob")
    play(zelda, ZELDA[:2])
    work()
    gradient = state(work, zelda)["grad"].copy()
    assert gradient.any()
    play(bob, BOB)
    work()
    assert_equal({"grad": gradient}, {"grad": state(work, zelda)["grad"]})
    assert state(work, zelda)["step"] == 0


def test_anothers_bad_request_in_the_same_batch_fails_alone(
    tenant: Callable[[str], Tenant],
    work: InProcessWorker,
    alone: tuple[list[bytes], dict[str, Any]],
) -> None:
    zelda, bob = tenant("zelda"), tenant("bob")
    targets = {"target_tokens": [1, 2, 3], "weights": [1, 1, 1]}
    unknown_token = [{"model_input": [1, 10**6, 2], "loss_fn_inputs": targets}]
    [bad] = play(bob, [("/fwdbwd", {"model_id": "m", "data": unknown_token})])
    ids = play(zelda, [*ZELDA, ("/fwdbwd", {"model_id": "m", "data": turn("half a step")})])
    work()
    assert Future.objects.get(pk=bad).state == "failed"
    assert results(ids) == alone[0]
    assert_equal(state(work, zelda), alone[1])


def test_eviction_by_anothers_adapter_loses_nothing(
    tenant: Callable[[str], Tenant],
    start_worker: Callable[..., InProcessWorker],
    alone: tuple[list[bytes], dict[str, Any]],
) -> None:
    work = start_worker(fake_engine(adapter_bytes=ADAPTER_BYTES))
    zelda, bob = tenant("zelda"), tenant("bob")
    ids = []
    for index in range(0, len(ZELDA), 4):
        ids += play(zelda, ZELDA[index : index + 4])
        work()
        play(bob, BOB[index : index + 4])
        work()
    ids += play(zelda, [("/fwdbwd", {"model_id": "m", "data": turn("half a step")})])
    work()
    assert results(ids) == alone[0]
    assert_equal(state(work, zelda), alone[1])


def test_removing_a_model_leaves_anothers_of_the_same_name(
    tenant: Callable[[str], Tenant], work: InProcessWorker
) -> None:
    zelda, bob = tenant("zelda"), tenant("bob")
    play(zelda, ZELDA)
    play(bob, BOB)
    work()
    before = {name: np.copy(value) for name, value in state(work, zelda).items()}
    play(bob, [("/remove_lora", {"model_id": "m"})])
    work()
    assert_equal(state(work, zelda), before)
    assert not Run.objects.live().filter(owner_id=bob.user_id).exists()


def test_a_replay_after_a_crash_takes_ones_own_log_only(
    tenant: Callable[[str], Tenant], start_worker: Callable[..., InProcessWorker]
) -> None:
    work = start_worker()
    zelda, bob = tenant("zelda"), tenant("bob")
    play(zelda, ZELDA)
    play(bob, BOB)
    work()
    before = {name: np.copy(value) for name, value in state(work, zelda).items()}
    work.die()
    steps: list[str] = []
    fresh = start_worker(
        fake_engine(before_verb=lambda verb, names: steps.append(verb) if names else None)
    )
    assert_equal(state(fresh, zelda), before)
    assert steps.count("optim_step") == len(ZELDA) // 4


def test_a_seed_of_ones_own_gives_the_same_text_whatever_another_samples(
    tenant: Callable[[str], Tenant], work: InProcessWorker, base_model: str
) -> None:
    zelda, bob = tenant("zelda"), tenant("bob")
    sample = {
        "base_model": base_model,
        "prompt": "once",
        "sampling_params": {"seed": 7, "max_tokens": 16},
    }
    [first] = play(zelda, [("/api/v1/asample", sample)])
    work()
    others = {**sample, "num_samples": 3, "sampling_params": {"max_tokens": 16}}
    play(bob, [("/api/v1/asample", others)])
    [again] = play(zelda, [("/api/v1/asample", sample)])
    [same_seed] = play(bob, [("/api/v1/asample", sample)])
    work()
    one, two, three = results([first, again, same_seed])
    assert two == three  # each has sampled from its prompt before
    without_count = decode(two)
    assert without_count.pop("cached_prompt_tokens") > 0
    assert encode(without_count) == one
