"""A drill's report: a table for the reader, and the same as JSON."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from tinkerapi.drill.kills import TARGETS_WITH_VLLM, Kill
from tinkerapi.drill.moments import MOMENTS
from tinkerapi.drill.run import Outcome


@dataclass(frozen=True, kw_only=True)
class DrillReport:
    """The undisturbed and the disturbed run of one job, side by side."""

    unbroken: Outcome
    broken: Outcome
    plan: Sequence[Kill]
    differences: Sequence[str]
    replays: int
    """Times that a worker rebuilt a run from its log."""
    settings: dict[str, Any]

    @property
    def recoveries(self) -> list[float]:
        """Seconds from each kill of a worker to the next result of a later worker."""
        killed = self.broken.killed
        found = [
            self.broken.history.recovery_seconds(
                item.at, until=killed[place + 1].at if place + 1 < len(killed) else None
            )
            for place, item in enumerate(killed)
            if item.kill.target == "worker"
        ]
        return [seconds for seconds in found if seconds is not None]

    @property
    def is_good(self) -> bool:
        """Whether every planned kill was carried out and nothing differs."""
        return not self.differences and len(self.broken.killed) == len(self.plan)

    def rows(self) -> list[tuple[str, str]]:
        """Figure and value, in the order of the table."""
        killed, size = self.broken.killed, self.broken.evidence.size
        targets = Counter(item.kill.target for item in killed)
        moments = Counter(item.kill.moment if item.aimed else "anytime" for item in killed)
        recoveries = self.recoveries
        return [
            ("kills", f"{len(killed)} of {len(self.plan)} planned"),
            *((f"  of {name}", str(targets[name])) for name in TARGETS_WITH_VLLM if targets[name]),
            *((f"  at: {name}", str(moments[name])) for name in MOMENTS if moments[name]),
            ("answers compared", str(size["answers"])),
            ("futures compared", str(size["futures"])),
            ("checkpoint files compared", str(size["checkpoints"])),
            ("differences", str(len(self.differences))),
            ("worker lives", str(self.broken.history.workers)),
            ("rebuilds by replay", str(self.replays)),
            ("futures that ran again", str(self.broken.history.repeated)),
            ("requests sent again", str(self.broken.resent)),
            (
                "worker killed to next result, median and worst",
                f"{statistics.median(recoveries):.1f} s, {max(recoveries):.1f} s"
                if recoveries
                else "not measured",
            ),
            ("worst wait of a client", f"{self.broken.worst_pause_seconds:.1f} s"),
            ("unbroken run", f"{self.unbroken.seconds:.1f} s"),
            ("broken run", f"{self.broken.seconds:.1f} s"),
        ]

    def to_json(self) -> dict[str, Any]:
        """The stored form: the table, and the conditions of the measurement."""
        return {
            "rows": [{"figure": name.strip(), "value": value} for name, value in self.rows()],
            "settings": self.settings,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("django", "torch", "transformers")},
            },
        }
