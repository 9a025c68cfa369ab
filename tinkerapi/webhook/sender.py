"""The work of the webhook's process: notice, store, send; again and again."""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from django.db import Error as DatabaseFailure
from django.db import connection
from django.utils import timezone

from tinkerapi.config.webhook import WebhookConfig
from tinkerapi.deliveries import (
    connected_at,
    forget_old,
    next_due,
    record_failure,
    record_success,
    store,
)
from tinkerapi.webhook.notices import FIRST_LOOK_BACK, LOOK_BACK, ProblemWatch, event_notices
from tinkerapi.webhook.receiver import ATTEMPT_SECONDS, NotTaken, send

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
MOST_SENT = 20
"""Events between two looks."""


@dataclass
class WebhookSender:
    """Call ``tick`` every few seconds. It keeps nothing that a new one would not find again."""

    config: WebhookConfig
    attempt_seconds: float = ATTEMPT_SECONDS
    clock: Callable[[], float] = time.monotonic
    _look_back: timedelta = field(default=FIRST_LOOK_BACK, init=False)

    def __post_init__(self) -> None:
        self._problems = ProblemWatch(self.config.events, clock=self.clock)

    def tick(self) -> None:
        """Store what is new, then send what is due."""
        self.notice()
        self.send_due()

    def notice(self) -> None:
        """Store the events since the last look, and the problems' changes."""
        # Without the secret nobody can tell from it what the URL is.
        name = hmac.new(self.config.secret, self.config.url.encode(), hashlib.sha256)
        since = max(connected_at(name.hexdigest()[:16]), timezone.now() - self._look_back)
        found = event_notices(events=self.config.events, since=since)
        left_out = store(found + self._problems.notices())
        if left_out:
            logger.warning("webhook: no room for %d events; too many wait already", left_out)
        self._look_back = LOOK_BACK
        forget_old()

    def send_due(self) -> None:
        """Send until nothing is due or an attempt fails: a receiver that is down gets one attempt
        at each look."""
        for _ in range(MOST_SENT):
            delivery = next_due()
            if delivery is None:
                return
            try:
                send(self.config, delivery, seconds=self.attempt_seconds)
            except NotTaken as error:
                record_failure(delivery, str(error))
                logger.warning(
                    "webhook: %s was not taken by %s, attempt %d: %s",
                    delivery,
                    self.config.host,
                    delivery.attempts,
                    error,
                )
                return
            record_success(delivery)


def run(sender: WebhookSender, stopping: threading.Event) -> None:
    """Work until told to stop. While Postgres is down, nothing can be noticed."""
    while not stopping.is_set():
        try:
            sender.tick()
        except DatabaseFailure as error:
            logger.warning("webhook: waiting for Postgres: %s", str(error).strip().split("\n")[0])
            connection.close()
        stopping.wait(LOOK_SECONDS)
