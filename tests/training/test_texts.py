"""The worker's loop while text is tokenized elsewhere: nobody waits for another user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from django.contrib.auth.models import User

from futures.models import Future
from futures.payload import decode, encode
from tests.conftest import InProcessWorker
from tests.training.odd_text import SlowText
from tests.waiting import LONG_SECONDS, wait_for
from training.kinds import Sample
from training.services import optim_step_submit, sample_submit
from training.types import AdamParams, SamplingParams
from training.worker import claims, short_texts, texts
from training.worker.text_pool import TextPool
from training.worker.text_process import TextTask

Submit = Callable[..., Future]


@pytest.fixture
def pool() -> Iterator[TextPool]:
    """Two processes that have started, so that a limit of seconds is none of their start."""
    made = TextPool(SlowText())
    hi = Sample(prompts=["hi"], num_samples=1, sampling_params=SamplingParams())
    payload = encode(hi.to_payload())
    short = TextTask(hi.kind, payload, max_context_tokens=10, seconds=LONG_SECONDS)
    for owner in ("ada", "eve"):
        made.submit(owner, owner, short)
    wait_for(lambda: made.answers(wait_seconds=1.0) and made.num_pending == 0)
    yield made
    made.close()


@pytest.fixture
def work(
    start_worker: Callable[..., InProcessWorker],
    pool: TextPool,
    monkeypatch: pytest.MonkeyPatch,
) -> InProcessWorker:
    """A worker that sends every text to the pool."""
    monkeypatch.setattr(short_texts, "CHARACTERS", 0)
    work = start_worker(text_pool=pool)
    work.loop._texts._seconds = 2.0
    return work


def sample(owner: User, prompt: str) -> Future:
    return sample_submit(
        owner_id=owner.pk,
        model_id=None,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_path=None,
        prompts=[prompt],
        num_samples=1,
        sampling_params=SamplingParams(max_tokens=3, seed=1),
    ).future


def finished(*futures: Future) -> list[str]:
    """The states, in the order in which the futures were finished."""
    for future in futures:
        future.refresh_from_db()
    return [f.state for f in sorted(futures, key=lambda f: f.finished_at or f.created_at)]


def test_a_text_that_takes_long_fails_by_name_and_holds_up_nobody(
    work: InProcessWorker, owner: User, forward_backward: Submit
) -> None:
    eve = User.objects.create_user("eve")
    slow = forward_backward("evil", "forever", "no", owner_id=eve.pk)
    step = optim_step_submit(owner_id=eve.pk, model_id="evil", adam_params=AdamParams()).future
    trained = forward_backward("m", "hi", "yes")
    sampled = sample(owner, "hello")
    work()
    assert finished(slow, step, trained, sampled) == ["ready", "ready", "failed", "ready"]
    assert "took more than 2 seconds to become tokens" in slow.error
    order = Future.objects.filter(pk__in=[slow.pk, step.pk]).order_by("finished_at", "seq_id")
    assert list(order) == [slow, step], "what is behind it in its lane waited"


def test_tokens_are_the_same_wherever_they_are_made(
    start_worker: Callable[..., InProcessWorker],
    pool: TextPool,
    owner: User,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a worker without a pool, by one with a pool for a short text, and by the pool."""
    sampled = []
    for text_pool, characters in ((None, 0), (pool, 100), (pool, 0)):
        monkeypatch.setattr(short_texts, "CHARACTERS", characters)
        work = start_worker(text_pool=text_pool)
        future = sample(owner, "hello")
        work()
        future.refresh_from_db()
        sampled.append(decode(bytes(future.result or b""))["tokens"].tolist())
    assert sampled[0] == sampled[1] == sampled[2]


def test_short_texts_need_no_process(
    start_worker: Callable[..., InProcessWorker],
    pool: TextPool,
    owner: User,
    forward_backward: Submit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "submit", None)
    work = start_worker(text_pool=pool)
    futures = [sample(owner, "hello"), forward_backward("m", "hi", "yes"), sample(owner, "")]
    work()
    assert sorted(finished(*futures)) == ["failed", "ready", "ready"]
    assert futures[2].error == "prompt: empty"


def test_a_cancelled_short_text_is_forgotten(
    start_worker: Callable[..., InProcessWorker], pool: TextPool, owner: User
) -> None:
    work = start_worker(text_pool=pool)
    future = sample(owner, "hello")
    work.loop._claims.take()
    work.loop._texts.forget([future.id])
    assert not work.loop._texts._answers
    assert not work.loop._texts._requests


def test_requests_claimed_together_share_a_pass_when_their_texts_are_short(
    work: InProcessWorker, forward_backward: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "COMPANY_SECONDS", LONG_SECONDS)
    futures = [forward_backward("m", f"hi {number}", "yes") for number in range(4)]
    work()
    for future in futures:
        future.refresh_from_db()
    assert len({future.batch for future in futures}) == 1


def test_text_that_waits_holds_up_no_claim(work: InProcessWorker, owner: User) -> None:
    """Independently of size: only futures that can run count as held."""
    eve = User.objects.create_user("eve")
    long = [sample(eve, "forever " * 20_000) for _ in range(2)]
    work.loop._claims.take()
    assert work.loop._scheduler.held_cost == 0
    short = sample(owner, "hello")
    work()
    assert finished(*long, short)[0] == "ready"


@pytest.mark.parametrize("full", ["OWNER_TEXT_BYTES", "PENDING_TEXT_BYTES"])
def test_much_text_of_one_user_keeps_nobody_else_from_being_claimed(
    work: InProcessWorker, owner: User, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """Within an owner's limit and the common one; futures behind the text are not forgotten."""
    monkeypatch.setattr(texts, full, 10)
    eve = User.objects.create_user("eve")
    slow = sample(eve, "forever " * 1000)
    work.loop._claims.take()
    assert Future.objects.get(pk=slow.pk).state == "running"
    behind, other = sample(eve, "hello"), sample(owner, "hello")
    work.loop._claims.take()
    assert [Future.objects.get(pk=f.pk).state for f in (behind, other)] == ["pending", "running"]
    work()
    assert sorted(finished(slow, behind, other)) == ["failed", "ready", "ready"]
    assert max((slow, behind, other), key=lambda f: f.finished_at) == behind
