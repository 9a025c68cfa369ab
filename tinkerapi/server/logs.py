"""Log records that clients cannot forge, with a limit on repeated ones.

Clients' data reaches the log: paths, names, error texts. So unprintable characters are
escaped, and every line after the first begins with a mark that no first line has.
Clients could also flood the log, so each place in the code may write some records at once and then
a few a minute, with the number of those that were left out.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Lock

from futures.log_fields import log_fields

MAX_MESSAGE = 4_000
MAX_REQUEST = 300
MAX_TRACEBACK = 20_000
CONTINUATION = "\n  | "

AT_ONCE = 50
SECONDS_EACH = 5.0  # between records of a place that has used its burst

_UNPRINTABLE = re.compile(
    # C0 and C1 except the line break, line separators, text direction marks, surrogates
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class LineFormatter(logging.Formatter):
    """Time, level, logger and message; further lines, of a traceback for example, are marked."""

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname} {name}: {message}", style="{")

    def format(self, record: logging.LogRecord) -> str:
        """The whole text of a record."""
        head = f"{self.formatTime(record)} {record.levelname} {record.name}: "
        # Django's records repeat the request's data; for a bad Host header they have a traceback,
        # although the server has no error.
        limit = MAX_REQUEST if record.name.startswith("django.") else MAX_MESSAGE
        parts = [_cut_end(record.getMessage(), limit)]
        if record.exc_info and not record.name.startswith("django.security"):
            parts.append(_cut_middle(self.formatException(record.exc_info), MAX_TRACEBACK))
        if record.stack_info:
            parts.append(_cut_middle(self.formatStack(record.stack_info), MAX_TRACEBACK))
        return head + printable("\n".join(parts))


class JsonFormatter(logging.Formatter):
    """One JSON object for each record: time in UTC, level, logger, message and, where known,
    traceback, process, worker, base_model, run, owner, log_id, method, path."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The object as one line of ASCII, which nothing in it can leave."""
        limit = MAX_REQUEST if record.name.startswith("django.") else MAX_MESSAGE
        time_ = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": time_,
            "level": record.levelname,
            "logger": record.name,
            "message": _cut_end(record.getMessage(), limit),
            "process": self._process,
            "pid": record.process,
            **{name: _field(value) for name, value in log_fields(record).items()},
        }
        if record.exc_info and not record.name.startswith("django.security"):
            fields["traceback"] = _cut_middle(self.formatException(record.exc_info), MAX_TRACEBACK)
        if record.stack_info:
            fields["stack"] = _cut_middle(self.formatStack(record.stack_info), MAX_TRACEBACK)
        return json.dumps(fields)


def _field(value: object) -> object:
    return value if isinstance(value, int | float) else _cut_end(str(value), MAX_REQUEST)


def printable(text: str) -> str:
    """The text with unprintable characters escaped, and a mark before each further line."""
    return _UNPRINTABLE.sub(_escape, text).replace("\n", CONTINUATION)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return "\t" if code == 9 else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _cut_end(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text):,} characters)"


def _cut_middle(text: str, limit: int) -> str:
    """The beginning and the end, which have the place and the error."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n... ({len(text):,} characters)\n{text[-limit // 2 :]}"


class RepeatFilter(logging.Filter):
    """Limits the records of each place in the code; a later one has the number of dropped ones.

    For a handler, so that it counts only records that would be written.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = Lock()
        self._places: dict[tuple[str, int, int], _Place] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record, and add the number of dropped ones to its message."""
        with self._lock:
            key = (record.pathname, record.lineno, record.levelno)
            place = self._places.setdefault(key, _Place(self._clock()))
            left_out = place.take(self._clock())
        if left_out is None:
            return False
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out:,} like this were left out)"
            record.args = None
        return True


class _Place:
    """The remaining budget of one place in the code."""

    def __init__(self, now: float) -> None:
        self._left = float(AT_ONCE)
        self._at = now
        self._left_out = 0

    def take(self, now: float) -> int | None:
        """None if this record is dropped; otherwise the number dropped before it."""
        self._left = min(AT_ONCE, self._left + (now - self._at) / SECONDS_EACH)
        self._at = now
        if self._left < 1:
            self._left_out += 1
            return None
        self._left -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out
