"""The state that a run leaves, as plain values, and the differences between two runs.

Answers as the clients got them, futures as rows, checkpoints as bytes. Values that may differ are
left
out: random ids, times, worker numbers and attempts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tinkerapi.drill.server import connect
from training.storage.interface import Storage

SHOWN = 160  # characters of each side of a difference
BEFORE = 40  # of these, before the first difference

_FUTURES = """
SELECT coalesce(run.name, future.lane_id, ''), future.seq_id,
    coalesce(future.idempotency_key, ''), future.kind, future.state, future.error_code
FROM futures_future AS future LEFT JOIN training_run AS run ON run.id = future.lane_id
ORDER BY 1, 2, 3
"""

_CHECKPOINTS = """
SELECT run.name, checkpoint.kind, checkpoint.name, checkpoint.step, checkpoint.directory
FROM training_checkpoint AS checkpoint JOIN training_run AS run ON run.id = checkpoint.run_id
ORDER BY 1, 2, 3
"""

_HISTORY = """
SELECT worker.started_at, future.finished_at
FROM futures_future AS future JOIN futures_worker AS worker ON worker.id = future.worker_id
WHERE future.finished_at IS NOT NULL ORDER BY future.finished_at
"""

_FIGURES = """
SELECT (SELECT count(*) FROM futures_worker),
    (SELECT count(*) FROM futures_future WHERE attempts + interruptions > 0)
"""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All values that must be equal, by names that both runs share."""

    answers: Mapping[str, str]
    """Request -> its final answer, word for word."""
    futures: Mapping[str, str]
    """Lane and place, or key, -> kind, state and error; one for each submission."""
    checkpoints: Mapping[str, str]
    """Path and file -> SHA-256 of its bytes."""

    @property
    def size(self) -> dict[str, int]:
        return {name: len(value) for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class History:
    """Events of a run, for the table; they need not be equal."""

    workers: int
    """Worker lives."""
    repeated: int
    """Futures whose first worker died while it held them."""
    results: list[tuple[datetime, datetime]]
    """Start of a future's worker and end of the future, sorted by the latter."""

    def recovery_seconds(self, killed_at: datetime, until: datetime | None) -> float | None:
        """Seconds from the kill of a worker to the next result of a later worker; None if there was
        none before ``until``, the next kill."""
        for worker_started_at, finished_at in self.results:
            if until is not None and finished_at >= until:
                return None
            if worker_started_at > killed_at:
                return (finished_at - killed_at).total_seconds()
        return None


def collect(
    data_dir: Path, storage: Storage, answers: Mapping[str, str], aliases: Mapping[str, str]
) -> tuple[Evidence, History]:
    """Read the complete state of a run while its Postgres still runs.

    Args:
        answers: The clients' answers by request name.
        aliases: Random names -> the names that both runs share.
    """
    with connect(data_dir) as connection:
        futures = {
            _alias(f"{lane} {place} {key}", aliases): f"{kind} {state} {error}".strip()
            for lane, place, key, kind, state, error in connection.execute(_FUTURES)
        }
        checkpoints = {}
        for run, kind, name, step, directory in connection.execute(_CHECKPOINTS):
            with storage.local(directory) as folder:
                for path in sorted(folder.iterdir()):
                    named = _alias(f"{run}/{kind}/{name} step {step} {path.name}", aliases)
                    checkpoints[named] = _sha256(path)
        results = connection.execute(_HISTORY).fetchall()
        [(workers, repeated)] = connection.execute(_FIGURES).fetchall()
    evidence = Evidence(answers=dict(answers), futures=futures, checkpoints=checkpoints)
    return evidence, History(workers=workers, repeated=repeated, results=results)


def incomplete(evidence: Evidence, *, requests: int, failures: int) -> list[str]:
    """A message for each count that does not match the job: two runs that both lost
    everything would be equal too."""
    failed = sum(" failed " in value for value in evidence.futures.values())
    counts = {
        "answers": (len(evidence.answers), requests),
        "futures": (len(evidence.futures), requests),
        "failed futures": (failed, failures),
    }
    return [
        f"{what}: found {there}, expected {wanted}"
        for what, (there, wanted) in counts.items()
        if there != wanted
    ]


def differences(unbroken: Evidence, broken: Evidence) -> list[str]:
    """A message for each difference; none if the runs are equal."""
    return [
        f"{what}: {name}: " + _contrast(one, other)
        for what in ("answers", "futures", "checkpoints")
        for name, one, other in _unequal(getattr(unbroken, what), getattr(broken, what))
    ]


def _unequal(
    one: Mapping[str, str], other: Mapping[str, str]
) -> Iterable[tuple[str, str | None, str | None]]:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield name, one.get(name), other.get(name)


def _contrast(unbroken: str | None, broken: str | None) -> str:
    """Both sides, from shortly before the first difference."""
    one, other = unbroken or "nothing", broken or "nothing"
    pairs = enumerate(zip(one, other, strict=False))
    equal = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    begin = max(0, equal - BEFORE)
    return f"unbroken ...{one[begin:][:SHOWN]}, broken ...{other[begin:][:SHOWN]}"


def _alias(name: str, aliases: Mapping[str, str]) -> str:
    for drawn, shared in aliases.items():
        name = name.replace(drawn, shared)
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
