"""The admin's actions work, once, and report refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.contrib.messages import get_messages
from django.test import Client
from django.utils import timezone

from futures.claiming import future_claim
from futures.models import Future
from futures.resubmitting import future_resubmit
from tests.conftest import InProcessWorker
from tests.console.conftest import list_page, page
from tinkerapi.console.pages.api_keys import key_state
from tinkerapi.models import ApiKey
from tinkerapi.services import api_key_revoke, api_key_verify
from training.models import AuditEvent, Checkpoint

SUBMITTED = {"_form_submitted": "True"}


@pytest.fixture
def traces(trained: Callable[..., SimpleNamespace], superuser: User) -> SimpleNamespace:
    return trained(superuser)


def said(answer: Any) -> list[str]:
    """The messages that this answer leaves for the next page."""
    return [str(message) for message in get_messages(answer.wsgi_request)]


def test_cancel_asks_first_and_then_cancels(console: Client, traces: SimpleNamespace) -> None:
    asked = console.get(page(traces.waiting, "cancel"))
    traces.waiting.refresh_from_db()
    assert b"Cancel this request?" in asked.content
    assert traces.waiting.state == "pending"

    answer = console.post(page(traces.waiting, "cancel"), SUBMITTED)
    traces.waiting.refresh_from_db()
    assert traces.waiting.state == "cancelled"
    assert answer["Location"] == page(traces.waiting)
    assert said(answer) == [f"{traces.waiting.pk}: cancelled"]
    assert LogEntry.objects.get().object_id == traces.waiting.pk


def test_a_dialog_sends_the_browser_on_by_its_own_header(
    console: Client, traces: SimpleNamespace
) -> None:
    answer = console.post(page(traces.waiting, "cancel"), SUBMITTED, headers={"HX-Request": "true"})
    assert answer["HX-Redirect"] == page(traces.waiting)


@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        ("waiting", "cancel"),
        ("sample", "replay"),
        ("run", "remove"),
        ("checkpoint", "delete_checkpoint"),
        ("checkpoint", "publish"),
        ("checkpoint", "set_expiry"),
        ("api_key", "revoke"),
        ("api_key", "rotate"),
    ],
)
def test_no_verb_is_done_by_following_a_link_or_from_another_site(
    kind: str, verb: str, traces: SimpleNamespace, superuser: User
) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(superuser)
    row = getattr(traces, kind)
    before = type(row).objects.filter(pk=row.pk).values().get()
    futures = Future.objects.count()
    assert client.get(page(row, verb), SUBMITTED).status_code == 200
    assert client.post(page(row, verb), SUBMITTED).status_code == 403
    assert type(row).objects.filter(pk=row.pk).values().get() == before
    assert Future.objects.count() == futures


def test_only_what_waits_can_be_cancelled(console: Client, traces: SimpleNamespace) -> None:
    assert console.post(page(traces.sample, "cancel"), SUBMITTED).status_code == 403
    assert page(traces.sample, "cancel") not in console.get(page(traces.sample)).content.decode()
    assert page(traces.waiting, "cancel") in console.get(page(traces.waiting)).content.decode()


def test_a_sample_may_be_cancelled_while_it_runs(
    console: Client, traces: SimpleNamespace, work: InProcessWorker
) -> None:
    again = future_resubmit(request_id=traces.sample.pk)
    future_claim(worker=work.worker, max_futures=100, max_cost=10**6)
    running = {future.kind: future for future in Future.objects.filter(state="running")}

    assert (
        page(running["optim_step"], "cancel")
        not in console.get(page(running["optim_step"])).content.decode()
    )
    assert page(again, "cancel") in console.get(page(again)).content.decode()
    console.post(page(again, "cancel"), SUBMITTED)
    again.refresh_from_db()
    assert again.state == "cancelled"


def test_a_list_cancels_what_waits_and_says_what_it_could_not(
    console: Client, traces: SimpleNamespace
) -> None:
    chosen = [traces.waiting.pk, traces.sample.pk]
    answer = console.post(
        list_page(Future), {"action": "cancel_selected", "_selected_action": chosen}
    )
    traces.waiting.refresh_from_db()
    traces.sample.refresh_from_db()
    assert (traces.waiting.state, traces.sample.state) == ("cancelled", "ready")
    assert any("finished, so there is nothing to cancel" in line for line in said(answer))


def test_replay_submits_the_same_request_again_and_shows_it(
    console: Client, traces: SimpleNamespace, work: InProcessWorker
) -> None:
    answer = console.post(page(traces.optim_step, "replay"), SUBMITTED)
    again = Future.objects.get(replay_of=traces.optim_step)
    assert answer["Location"] == page(again)
    assert bytes(again.payload_digest) == bytes(traces.optim_step.payload_digest)
    assert again.seq_id == traces.waiting.seq_id + 1
    step = traces.run.step
    work()
    again.refresh_from_db()
    traces.run.refresh_from_db()
    assert again.state == "ready"
    assert traces.run.step == step + 2  # the one that waited, and the replay
    html = console.get(page(again)).content.decode()
    assert f'href="{page(traces.optim_step)}"' in html


def test_what_has_no_payload_any_more_cannot_be_replayed(
    console: Client, traces: SimpleNamespace
) -> None:
    Future.objects.filter(pk=traces.sample.pk).update(payload=None)
    assert console.post(page(traces.sample, "replay"), SUBMITTED).status_code == 403
    answer = console.post(
        list_page(Future), {"action": "replay_selected", "_selected_action": [traces.sample.pk]}
    )
    assert any("payload was pruned" in line for line in said(answer))
    assert not Future.objects.filter(replay_of=traces.sample).exists()


def test_remove_removes_the_run_and_keeps_its_checkpoints(
    console: Client, traces: SimpleNamespace, work: InProcessWorker
) -> None:
    console.post(page(traces.run, "remove"), SUBMITTED)
    traces.run.refresh_from_db()
    assert traces.run.state == "deleted"
    work()
    removal = Future.objects.get(kind="remove_run")
    assert removal.state == "ready"
    assert Checkpoint.objects.filter(pk=traces.checkpoint.pk).exists()
    assert console.post(page(traces.run, "remove"), SUBMITTED).status_code == 403


def test_delete_deletes_the_checkpoint_and_its_files(
    console: Client, traces: SimpleNamespace, settings: Any
) -> None:
    folder = settings.DATA_DIR / traces.checkpoint.directory
    assert folder.is_dir()
    answer = console.post(page(traces.checkpoint, "delete_checkpoint"), SUBMITTED)
    assert answer["Location"] == list_page(Checkpoint)
    assert not Checkpoint.objects.filter(pk=traces.checkpoint.pk).exists()
    assert not folder.exists()


def test_revoke_closes_the_key(console: Client, traces: SimpleNamespace) -> None:
    console.post(page(traces.api_key, "revoke"), SUBMITTED)
    traces.api_key.refresh_from_db()
    assert key_state(traces.api_key) == "revoked"
    assert console.post(page(traces.api_key, "revoke"), SUBMITTED).status_code == 403


def test_a_list_revokes_the_chosen_keys(console: Client, traces: SimpleNamespace) -> None:
    chosen = {"action": "revoke_selected", "_selected_action": [traces.api_key.pk]}
    console.post(list_page(ApiKey), chosen)
    traces.api_key.refresh_from_db()
    assert traces.api_key.revoked_at is not None


def new_key(client: Client, user: User) -> Any:
    fields = {"user": user.pk, "name": "laptop", "expires_in_days": 7, **SUBMITTED}
    return client.post(f"{list_page(ApiKey)}new_key/", fields)


def test_a_new_key_is_shown_once_and_opens_the_door(console: Client, superuser: User) -> None:
    answer = new_key(console, superuser)
    key = answer.content.decode().split('id="new-key">')[1].split("<")[0]
    verified = api_key_verify(key)
    assert verified is not None
    assert verified.user == superuser
    assert verified.expires_at is not None
    assert "no-store" in answer["Cache-Control"]
    for url in (list_page(ApiKey), page(verified), page(verified, "history")):
        assert key not in console.get(url).content.decode()


def test_a_staff_user_makes_keys_for_themselves_only(
    staff: User, superuser: User, browser: Callable[[User], Client]
) -> None:
    office = browser(staff)
    refused = new_key(office, superuser)
    assert refused.status_code == 200
    assert not ApiKey.objects.exists()
    assert superuser.username not in refused.content.decode()
    new_key(office, staff)
    assert ApiKey.objects.get().user == staff


def test_a_checkpoint_is_published_and_withdrawn(
    console: Client, traces: SimpleNamespace, superuser: User
) -> None:
    checkpoint = traces.checkpoint
    for verb, event, is_public in (
        ("publish", "checkpoint_publish", True),
        ("withdraw", "checkpoint_unpublish", False),
    ):
        assert console.post(page(checkpoint, verb), SUBMITTED).status_code == 302
        checkpoint.refresh_from_db()
        assert checkpoint.public is is_public
        assert AuditEvent.objects.get(event=event).actor_id == superuser.pk
        assert console.post(page(checkpoint, verb), SUBMITTED).status_code == 403  # only once


def test_a_checkpoint_gets_an_expiry_and_loses_it(console: Client, traces: SimpleNamespace) -> None:
    checkpoint = traces.checkpoint
    console.post(page(checkpoint, "set_expiry"), {**SUBMITTED, "days": "2"})
    checkpoint.refresh_from_db()
    assert timedelta(days=1.9) < checkpoint.expires_at - timezone.now() <= timedelta(days=2)
    for wrong in ("0", "4000", "soon"):
        answer = console.post(page(checkpoint, "set_expiry"), {**SUBMITTED, "days": wrong})
        assert answer.status_code == 200  # the dialog again
    console.post(page(checkpoint, "set_expiry"), {**SUBMITTED, "days": ""})
    checkpoint.refresh_from_db()
    assert checkpoint.expires_at is None


def test_a_checkpoint_is_downloaded_by_a_link_and_its_owner_can_see_that(
    console: Client, trained: Callable[..., SimpleNamespace], user_factory: Callable[..., User]
) -> None:
    checkpoint = trained(user_factory()).checkpoint
    answer = console.get(page(checkpoint, "download"))
    assert answer.status_code == 302
    assert f"/{checkpoint.name}.tar" in answer["Location"]
    event = AuditEvent.objects.get(event="checkpoint_read")
    assert (event.owner_id, event.details["purpose"]) == (checkpoint.owner_id, "download")


def test_a_key_is_rotated_and_its_successor_shown_once(
    console: Client, traces: SimpleNamespace, superuser: User
) -> None:
    old = traces.api_key
    keys = ApiKey.objects.count()
    for wrong in ("-1", "721", "soon", ""):
        console.post(page(old, "rotate"), {**SUBMITTED, "overlap_hours": wrong})
    assert ApiKey.objects.count() == keys

    answer = console.post(page(old, "rotate"), {**SUBMITTED, "overlap_hours": "2"})

    [key] = re.findall(r"tml-[\w-]{43}", answer.content.decode())
    successor = api_key_verify(key)
    assert successor is not None
    assert (successor.user, successor.name) == (old.user, old.name)
    event = AuditEvent.objects.get(event="key_rotate")
    assert event.details["prefix"] == old.prefix
    assert event.details["successor"] == successor.prefix
    api_key_revoke(api_key_id=old.pk)
    assert console.post(page(old, "rotate"), SUBMITTED).status_code == 403
