"""From an event to the receiver: retries, restarts, signatures, and receivers that misbehave."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone
from pytest_django import Settings

from tests.waiting import LONG_SECONDS, wait_for
from tests.webhook.conftest import SECRET, Receiver, pauses_end
from tinkerapi import deliveries
from tinkerapi.config.webhook import WebhookConfig
from tinkerapi.deliveries import CONNECTED, Notice, next_due, pause_after, store
from tinkerapi.management.commands import webhook
from tinkerapi.models import Delivery
from tinkerapi.webhook import sender as sender_module
from tinkerapi.webhook.sender import WebhookSender
from training.audit import audit_record

Senders = Callable[..., WebhookSender]
STATES = Delivery.DeliveryState


def revoke(number: int = 1) -> None:
    for _ in range(number):
        audit_record("key_revoke", actor_id=None, owner_id=None, prefix="tml-12345678")


def events_of(receiver: Receiver) -> list[str]:
    return [one.json["type"] for one in receiver.received]


def test_a_new_receiver_is_told_first_and_then_gets_each_event_once(
    receiver: Receiver, sender_of: Senders
) -> None:
    revoke()  # before the receiver was known
    sender = sender_of(receiver.url)
    sender.tick()
    revoke()
    for _ in range(3):
        sender.tick()

    assert events_of(receiver) == [CONNECTED, "key_revoke"]
    assert receiver.received[1].json["text"] == "an API key was revoked (tml-12345678)"
    assert receiver.received[1].path == "/in?token=private"
    assert not Delivery.objects.exclude(state=STATES.DELIVERED).exists()


def test_an_event_that_fails_twice_is_delivered_after_pauses_that_grow_across_restarts(
    receiver: Receiver, sender_of: Senders
) -> None:
    sender_of(receiver.url).tick()
    revoke()
    receiver.statuses = [500, 503]
    pauses = []
    for _ in range(3):
        sender = sender_of(receiver.url)
        sender.tick()
        row = Delivery.objects.get(event="key_revoke")
        pauses.append(row.next_attempt_at - row.tried_at)  # type: ignore[operator]
        sender.tick()  # its pause is not over
        pauses_end()

    assert events_of(receiver) == [CONNECTED] + ["key_revoke"] * 3
    assert pauses == [timedelta(seconds=seconds) for seconds in (15, 30, 60)]
    assert (row.state, row.attempts, row.last_error) == (STATES.DELIVERED, 3, "")
    bodies = {(one.headers["webhook-id"], one.body) for one in receiver.received[1:]}
    assert len(bodies) == 1, "a repeat is the same message"


def test_the_signature_is_that_of_standard_webhooks(receiver: Receiver, sender_of: Senders) -> None:
    sender_of(receiver.url).tick()
    [message] = receiver.received

    headers = message.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + message.body
    digest = hmac.new(SECRET, signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    assert abs(int(headers["webhook-timestamp"]) - timezone.now().timestamp()) < 3600


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a receiver that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


def test_a_receiver_that_never_answers_costs_one_attempt_and_loses_nothing(
    silent: str, receiver: Receiver, sender_of: Senders
) -> None:
    sender = sender_of(silent, attempt_seconds=0.1)
    sender.tick()
    revoke(3)
    pauses_end()
    sender.tick()

    assert set(Delivery.objects.values_list("state", flat=True)) == {STATES.WAITING}
    assert Delivery.objects.get(event=CONNECTED).last_error == "no answer within 0.1 s"
    assert sum(Delivery.objects.values_list("attempts", flat=True)) == 2
    pauses_end()
    sender_of(receiver.url).tick()
    assert events_of(receiver).count("key_revoke") == 3


def test_an_answer_that_never_ends_does_not_hold_the_sender(sender_of: Senders) -> None:
    stopping = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                while not stopping.wait(0.02):
                    try:
                        connection.sendall(b"X-More: and more\r\n")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/"
            sender_of(url, attempt_seconds=0.5).tick()
        finally:
            stopping.set()
            thread.join()

    assert Delivery.objects.get().state == STATES.WAITING


def test_a_redirect_is_a_failure_and_is_not_followed(
    receiver: Receiver, sender_of: Senders
) -> None:
    receiver.statuses, receiver.location = [302], receiver.url.replace("/in", "/elsewhere")
    sender_of(receiver.url).tick()

    assert [one.path for one in receiver.received] == ["/in?token=private"]
    assert Delivery.objects.get().last_error == "status 302; redirects are not followed"


def test_neither_logs_nor_rows_nor_pages_contain_the_url_or_the_secret(
    receiver: Receiver, sender_of: Senders, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.statuses = [500]
    sender_of(receiver.url).tick()
    pauses_end()
    nobody = receiver.url.replace("127.0.0.1", "127.0.0.1:1@", 1)
    sender_of(nobody).tick()
    config = WebhookConfig(url=receiver.url, secret=SECRET, events=())

    said = caplog.text + repr(config) + repr(list(Delivery.objects.values()))
    assert "was not taken by http://127.0.0.1" in said
    assert "private" not in said
    assert SECRET.decode() not in said


def test_two_senders_do_not_send_an_event_twice(receiver: Receiver, sender_of: Senders) -> None:
    sender_of(receiver.url).notice()
    first = next_due()

    assert first is not None
    assert next_due() is None


def test_an_event_is_given_up_after_a_day_of_attempts(
    receiver: Receiver, sender_of: Senders
) -> None:
    receiver.statuses = [500, 500]
    sender = sender_of(receiver.url)
    sender.tick()
    assert Delivery.objects.get().state == STATES.WAITING
    Delivery.objects.update(created_at=timezone.now() - deliveries.GIVE_UP_AFTER)
    pauses_end()
    sender.send_due()
    pauses_end()
    sender.send_due()

    row = Delivery.objects.get()
    assert (row.state, row.attempts, row.last_error) == (STATES.GIVEN_UP, 2, "status 500")
    assert len(receiver.received) == 2


def test_pauses_double_up_to_an_hour() -> None:
    seconds = [pause_after(attempts).total_seconds() for attempts in (1, 2, 3, 8, 9, 10, 1000)]
    assert seconds == [15, 30, 60, 1920, 3600, 3600, 3600]


def test_many_events_of_one_kind_leave_room_for_the_others(db: None) -> None:
    def notices(event: str, number: int) -> list[Notice]:
        now = timezone.now()
        return [
            Notice(event=event, subject="", status="happened", text="", at=now, key=f"{event}:{i}")
            for i in range(number)
        ]

    assert store(notices("checkpoint_publish", deliveries.MOST_WAITING + 7)) == 7
    assert store(notices("worker_lost", 1)) == 0
    assert store(notices("worker_lost", 1)) == 0
    assert Delivery.objects.filter(event="worker_lost").count() == 1
    assert Delivery.objects.count() == deliveries.MOST_WAITING + 1


def test_old_events_are_forgotten_and_waiting_ones_are_not(
    receiver: Receiver, sender_of: Senders
) -> None:
    sender = sender_of(receiver.url)
    sender.tick()
    revoke()
    sender.tick()
    receiver.statuses = [500]
    revoke()
    sender.tick()
    Delivery.objects.update(created_at=timezone.now() - deliveries.KEPT - timedelta(days=1))
    deliveries.forget_old()

    left = set(Delivery.objects.values_list("event", "state"))
    assert left == {(CONNECTED, STATES.DELIVERED), ("key_revoke", STATES.WAITING)}


def test_the_command_tries_the_receiver(
    receiver: Receiver,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhook, "ATTEMPT_SECONDS", LONG_SECONDS)
    settings.WEBHOOK = WebhookConfig(url=receiver.url, secret=SECRET, events=())
    receiver.statuses = [204, 403]
    call_command("webhook", "--test")
    assert capsys.readouterr().out.endswith("took it\n")
    with pytest.raises(CommandError, match="did not take it: status 403"):
        call_command("webhook", "--test")
    settings.WEBHOOK = None
    with pytest.raises(CommandError, match="set TINKERAPI_WEBHOOK_URL"):
        call_command("webhook")


@pytest.mark.django_db(transaction=True)
def test_a_sender_whose_connection_to_postgres_is_cut_goes_on(
    receiver: Receiver, sender_of: Senders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "LOOK_SECONDS", 0.05)
    stopping, sender = threading.Event(), sender_of(receiver.url)
    pids: list[int] = []

    def work() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            pids.append(cursor.fetchone()[0])
        try:
            sender_module.run(sender, stopping)
        finally:
            connection.close()

    thread = threading.Thread(target=work, name="sender")
    thread.start()
    try:
        wait_for(lambda: receiver.received)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", pids)
            assert cursor.fetchone() == (True,)
        revoke()
        wait_for(lambda: "key_revoke" in events_of(receiver))
    finally:
        stopping.set()
        thread.join()
