"""What was used by whom: added up in the commits that complete requests, once for each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import transaction

from futures.errors import Fenced
from futures.models import Future, Worker
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.test_sampling import new_sampler, sample
from tests.training.test_races import at_once
from training.models import Checkpoint, DailyUsage, Run
from training.usage import Period, today, tokens_used, usage_record, used_together

HI = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]

Start = Callable[..., InProcessWorker]


def by_work() -> dict[str, tuple[int, int]]:
    """Requests and tokens of each kind of work."""
    return {
        str(work): (sum(row.requests for row in rows), sum(row.tokens for row in rows))
        for work in DailyUsage.Work
        if (rows := DailyUsage.objects.filter(work=work))
    }


def expected() -> dict[str, tuple[int, int]]:
    """The same by the definition: from the summaries of all requests."""
    counts: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for future in Future.objects.exclude(state__in=["pending", "running"]):
        used = 0 if future.state == "failed" else future.summary.get("tokens", 0)
        if future.kind == "sample":
            counts["sampling"] += 1
            tokens["sampling"] += used
            counts["prefill"] += 0
            prompt = 0 if future.state == "failed" else future.summary.get("prompt_tokens", 0)
            tokens["prefill"] += prompt
        elif future.kind in ("forward", "forward_backward"):
            counts["training"] += 1
            tokens["training"] += used
        else:
            counts["other"] += 1
    return {work: (counts[work], tokens[work]) for work in counts}


def ask_for_everything(api: ApiClient) -> None:
    api.post("/fwdbwd", model_id="m", data=HI)
    api.post("/forward", model_id="m", data=HI * 2)
    api.post("/optim_step", model_id="m", adam_params={"learning_rate": 0.1})
    prompt = {"prompts": ["ab", "c"], "sampling_params": {"max_tokens": 3, "seed": 1}}
    api.post("/api/v1/asample", model_id="m", num_samples=2, **prompt)
    api.post("/api/v1/asample", base_model=None, num_samples=1, **prompt)
    api.post("/save_weights", model_id="m", name="kept")
    api.post("/save_weights", model_id="m", name="kept")  # refused: the name is taken


@pytest.mark.django_db
def test_tokens_and_requests_are_those_of_the_summaries(
    api: ApiClient, work: InProcessWorker
) -> None:
    ask_for_everything(api)
    begin = time.monotonic()
    work()
    took = time.monotonic() - begin

    assert by_work() == expected()
    assert by_work()["training"][1] > 0
    assert by_work()["sampling"][1] > 0
    assert Future.objects.filter(state="failed").count() == 1
    seconds = sum(row.seconds for row in DailyUsage.objects.all())
    assert 0 < seconds <= took
    assert all(row.seconds >= 0 for row in DailyUsage.objects.all())
    owner = User.objects.get(username="local")
    tokens = sum(number for _, number in by_work().values())
    assert tokens_used(owner.pk, today()) == tokens
    assert tokens_used(owner.pk + 1, today()) == tokens_used(owner.pk, today() - timedelta(1)) == 0


@pytest.mark.django_db
def test_samples_of_frozen_weights_belong_to_their_run(
    api: ApiClient, work: InProcessWorker
) -> None:
    sdk = SdkClient.with_new_key(api)
    model = sdk.model()
    sdk.post("save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=0)
    work()
    session = Run.objects.get().session_id
    sample(sdk, f"{session}:sample:0")
    sample(sdk, new_sampler(sdk))  # of the base model
    work()

    sampled = DailyUsage.objects.filter(work="sampling", tokens__gt=0)
    assert {row.run_id for row in sampled} == {model, ""}


@pytest.mark.django_db
def test_a_commit_that_is_refused_uses_nothing(api: ApiClient, start_worker: Start) -> None:
    old = start_worker()
    api.post("/fwdbwd", model_id="m", data=HI)
    Worker.objects.filter(pk=old.worker.pk).update(state="lost", stopped_at=old.worker.started_at)
    with pytest.raises(Fenced):
        old()
    assert not DailyUsage.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_workers_that_add_to_the_same_rows_lose_nothing() -> None:
    owner = User.objects.create(username="one")
    ids = [
        [_finished(owner, tokens=number, kind=kind).pk for kind in ("forward", "sample")]
        for number in range(1, 7)
    ]

    def record(pair: list[str]) -> Callable[[], None]:
        def call() -> None:
            with transaction.atomic():
                usage_record(pair, seconds=1.0)

        return call

    results = at_once(*[record(pair) for pair in ids])

    assert results == [None] * len(ids)
    assert by_work() == {"training": (6, 21), "sampling": (6, 21), "prefill": (0, 60)}
    assert sum(row.seconds for row in DailyUsage.objects.all()) == pytest.approx(6.0)


def _finished(owner: User, *, tokens: int, kind: str = "sample", **more: Any) -> Future:
    summary = {"tokens": tokens, **({"prompt_tokens": 10} if kind == "sample" else {})}
    return Future.objects.create(
        owner=owner, queue="q", kind=kind, payload=b"", payload_digest=b"", result=b"", cost=5,
        state="ready", summary=summary, started_at="2026-01-01T00:00Z",
        finished_at="2026-01-01T00:00Z", **more,
    )  # fmt: skip


@pytest.mark.django_db
def test_a_period_is_summed_by_day_user_and_run() -> None:
    one, two = (User.objects.create(username=name) for name in ("one", "two"))
    rows = [
        (one, 0, "a", "training", 10, 2.0),
        (one, 0, "b", "sampling", 5, 1.0),
        (one, 3, "a", "training", 7, 4.0),
        (two, 3, "", "prefill", 3, 0.5),
        (two, 9, "", "prefill", 1000, 9.0),
    ]
    for owner, age, run_id, work, tokens, seconds in rows:
        DailyUsage.objects.create(
            owner=owner, day=today() - timedelta(age), run_id=run_id, work=work, requests=1,
            tokens=tokens, seconds=seconds,
        )  # fmt: skip

    period = Period(None, days=7)

    total = used_together(period.by_day().values())
    assert (total.training, total.sampling, total.prefill, total.tokens) == (17, 5, 3, 25)
    assert (total.requests, total.seconds) == (4, 7.5)
    assert {day: used.tokens for day, used in period.by_day().items()} == {
        today(): 15,
        today() - timedelta(3): 10,
    }
    assert [(name, used.tokens) for _, name, used in period.by_owner(limit=9)] == [
        ("one", 22),
        ("two", 3),
    ]
    assert [used.tokens for _, _, used in period.by_run(limit=2)] == [17, 5]
    for days, tokens in ((7, 3), (10, 1003)):
        of_two = Period(two.pk, days=days).by_day().values()
        assert used_together(of_two).tokens == tokens
    assert sum(line[5] for line in period.lines()) == 25


@pytest.mark.django_db
def test_usage_stays_when_a_checkpoint_and_its_run_are_gone(
    api: ApiClient, work: InProcessWorker
) -> None:
    ask_for_everything(api)
    work()
    before = by_work()
    Checkpoint.objects.all().delete()
    api.post("/api/v1/remove_lora_async", model_id="m")
    work()
    assert before.items() <= {**by_work(), "other": before["other"]}.items()
    assert Period(None, days=1).by_run(limit=5)
