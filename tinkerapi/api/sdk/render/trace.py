"""The timeline of a session or a run in the trace event format, which Perfetto and Chrome open.

Three kinds of rows: the requests of each lane while a worker ran them, their waits before that, and
the workers' batches. It is made and sent page by page, so its length costs no memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from futures.models import Future
from tinkerapi.api import threads
from training.timeline import timeline_page

_FACTS = ("tokens", "loss", "step", "grad_norm", "path")
LANES, WORKERS = 1, 2
"""Processes of the trace."""

Event = dict[str, Any]


async def trace_pieces(
    about: dict[str, str], lanes: Callable[[], list[str]]
) -> AsyncIterator[bytes]:
    """The trace as JSON, in pieces.

    Args:
        about: What it is of, such as ``{"session": ID}``.
        lanes: Reads its lanes.
    """
    yield b'{"displayTimeUnit":"ms","otherData":' + orjson.dumps(about) + b',"traceEvents":[\n'
    yield _joined(_names(LANES, "requests") + _names(WORKERS, "workers"), first=True)
    rows = Rows()
    for lane_id in await threads.in_database_thread(lanes):
        lane = LaneEvents(lane_id, rows)
        while piece := await threads.in_database_thread(_next_piece, lane):
            yield piece
        yield _joined(list(lane.rest()))
    yield b"\n]}\n"


def _next_piece(lane: LaneEvents) -> bytes:
    """The events of a lane's next requests; empty at the end. Runs in a thread, because making them
    takes longer than other requests can wait for the event loop."""
    page = timeline_page(lane.lane_id, after=lane.after)
    return _joined([event for future in page for event in lane.events(future)])


def _joined(events: Sequence[Event], *, first: bool = False) -> bytes:
    text = b",\n".join(orjson.dumps(event) for event in events)
    return text if first or not text else b",\n" + text


def _names(pid: int, name: str) -> list[Event]:
    return [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}]


class Rows:
    """Numbers the rows of a trace; a new one is named by an event."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str], int] = {}

    def row(self, pid: int, name: str) -> tuple[int, list[Event]]:
        """The row's number, and the events that name it if it is new."""
        if number := self._numbers.get((pid, name)):
            return number, []
        number = self._numbers[pid, name] = len(self._numbers) + 1
        place = {"ph": "M", "pid": pid, "tid": number}
        return number, [
            {**place, "name": "thread_name", "args": {"name": name}},
            {**place, "name": "thread_sort_index", "args": {"sort_index": number}},
        ]


@dataclass
class _Batch:
    worker: int
    number: int
    begin: int
    end: int
    kinds: dict[str, int] = field(default_factory=dict)


class LaneEvents:
    """The events of one lane's requests, which come in the order of their seq ids."""

    def __init__(self, lane_id: str, rows: Rows) -> None:
        self.lane_id = lane_id
        self.after = -1
        """The seq id of the last request."""
        self._rows = rows
        self._slots: list[tuple[int, int]] = []
        """Begin and end of the last request in each row; requests that overlap have several."""
        self._batches: dict[tuple[int, int], _Batch] = {}
        """Those that may have further requests of this lane."""

    def events(self, future: Future) -> Iterator[Event]:
        """Of one request: its row if that is new, its wait, its run; then complete batches."""
        self.after = int(future.seq_id or 0)
        asked = _microseconds(future.created_at)
        begin = _microseconds(future.started_at or future.created_at)
        end = max(begin, _microseconds(future.finished_at or future.created_at))
        slot = self._slot(begin, end)
        name = self.lane_id if slot == 0 else f"{self.lane_id} ({slot + 1})"
        row, named = self._rows.row(LANES, name)
        yield from named
        place = {"pid": LANES, "tid": row}
        if begin > asked:
            wait = {"name": "waits", "cat": "wait", "id": future.id, **place}
            yield {**wait, "ph": "b", "ts": asked, "args": {"kind": future.kind}}
            yield {**wait, "ph": "e", "ts": begin}
        yield {
            "ph": "X",
            "name": future.kind,
            "cat": future.state,
            **place,
            "ts": begin,
            "dur": end - begin,
            "args": _facts(future, waited_seconds=(begin - asked) / 1e6),
        }
        yield from self._completed(before=asked)
        if future.worker_id is not None and future.batch is not None:
            key = (future.worker_id, future.batch)
            batch = self._batches.setdefault(key, _Batch(*key, begin=begin, end=end))
            batch.begin, batch.end = min(batch.begin, begin), max(batch.end, end)
            batch.kinds[future.kind] = batch.kinds.get(future.kind, 0) + 1

    def rest(self) -> Iterator[Event]:
        """The batches that are left at the end."""
        yield from self._completed(before=None)

    def _slot(self, begin: int, end: int) -> int:
        """The first row in which the request overlaps no other in part."""
        for number, last in enumerate(self._slots):
            if begin >= last[1] or last == (begin, end):
                self._slots[number] = (begin, end)
                return number
        self._slots.append((begin, end))
        return len(self._slots) - 1

    def _completed(self, *, before: int | None) -> Iterator[Event]:
        """The batches that ended before a request was submitted have no further ones."""
        for key, batch in list(self._batches.items()):
            if before is None or batch.end < before:
                del self._batches[key]
                yield from self._batch_events(batch)

    def _batch_events(self, batch: _Batch) -> Iterator[Event]:
        row, named = self._rows.row(WORKERS, f"worker {batch.worker}")
        yield from named
        # Other lanes have parts of the same batch, which may overlap: no bars, but spans.
        span = {
            "name": ", ".join(f"{number} {kind}" for kind, number in batch.kinds.items()),
            "cat": "batch",
            "id": f"{batch.worker}.{batch.number} {self.lane_id}",
            "pid": WORKERS,
            "tid": row,
        }
        facts = {"batch": batch.number, "lane": self.lane_id}
        yield {**span, "ph": "b", "ts": batch.begin, "args": facts}
        yield {**span, "ph": "e", "ts": batch.end}


def _facts(future: Future, *, waited_seconds: float) -> dict[str, Any]:
    return {
        "request_id": future.id,
        "seq_id": future.seq_id,
        "waited_seconds": waited_seconds,
        "worker": future.worker_id,
        "batch": future.batch,
        **{name: future.summary[name] for name in _FACTS if name in future.summary},
        **({"error": future.error} if future.error else {}),
    }


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)
