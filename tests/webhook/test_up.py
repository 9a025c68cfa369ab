"""A whole server tells a receiver that its worker was killed; at first the receiver refuses."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.server import Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for
from tests.webhook.conftest import Received, Receiver

pytestmark = pytest.mark.acceptance

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1ub3BxcnN0dXY="  # noqa: S105


def test_a_killed_worker_is_reported_to_a_receiver_that_refused_twice(
    receiver: Receiver, tmp_path: Path
) -> None:
    receiver.statuses = [500, 500]
    server = Server(
        tmp_path / "data",
        free_port(),
        {
            "TINKERAPI_BASE_MODEL": str(make_tiny_model(tmp_path / "base" / "tiny")),
            "TINKERAPI_DTYPE": "float32",
            "TINKERAPI_NUM_THREADS": "1",
            "TINKERAPI_WEBHOOK_URL": receiver.url,
            "TINKERAPI_WEBHOOK_SECRET": SECRET,
            "TINKERAPI_WEBHOOK_EVENTS": "worker_lost",
        },
    )
    try:
        server.start()
        wait_for(lambda: receiver.received)
        os.kill(server.worker_pid(), signal.SIGKILL)

        def lost() -> Received | None:
            taken = [one for one in receiver.received if one.json["type"] == "worker_lost"]
            return taken[-1] if taken and not receiver.statuses else None

        message = wait_for(lost, 3 * LONG_SECONDS)
        log = server.log()
    finally:
        server.stop()

    assert "was lost after" in message.json["text"]
    assert receiver.url.rpartition("/")[0] in log
    assert "private" not in log
    assert SECRET not in log
