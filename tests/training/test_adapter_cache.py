"""Adapters in memory stay within a budget in bytes, and are evicted first if their client has
left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.utils import timezone

from futures.cancelling import future_cancel
from futures.models import Future
from futures.notify import Bell
from tests.conftest import InProcessWorker
from tests.training.test_worker import sample, save
from training import services
from training.engine.fake.engine import fake_engine
from training.engine.fake.trainer import ADAPTER_BYTES
from training.models import Checkpoint, Run, SamplingSession, Session
from training.types import LoraConfig, SamplingParams
from training.worker import loop

Submit = Callable[..., Future]
Result = Callable[..., dict[str, object]]
Start = Callable[..., InProcessWorker]

WEIGHTS_BYTES = ADAPTER_BYTES // 4


def in_memory(work: InProcessWorker) -> set[str]:
    """The names of the runs whose adapters are in memory."""
    return set(
        Run.objects.filter(id__in=work.engine.trainer.adapter_names()).values_list(
            "name", flat=True
        )
    )


def of_session(owner: User, name: str, **fields: object) -> Session:
    """A session, to which a run is given."""
    session = Session.objects.create(owner=owner, sdk_version="1", **fields)
    Run.objects.filter(name=name).update(session=session, model_seq_id=0)
    return session


def next_seq_id(name: str) -> int:
    """The number that the run's client would give its next request."""
    lane = Future.objects.filter(lane_id=Run.objects.get(name=name).id)
    return 1 + max(seq_id for seq_id in lane.values_list("seq_id", flat=True) if seq_id is not None)


@pytest.fixture
def checkpoints(
    start_worker: Start, owner: User, forward_backward: Submit, result: Result
) -> list[str]:
    """The paths of five checkpoints that only a sampler reads."""
    work = start_worker()
    forward_backward("m", "hi", "hello")
    saved = [save(owner, "m", f"s{number}", kind="sampler") for number in range(5)]
    work()
    return [str(result(each)["path"]) for each in saved]


def most_bytes(work: InProcessWorker) -> Callable[[], int]:
    """Returns the most bytes that versions took at any poll of the sampler."""
    seen = [0]
    poll = work.engine.sampler.poll

    def noted(wait_seconds: float) -> Mapping[str, object]:
        seen.append(WEIGHTS_BYTES * len(work.engine.sampler.versions))
        return poll(wait_seconds)

    work.engine.sampler.poll = noted  # type: ignore[method-assign,assignment]  # only watched
    return lambda: max(seen)


# -- who leaves ------------------------------------------------------------------------------------


def test_the_adapter_of_a_client_who_has_left_leaves_first(
    start_worker: Start, owner: User, forward_backward: Submit
) -> None:
    work = start_worker(fake_engine(adapter_bytes=2 * ADAPTER_BYTES))
    for name in ("old", "new"):
        forward_backward(name, "hi")
        work()
    of_session(owner, "new", heartbeat_at=timezone.now() - timedelta(hours=1))
    forward_backward("another", "hi")
    work()
    assert in_memory(work) == {"old", "another"}


def test_otherwise_the_least_recently_used_leaves(
    start_worker: Start, owner: User, forward_backward: Submit
) -> None:
    work = start_worker(fake_engine(adapter_bytes=2 * ADAPTER_BYTES))
    for name in ("a", "b"):
        forward_backward(name, "hi")
        work()
    for name in ("a", "b"):
        of_session(owner, name)  # both clients live
    forward_backward("a", "again", seq_id=next_seq_id("a"))
    work()
    forward_backward("c", "hi")
    work()
    assert in_memory(work) == {"a", "c"}


def test_an_idle_worker_lets_go_of_what_only_clients_used_who_have_left(
    start_worker: Start, owner: User, forward_backward: Submit, result: Result
) -> None:
    work = start_worker()
    for name in ("left", "there"):
        forward_backward(name, "hi")
    saved = save(owner, "left", "s", kind="sampler")
    work()
    sample(owner, model_path=str(result(saved)["path"]))
    work()
    left = of_session(owner, "left", heartbeat_at=timezone.now() - timedelta(hours=1))
    of_session(owner, "there")
    checkpoint = Checkpoint.objects.get()
    SamplingSession.objects.create(
        id="lane", session=left, seq_id=1, base_model="x", checkpoint=checkpoint
    )
    cache = work.loop.adapter_cache
    cache._memory.use(f"checkpoint:{checkpoint.pk}", lane_id="lane")

    assert [cache.let_go() for _ in range(3)] == [True, True, False]
    assert in_memory(work) == {"there"}
    assert work.engine.sampler.versions == {}
    assert cache.figures()["adapter_bytes"] == ADAPTER_BYTES

    # An evicted run has the same state when it is loaded again.
    again = forward_backward("left", "hi", seq_id=next_seq_id("left"))
    work()
    result(again)
    assert in_memory(work) == {"left", "there"}


# -- what does not fit -----------------------------------------------------------------------------


def test_an_adapter_that_could_never_fit_is_refused_by_name(
    start_worker: Start, owner: User
) -> None:
    work = start_worker(fake_engine(adapter_bytes=ADAPTER_BYTES - 1))
    future = services.run_create_submit(
        owner_id=owner.pk, model_id="m", base_model=None, lora_config=LoraConfig(rank=8)
    ).future
    work()
    future.refresh_from_db()
    assert (future.state, future.error_code) == ("failed", "OutOfMemory")
    assert "TINKERAPI_ADAPTER_CACHE_BYTES" in future.error
    assert work.engine.trainer.adapter_names() == []


def test_a_batch_takes_as_many_runs_as_fit_together(
    start_worker: Start, forward_backward: Submit, result: Result
) -> None:
    together: list[int] = []

    def before_verb(verb: str, names: tuple[str, ...]) -> None:
        if verb == "forward_backward":
            together.append(len(set(names)))

    work = start_worker(fake_engine(adapter_bytes=3 * ADAPTER_BYTES, before_verb=before_verb))
    futures = [forward_backward(f"m{number}", "hi") for number in range(7)]
    work()
    for future in futures:
        result(future)
    assert max(together) == 3
    assert len(work.engine.trainer.adapter_names()) == 3


def test_samples_of_more_checkpoints_than_fit_wait_for_each_other(
    start_worker: Start, owner: User, checkpoints: list[str], result: Result
) -> None:
    work = start_worker(fake_engine(adapter_bytes=2 * WEIGHTS_BYTES))
    most = most_bytes(work)
    samples = [sample(owner, model_path=path) for path in checkpoints * 2]
    work()
    answers = [result(each)["completions"] for each in samples]
    assert most() == 2 * WEIGHTS_BYTES
    roomy = start_worker()
    again = [sample(owner, model_path=path) for path in checkpoints * 2]
    roomy()
    assert [result(each)["completions"] for each in again] == answers


def test_a_sample_that_waits_for_room_may_be_cancelled(
    start_worker: Start, owner: User, checkpoints: list[str], result: Result
) -> None:
    work = start_worker(fake_engine(adapter_bytes=WEIGHTS_BYTES))
    first, waiting, last = (sample(owner, model_path=path).future for path in checkpoints[:3])
    heard = [Bell.SILENT]
    submit = work.engine.sampler.submit

    def cancel_the_next(key: str, job: object) -> None:
        submit(key, job)  # type: ignore[arg-type]  # handed on
        if key.startswith(first.pk):
            future_cancel(request_id=waiting.pk, owner_id=owner.pk)
            heard.append(Bell.CANCELLED)

    work.engine.sampler.submit = cancel_the_next  # type: ignore[method-assign]  # only watched
    work.loop._bell_rang = lambda seconds: heard.pop() if heard else Bell.SILENT
    work()
    waiting.refresh_from_db()
    assert waiting.state == "cancelled"
    for future in (first, last):
        result(future)


def test_the_weights_of_a_run_that_left_count_while_it_is_sampled(
    start_worker: Start,
    owner: User,
    forward_backward: Submit,
    result: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "SAMPLING_SLICE_SECONDS", 0.0)  # a slice is one step
    work = start_worker(fake_engine(adapter_bytes=ADAPTER_BYTES + WEIGHTS_BYTES))
    forward_backward("sampled", "hi")
    work()
    held: list[int] = []
    long = sample(
        owner, model_id="sampled", sampling_params=SamplingParams(max_tokens=99, seed=1, stop=())
    )
    forward_backward("another", "hi")
    poll = work.engine.sampler.poll

    def noted(wait_seconds: float) -> Mapping[str, object]:
        held.append(work.loop.adapter_cache.figures()["adapter_bytes"])
        return poll(wait_seconds)

    work.engine.sampler.poll = noted  # type: ignore[method-assign,assignment]  # only watched
    work()
    result(long)
    assert max(held) == ADAPTER_BYTES + WEIGHTS_BYTES
    work()
    assert work.engine.sampler.versions == {}
