"""Clients' data can neither forge a log record nor fill the disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from futures.log_fields import about, log_fields
from tests.conftest import ApiClient
from tests.waiting import wait_for
from tinkerapi.server import log_file
from tinkerapi.server.log_file import log_rotate
from tinkerapi.server.logs import (
    AT_ONCE,
    SECONDS_EACH,
    JsonFormatter,
    LineFormatter,
    RepeatFilter,
)
from tinkerapi.server.supervisor import Child

FORGED = "2026-01-01 00:00:00,000 ERROR tinkerapi: the disk is on fire"

Log = Callable[..., str]


class Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Keeps the output of the configured handler."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self.addFilter(RepeatFilter())
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.written.append(self.format(record))


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def logger(handler: Handler) -> logging.Logger:
    logger = logging.Logger("tinkerapi.tests")
    logger.addHandler(handler)
    return logger


@pytest.mark.parametrize(
    "breaks", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\x1b[2K\r"]
)
def test_no_text_of_a_client_begins_a_line(
    logger: logging.Logger, handler: Handler, breaks: str
) -> None:
    logger.warning("no model %s", f"x{breaks}{FORGED}")
    try:
        raise ValueError(f"bad{breaks}{FORGED}")
    except ValueError:
        logger.exception("failed%s%s", breaks, FORGED)

    for text in handler.written:
        first, *more = text.splitlines()
        assert " tinkerapi.tests: " in first
        assert all(line.startswith("  | ") for line in more), text
        assert "\x1b" not in text


def test_what_is_not_printable_is_written_as_its_escape(
    logger: logging.Logger, handler: Handler
) -> None:
    logger.warning("%s", "\x00 \x1b[31mred \u202etxt \udc80 é 漢 😀")

    assert handler.written[0].endswith(": \\x00 \\x1b[31mred \\u202etxt \\udc80 é 漢 😀")
    handler.written[0].encode()


def test_one_record_has_an_end(logger: logging.Logger, handler: Handler) -> None:
    logger.warning("%s", "x" * 10**7)
    try:
        raise ValueError("y" * 10**7)
    except ValueError:
        logger.exception("failed")

    assert [len(text) < 25_000 for text in handler.written] == [True, True]
    assert "(10,000,000 characters)" in handler.written[0]


def test_one_place_writes_so_much_at_once_and_then_counts() -> None:
    now = 0.0
    repeats = RepeatFilter(clock=lambda: now)

    def record(line: int) -> logging.LogRecord:
        return logging.LogRecord("a", logging.WARNING, "a.py", line, "bad %s", ("thing",), None)

    def written(count: int, line: int = 1) -> list[str]:
        records = [record(line) for _ in range(count)]
        return [item.getMessage() for item in records if repeats.filter(item)]

    assert written(1000) == ["bad thing"] * AT_ONCE
    assert written(1, line=2) == ["bad thing"], "other places are heard"
    now += SECONDS_EACH
    assert written(1000) == [f"bad thing ({1000 - AT_ONCE} like this were left out)"]
    now += 1000 * SECONDS_EACH
    assert len(written(1000)) == AT_ONCE


def test_a_stream_of_bad_requests_writes_a_bounded_number_of_bytes(
    handler: Handler, client: Client
) -> None:
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        for _ in range(300):
            client.get("/admin/login/", headers={"Host": f"{'x' * 3000}\n{FORGED}"})
            client.get("/admin/login/", headers={"Host": "a b"})
    finally:
        root.removeHandler(handler)

    written = sum(map(len, handler.written))
    assert written < 300 * 200, "bytes a request, and fewer the more there are"


def test_a_log_that_is_written_to_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "MAX_LOG_BYTES", 20_000)
    log = tmp_path / "web.log"
    program = (
        "import sys, time\n"
        "for number in range(100000): print(f'line {number:06}', flush=True); time.sleep(0.0001)"
    )
    child = Child(
        "web",
        [sys.executable, "-c", program],
        dict(os.environ),
        log,
        stop_seconds=1.0,
        parent_death_signal="KILL",
        stop_rank=0,
    )
    child.start()
    try:
        sizes: list[int] = []

        def look() -> bool:
            assert child.ended() is None
            sizes.append(log.stat().st_size)
            return log.with_suffix(".log.1").exists() and len(sizes) > 3

        wait_for(look)
        wait_for(lambda: b"line" in log.read_bytes())
    finally:
        child.stop(lambda: True)

    assert not log.read_bytes().startswith(b"\0"), "cut, and written to from its new end"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web.log", "web.log.1"]
    assert child.crash_log().startswith("line ")


def test_a_disk_without_room_for_the_old_log_keeps_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_file, "MAX_LOG_BYTES", 10)
    monkeypatch.setattr(log_file.shutil, "copyfile", full)
    log = tmp_path / "web.log"
    log.write_text("x" * 11)

    assert log_rotate(log)

    assert log.read_text() == ""
    assert not log_rotate(log)


def json_records(logger: logging.Logger) -> list[dict[str, Any]]:
    """What a logger wrote, with the formatter for machines."""
    handler = logger.handlers[0]
    return [json.loads(line) for line in handler.written]  # type: ignore[attr-defined]


@pytest.fixture
def json_logger(handler: Handler, logger: logging.Logger) -> logging.Logger:
    handler.setFormatter(JsonFormatter("web"))
    return logger


def test_a_record_for_machines_has_its_fields(json_logger: logging.Logger) -> None:
    json_logger.warning("no model %s", "x", extra=about(run="run_1", owner=7, path=None))

    [record] = json_records(json_logger)

    logged_at = datetime.fromisoformat(record.pop("time"))
    assert abs((datetime.now(UTC) - logged_at).total_seconds()) < 60
    assert record == {
        "level": "WARNING",
        "logger": "tinkerapi.tests",
        "message": "no model x",
        "process": "web",
        "pid": os.getpid(),
        "run": "run_1",
        "owner": 7,
    }


@pytest.mark.parametrize(
    "breaks", ["\n", "\r\n", "\x85", "\u2028", "\x1b[2K\r", "\ud800", '"}\n{"']
)
def test_no_text_of_a_client_leaves_its_record(
    json_logger: logging.Logger, handler: Handler, breaks: str
) -> None:
    text = f"x{breaks}{FORGED}"
    try:
        raise ValueError(text)
    except ValueError:
        json_logger.exception("no model %s", text, extra=about(path=text))

    [line] = handler.written
    assert line.isascii()
    assert line.isprintable()
    [record] = json_records(json_logger)
    assert record["message"] == f"no model {text}"
    assert record["path"] == text
    assert record["traceback"].endswith(f"ValueError: {text}")


def test_a_record_for_machines_has_an_end(json_logger: logging.Logger, handler: Handler) -> None:
    json_logger.warning("x" * 10**6, extra=about(path="y" * 10**6))

    assert len(handler.written[0]) < 6_000


def test_the_format_is_a_setting() -> None:
    program = (
        "import django; django.setup(); import logging;"
        "from futures.log_fields import log_fields_of_process as about;"
        "about(worker=3); logging.getLogger('a').warning('b\\nc')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tinkerapi.settings",
            "TINKERAPI_LOG_FORMAT": "json",
        },
        capture_output=True,
        text=True,
        check=True,
    )

    [line] = done.stderr.splitlines()
    record = json.loads(line)
    assert (record["message"], record["worker"], record["process"]) == ("b\nc", 3, "cli")


def test_a_failure_of_the_server_says_whose_request_it_was(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("tinkerapi.api.quickref.views.service.base_models", fails)
    answer = api.get("/get_server_capabilities")

    [record] = [record for record in caplog.records if record.name == "tinkerapi.api.errors"]
    assert log_fields(record) == {
        "log_id": answer.json()["log_id"],
        "method": "GET",
        "path": "/get_server_capabilities",
        "owner": User.objects.get(username="local").pk,
    }


def test_every_process_writes_such_lines() -> None:
    program = (
        "import django; django.setup(); import logging;"
        "logging.getLogger('a').warning('b\\nc \\x1b'); logging.getLogger('a').info('d')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        capture_output=True,
        text=True,
        check=True,
    )

    first, second, third = done.stderr.splitlines()
    assert first.endswith(" WARNING a: b")
    assert second == "  | c \\x1b"
    assert third.endswith(" INFO a: d")
