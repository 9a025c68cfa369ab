"""Send events to the webhook's receiver: a part of ``up``, where a receiver is set."""

from __future__ import annotations

import signal
import threading
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from tinkerapi.models import Delivery
from tinkerapi.webhook.receiver import ATTEMPT_SECONDS, NotTaken, send
from tinkerapi.webhook.sender import WebhookSender, run


class Command(BaseCommand):
    help = (
        "Send events to the receiver of TINKERAPI_WEBHOOK_URL until SIGTERM. `up` runs it where a "
        "receiver is set; --test sends one event, which is not stored, and ends."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--test", action="store_true", help="post one event now, and say what came back"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        config = settings.WEBHOOK
        if config is None:
            raise CommandError("no receiver is set; set TINKERAPI_WEBHOOK_URL")
        if options["test"]:
            delivery = Delivery(
                event="test", status=Delivery.Status.HAPPENED, text="a test", at=timezone.now()
            )
            try:
                send(config, delivery, seconds=ATTEMPT_SECONDS)
            except NotTaken as error:
                raise CommandError(f"{config.host} did not take it: {error}") from error
            self.stdout.write(f"{config.host} took it")
            return
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        run(WebhookSender(config), stopping)
