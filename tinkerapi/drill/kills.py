"""A plan of kills fixed by a seed, and the thread that carries it out.

Kills are spread over the whole job by its progress, and within a step they aim at the worst moments
(``moments``). The signal is SIGKILL, which no process can handle.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Literal

from futures.lost_workers import MAX_INTERRUPTIONS
from tinkerapi.drill.moments import MOMENTS, Aim, Moment
from tinkerapi.drill.server import DrilledServer
from tinkerapi.drill.transport import Progress
from tinkerapi.server.up_process import Process

Target = Literal["worker", "vllm", "web", "web child", "postgres", "postgres backend", "everything"]

TARGETS: dict[Target, int] = {
    "worker": 50,
    "postgres": 14,
    "web": 10,
    "web child": 8,
    "postgres backend": 8,
    "everything": 10,
}
"""Share of kills, in percent."""

TARGETS_WITH_VLLM: dict[Target, int] = {**TARGETS, "worker": 30, "vllm": 20}
"""The same if a vLLM server samples."""

MOST_IN_A_ROW = MAX_INTERRUPTIONS // 2
"""Kills without an answer between them. A request that cannot be told from one that ends the
machine each time is given up in the end, as it should be; the drill is about all others."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill of the plan."""

    target: Target
    moment: Moment
    after_answers: int
    """It waits for this progress of the job."""
    delay_seconds: float
    """Delay after the moment."""


@dataclass(frozen=True, kw_only=True)
class Killed:
    """One kill that was carried out."""

    kill: Kill
    at: datetime
    aimed: bool
    """Whether it hit its moment; else it came at an arbitrary time."""


def plan_kills(
    *, seed: int, kills: int, requests: int, shares: Mapping[Target, int] = TARGETS
) -> list[Kill]:
    """``kills`` kills in order of progress; targets in their shares, random moments."""
    random = Random(f"{seed} kills")  # noqa: S311  (a plan that can be repeated)
    targets = _targets(kills, shares)
    random.shuffle(targets)
    # No kills in the last tenth, so that none comes after the end of the job.
    places = sorted(random.randrange(max(1, requests * 9 // 10)) for _ in targets)
    plan: list[Kill] = []
    for target, place in zip(targets, places, strict=True):
        moment = random.choice(list(MOMENTS))
        if not plan and moment == "recovery":
            moment = "anytime"
        longest = MOMENTS[moment]
        plan.append(
            Kill(
                target=target,
                moment=moment,
                after_answers=plan[-1].after_answers if moment == "recovery" else place,
                delay_seconds=random.uniform(0, longest),
            )
        )
    return plan


def _targets(kills: int, shares: Mapping[Target, int]) -> list[Target]:
    """Targets for all kills in these proportions, largest remainders rounded up."""
    exact = {target: kills * share / 100 for target, share in shares.items()}
    counts = {target: int(number) for target, number in exact.items()}
    by_remainder = sorted(exact, key=lambda target: counts[target] - exact[target])
    for target in by_remainder[: kills - sum(counts.values())]:
        counts[target] += 1
    return [target for target, count in counts.items() for _ in range(count)]


Say = Callable[[int, Killed], None]
"""Called with each kill and the number of answers at that time."""


class Killer:
    """Carries out a plan against one server while its clients work."""

    def __init__(
        self,
        server: DrilledServer,
        progress: Progress,
        *,
        seed: int,
        say: Say,
    ) -> None:
        self._server = server
        self._progress = progress
        self._aim = Aim(server.data_dir, progress)
        self._random = Random(f"{seed} victims")  # noqa: S311
        self._say = say
        self._answered: list[int] = []
        """The answers at each kill."""
        self.done: list[Killed] = []
        self.error = ""
        """Why the plan could not be completed."""

    def run(self, plan: Iterable[Kill]) -> None:
        """Carry out all kills in order; ends early when the clients end. Never raises."""
        try:
            for kill in plan:
                self._wait_for_answers(max(kill.after_answers, self._answers_needed()))
                if self._progress.is_over:
                    return
                self._carry_out(kill)
        except Exception as error:  # a thread must report its failure
            self.error = f"killer: {type(error).__name__}: {error}"

    def _answers_needed(self) -> int:
        """Before the next kill: one more than at the first of the last few."""
        return self._answered[-MOST_IN_A_ROW] + 1 if len(self._answered) >= MOST_IN_A_ROW else 0

    def _wait_for_answers(self, number: int) -> None:
        self._progress.wait_for(lambda: self._progress.answered >= number, None)

    def _carry_out(self, kill: Kill) -> None:
        pid = self._find(kill.target)
        aimed = self._aim.wait_for(kill.moment)
        time.sleep(kill.delay_seconds)
        while not self._strike(kill.target, pid):  # it died for another reason meanwhile
            if self._progress.is_over:
                return
            pid = self._find(kill.target)
        killed = Killed(kill=kill, at=datetime.now(UTC), aimed=aimed)
        self.done.append(killed)
        self._answered.append(self._progress.answered)
        self._say(self._answered[-1], killed)

    def _strike(self, target: Target, pid: int) -> bool:
        """Kill; False if the process was gone."""
        if target == "everything":
            self._server.kill()
            return True
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    def _find(self, target: Target) -> int:
        """Wait for a process of this kind; 0 when the job has ended."""
        while not self._progress.is_over:
            found = [p.pid for p in self._server.processes() if _is(target, p, self._server)]
            if found:
                return self._random.choice(found)
            time.sleep(0.05)
        return 0


def _is(target: Target, process: Process, server: DrilledServer) -> bool:
    """Whether the process is of this kind; ``up``'s direct children are the supervised parts."""
    assert server.process is not None  # noqa: S101
    is_part = process.parent == server.process.pid
    command = process.command
    match target:
        case "worker":
            # Any of its ranks. django-q2 renames the process if setproctitle is installed.
            is_first = command.startswith("qcluster") or " engineworker" in command
            return (is_part and is_first) or "training.engine.group.follower" in command
        case "vllm":
            # The server that answers, or its engine's process.
            return "vllm.entrypoints" in command or "EngineCore" in command
        case "web":
            return is_part and "granian" in command
        case "web child":
            return not is_part and "granian" in command
        case "postgres":
            return is_part and "/postgres " in command
        case "postgres backend":
            return command.startswith("postgres: ") and " tinkerapi " in command
        case "everything":
            return is_part
