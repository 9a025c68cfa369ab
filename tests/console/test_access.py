"""Staff users who are not superusers see and change their own rows, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db.models import Model
from django.test import Client
from django.urls import reverse
from django_q.models import Failure, OrmQ, Schedule, Success

from futures.models import Future, Lane, Worker
from tests.console.conftest import list_page, page
from tinkerapi.models import ApiKey
from training.models import Checkpoint, Run, SamplingSession, Session, Snapshot
from training.services import optim_step_submit
from training.types import AdamParams

OWNED: list[type[Model]] = [
    Future,
    Lane,
    Run,
    Checkpoint,
    Snapshot,
    Session,
    SamplingSession,
    ApiKey,
]


@pytest.fixture
def mine(trained: Callable[..., SimpleNamespace], staff: User) -> SimpleNamespace:
    return traces_with_snapshot(trained, staff, "mine-only")


@pytest.fixture
def theirs(
    trained: Callable[..., SimpleNamespace], user_factory: Callable[..., User]
) -> SimpleNamespace:
    return traces_with_snapshot(trained, user_factory(), "theirs-only")


def traces_with_snapshot(
    trained: Callable[..., SimpleNamespace], owner: User, name: str
) -> SimpleNamespace:
    traces = trained(owner, name=name, text=f"said by {name}")
    run = {"run": traces.run, "seq_id": 999, "step": 1}
    Snapshot.objects.create(**run, directory=name, size_bytes=1, write_seconds=1, epoch=1)
    return traces


@pytest.fixture
def office(staff: User, browser: Callable[[User], Client]) -> Client:
    return browser(staff)


def test_lists_of_a_staff_user_hold_their_own_rows_only(
    office: Client, staff: User, mine: SimpleNamespace, theirs: SimpleNamespace
) -> None:
    for model in OWNED:
        answer = office.get(list_page(model))
        rows = list(answer.context["cl"].result_list)
        assert rows
        assert {owner_id(row) for row in rows} == {staff.pk}
        html = answer.content.decode()
        assert "theirs-only" not in html
        assert theirs.run.owner.username not in html


def test_pages_of_other_peoples_rows_do_not_open_for_a_staff_user(
    office: Client, staff: User, mine: SimpleNamespace, theirs: SimpleNamespace
) -> None:
    for model in OWNED:
        rows = list(model._default_manager.all())
        assert {owner_id(row) for row in rows} == {staff.pk, theirs.run.owner_id}
        for row in rows:
            answer = office.get(page(row))
            assert answer.status_code == (200 if owner_id(row) == staff.pk else 302)
            assert page(staff) not in answer.content.decode()  # it would not open


def owner_id(row: Any) -> int:
    """The owner of a row, found without the code under test."""
    if isinstance(row, ApiKey):
        return row.user_id
    if isinstance(row, SamplingSession):
        row = row.session
    if isinstance(row, Checkpoint | Snapshot):
        row = row.run
    return int(row.owner_id)


def test_the_dashboard_of_a_staff_user_counts_their_own_only(
    office: Client, staff: User, mine: SimpleNamespace, theirs: SimpleNamespace
) -> None:
    Future.objects.filter(pk=theirs.sample.pk).update(
        state="failed", error="their secret", category="user"
    )
    answer = office.get(reverse("admin:index"))
    html = answer.content.decode()
    assert "mine-only" in html
    assert "theirs-only" not in html
    assert "their secret" not in html
    numbers = {tile["state"]: tile["number"] for tile in answer.context["tiles"]}
    assert numbers["pending"] == str(Future.objects.filter(owner=staff, state="pending").count())
    assert numbers["ready"] == str(Future.objects.filter(owner=staff, state="ready").count())
    assert numbers["failed"] == "0"


@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        ("waiting", "cancel"),
        ("sample", "replay"),
        ("run", "remove"),
        ("checkpoint", "delete_checkpoint"),
        ("api_key", "revoke"),
    ],
)
def test_verbs_on_other_peoples_rows_do_nothing_for_a_staff_user(
    kind: str, verb: str, office: Client, mine: SimpleNamespace, theirs: SimpleNamespace
) -> None:
    row = getattr(theirs, kind)
    before = type(row).objects.filter(pk=row.pk).values().get()
    futures = Future.objects.count()
    answer = office.post(page(row, verb), {"_form_submitted": "True"})
    assert answer.status_code in (403, 404)
    assert type(row).objects.filter(pk=row.pk).values().get() == before
    assert Future.objects.count() == futures


def test_a_list_action_of_a_staff_user_passes_over_other_peoples_rows(
    office: Client, mine: SimpleNamespace, theirs: SimpleNamespace
) -> None:
    waiting = [
        optim_step_submit(owner_id=run.owner_id, model_id=run.name, adam_params=AdamParams()).future
        for run in (mine.run, theirs.run)
    ]
    chosen = [future.pk for future in waiting]
    office.post(list_page(Future), {"action": "cancel_selected", "_selected_action": chosen})
    for future in waiting:
        future.refresh_from_db()
    assert [future.state for future in waiting] == ["cancelled", "pending"]


def test_a_staff_user_is_told_of_workers_but_not_of_what_they_hold(
    office: Client, mine: SimpleNamespace
) -> None:
    Worker.objects.update(figures={"device": "H100", "resident_adapters": ["theirs-only"]})
    html = office.get(page(Worker.objects.get())).content.decode()
    assert "H100" in html
    assert "theirs-only" not in html


def test_accounts_and_the_task_queue_are_for_superusers(office: Client, console: Client) -> None:
    for model in (User, OrmQ, Schedule, Success, Failure):
        assert office.get(list_page(model)).status_code == 403
        assert console.get(list_page(model)).status_code == 200


def test_the_filter_by_owner_is_for_superusers(
    office: Client, console: Client, mine: SimpleNamespace
) -> None:
    assert "By owner" not in office.get(list_page(Future)).content.decode()
    assert "By owner" in console.get(list_page(Future)).content.decode()


def test_nobody_enters_without_being_staff(
    user_factory: Callable[..., User], browser: Callable[[User], Client]
) -> None:
    for client in (Client(), browser(user_factory())):
        for model in [*OWNED, Worker]:
            answer = client.get(list_page(model))
            assert answer.status_code == 302
            assert "/admin/login/" in answer["Location"]


def test_a_login_from_a_typed_address_leads_to_the_dashboard(
    superuser: User,
) -> None:
    superuser.set_password("a long enough one")
    superuser.save()
    answer = Client().post(
        reverse("admin:login"), {"username": superuser.username, "password": "a long enough one"}
    )
    assert answer["Location"] == reverse("admin:index")
