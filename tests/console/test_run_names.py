"""Names that people give to runs, and the words for runs' activities."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from futures.models import Future, Lane
from tests.console.conftest import list_page, page
from training.activity import activity, with_activity
from training.models import AuditEvent, Checkpoint, Run, SamplingSession, Session
from training.progress import with_progress

WORDS = {"title": "Rank 64, take 2", "tags": "sweep, lr-3e-4", "notes": "diverged at 40"}


def sdk_run(owner: User, number: int = 0, **fields: Any) -> Run:
    session = Session.objects.create(owner=owner, sdk_version="0.38", **fields)
    return Run.objects.create(
        owner=owner,
        name=f"{session.pk}:train:{number}",
        session=session,
        model_seq_id=number,
        base_model="base",
        rank=8,
        alpha=16,
        seed=1,
        state=Run.RunState.READY,
    )


def with_everything(run: Run) -> Any:
    return with_activity(with_progress(Run.objects.filter(pk=run.pk))).get()


def test_a_run_is_shown_by_the_name_that_says_most(superuser: User) -> None:
    run = sdk_run(superuser)
    made_up = f"{superuser.username}, {timezone.localtime(run.created_at):%d %b %H:%M}"
    assert run.shown_title == made_up

    assert sdk_run(superuser, 2, display_name="grpo").shown_title == "grpo · 2"
    assert sdk_run(superuser, user_metadata={"name": " math "}).shown_title == "math"
    assert sdk_run(superuser, user_metadata={"name": ["no text"]}).shown_title == made_up
    named = sdk_run(superuser, display_name="grpo")
    named.user_metadata = {"name": "own"}
    assert named.shown_title == "own"
    named.title = "given"
    assert named.shown_title == "given"


def test_the_quick_references_name_is_its_own(
    trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    assert trained(superuser, name="mine").run.shown_title == "mine"


def test_naming_a_run_shows_and_finds_it_by_each_word(
    console: Client, superuser: User, trained: Callable[..., SimpleNamespace]
) -> None:
    trained(superuser, name="another")
    run = sdk_run(superuser, display_name="grpo", user_metadata={"name": "math"})
    asked = console.get(page(run, "describe"))
    assert "What is this run called?" in asked.content.decode()

    console.post(page(run, "describe"), {"_form_submitted": "True", **WORDS})

    html = console.get(page(run)).content.decode()
    for word in ("Rank 64, take 2", "sweep", "lr-3e-4", "diverged at 40", run.name):
        assert word in html
    assert 'value="Rank 64, take 2"' in console.get(page(run, "describe")).content.decode()
    for word in ("take 2", "SWEEP", "diverged", "grpo", "math", run.name[:8]):
        found = console.get(list_page(Run), {"q": word}).context["cl"].result_list
        assert [item.pk for item in found] == [run.pk], word
    noted = AuditEvent.objects.get(event="run_describe")
    assert (noted.actor, noted.details["model_id"]) == (superuser, run.name)


def test_nobody_names_or_reads_the_words_of_anothers_run(
    browser: Callable[[User], Client], superuser: User, staff: User
) -> None:
    run = sdk_run(superuser)
    Run.objects.filter(pk=run.pk).update(notes="secret plan")

    dialog = browser(staff).get(page(run, "describe"))
    answer = browser(staff).post(page(run, "describe"), {"_form_submitted": "True", **WORDS})

    assert "secret plan" not in dialog.content.decode()
    assert answer.status_code == 404
    assert Run.objects.get(pk=run.pk).title == ""


def test_names_are_shown_as_text(console: Client, superuser: User) -> None:
    run = sdk_run(superuser, display_name="<script>alert(1)</script>")
    for address in (list_page(Run), page(run)):
        html = console.get(address).content.decode()
        assert "<script>alert" not in html
        assert "&lt;script&gt;alert(1)" in html


def open_future(run: Run, lane_id: str, kind: str) -> None:
    Future.objects.create(
        owner=run.owner,
        queue="q",
        lane_id=lane_id,
        kind=kind,
        state="pending",
        seq_id=99,
        payload=b"waits",
    )


@pytest.mark.django_db
def test_a_run_says_what_it_does(trained: Callable[..., SimpleNamespace], superuser: User) -> None:
    run = trained(superuser).run
    Future.objects.filter(lane_id=run.pk).exclude(state="ready").delete()
    assert activity(with_everything(run)) == "training"  # a moment ago

    Future.objects.update(created_at=timezone.now() - timedelta(minutes=5))
    assert activity(with_everything(run)) == "idle"

    open_future(run, run.pk, "sample")
    assert activity(with_everything(run)) == "sampling"
    Future.objects.filter(state="pending").update(kind="forward_backward")
    assert activity(with_everything(run)) == "training"

    Future.objects.filter(state="pending").delete()
    session = Session.objects.create(owner=superuser, sdk_version="0.38")
    sampler = SamplingSession.objects.create(
        id=f"{session.pk}:sample:0",
        session=session,
        seq_id=0,
        base_model="base",
        checkpoint=Checkpoint.objects.get(run=run),
    )
    lane = Lane.objects.create(id=sampler.pk, owner=superuser, queue="q", ordered=False)
    open_future(run, lane.pk, "sample")
    assert activity(with_everything(run)) == "sampling"

    Run.objects.filter(pk=run.pk).update(state="deleted", deleted_at=timezone.now())
    assert activity(with_everything(run)) == "deleted"


def test_a_run_whose_client_is_silent_says_so(superuser: User) -> None:
    run = sdk_run(superuser)
    assert activity(with_everything(run)) == "idle"

    Session.objects.update(heartbeat_at=timezone.now() - timedelta(seconds=61))
    assert activity(with_everything(run)) == "client gone"

    Session.objects.update(finished_at=timezone.now(), finish_reason="success")
    assert activity(with_everything(run)) == "finished"
