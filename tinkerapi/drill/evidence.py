"""What a run leaves behind, as plain values, and how that of two runs differs.

Answers as the clients got them, futures as rows, checkpoints as bytes. What may differ is left
out: ids that are drawn, times, which worker it was and how often it was tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tinkerapi.drill.server import connect

SHOWN = 160  # characters of each side of a difference
BEFORE = 40  # of these, that are equal

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
    """All that must be equal, each by a name that both runs share."""

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
    """What happened on the way, for the table; it need not be equal."""

    workers: int
    """Worker lives."""
    repeated: int
    """Futures whose first worker died while it held them."""
    results: list[tuple[datetime, datetime]]
    """When the worker of a future began, and when the future was finished; by the latter."""

    def recovery_seconds(self, killed_at: datetime, until: datetime | None) -> float | None:
        """From the kill of a worker to the next result of a later one; None if there was none
        before ``until``, the next kill."""
        for worker_started_at, finished_at in self.results:
            if until is not None and finished_at >= until:
                return None
            if worker_started_at > killed_at:
                return (finished_at - killed_at).total_seconds()
        return None


def collect(
    data_dir: Path, answers: Mapping[str, str], aliases: Mapping[str, str]
) -> tuple[Evidence, History]:
    """Read everything of a run while its Postgres still runs.

    Args:
        answers: The clients', by request name.
        aliases: Drawn names -> the names that both runs share.
    """
    with connect(data_dir) as connection:
        futures = {
            _alias(f"{lane} {place} {key}", aliases): f"{kind} {state} {error}".strip()
            for lane, place, key, kind, state, error in connection.execute(_FUTURES)
        }
        checkpoints = {
            _alias(f"{run}/{kind}/{name} step {step} {path.name}", aliases): _sha256(path)
            for run, kind, name, step, directory in connection.execute(_CHECKPOINTS)
            for path in sorted((data_dir / directory).iterdir())
        }
        results = connection.execute(_HISTORY).fetchall()
        [(workers, repeated)] = connection.execute(_FIGURES).fetchall()
    evidence = Evidence(answers=dict(answers), futures=futures, checkpoints=checkpoints)
    return evidence, History(workers=workers, repeated=repeated, results=results)


def incomplete(evidence: Evidence, *, requests: int, failures: int) -> list[str]:
    """A sentence for each count that is not what the job asked for: two runs that both lost
    everything would be equal too."""
    failed = sum(" failed " in value for value in evidence.futures.values())
    counts = {
        "answers": (len(evidence.answers), requests),
        "futures": (len(evidence.futures), requests),
        "failed futures": (failed, failures),
    }
    return [
        f"{what}: there are {there}, and there should be {wanted}"
        for what, (there, wanted) in counts.items()
        if there != wanted
    ]


def differences(unbroken: Evidence, broken: Evidence) -> list[str]:
    """A sentence for each difference; none if the runs are the same."""
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
    """Both sides, from shortly before they begin to differ."""
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
