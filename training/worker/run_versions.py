"""The names under which runs' weights are published to the sampler, and their lifetimes.

A name has the run and the last request whose effect is included, so it stands for one content: a
replay produces the same. A version is published when the first sample at these weights is submitted
and retired once the run has changed; the sampler keeps it for its unfinished samples.
"""

from __future__ import annotations

from collections.abc import Iterable

from training.engine.interface import Sampler, Trainer
from training.models import Run


class RunVersions:
    """The version of each run that is published, if one is."""

    def __init__(self, trainer: Trainer, sampler: Sampler) -> None:
        self._trainer = trainer
        self._sampler = sampler
        self._published: dict[str, str] = {}

    def publish(self, run: Run) -> str:
        """Publish the run's current weights, unless they are published; return the version's name.

        Its adapter must be in memory. Call it between its operations, with a row that shows which
        are applied.

        Raises:
            OutOfMemory: There is not enough memory for it.
        """
        version = _name(run)
        if self._published.get(run.id) != version:
            weights = self._trainer.capture_adapter(run.id, with_optimizer=False)
            self._sampler.publish(version, weights)
            self.retire(run.id)
            self._published[run.id] = version
        return version

    def moved_on(self, runs: Iterable[Run]) -> None:
        """Retire the published versions of runs that have changed since."""
        for run in runs:
            if self._published.get(run.id, _name(run)) != _name(run):
                self.retire(run.id)

    def retire(self, run_id: str) -> str | None:
        """Retire the version of a run whose adapter is evicted; return its name."""
        version = self._published.pop(run_id, None)
        if version is not None:
            self._sampler.retire(version)
        return version


def _name(run: Run) -> str:
    return f"{run.id}:{run.applied_seq_id}"
