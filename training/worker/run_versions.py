"""Under which names the weights of runs are published to the sampler, and until when.

A name says the run and the last request whose effect it holds, so it stands for one content: replay
makes the same of it. A version is published when the first sample at these weights is submitted
and retired once the run has moved on; the sampler keeps it for the samples that have not ended.
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
        """Publish the run's weights as they are now, unless they are; return the version's name.

        Its adapter is in memory. Call it between its operations, with a row that says which are
        applied.

        Raises:
            OutOfMemory: There is no room for it.
        """
        version = _name(run)
        if self._published.get(run.id) != version:
            weights = self._trainer.capture_adapter(run.id, with_optimizer=False)
            self._sampler.publish(version, weights)
            self.retire(run.id)
            self._published[run.id] = version
        return version

    def moved_on(self, runs: Iterable[Run]) -> None:
        """Retire what is published of runs that have changed since."""
        for run in runs:
            if self._published.get(run.id, _name(run)) != _name(run):
                self.retire(run.id)

    def retire(self, run_id: str) -> str | None:
        """Publish nothing more of a run, whose adapter leaves the memory; what was published."""
        version = self._published.pop(run_id, None)
        if version is not None:
            self._sampler.retire(version)
        return version


def _name(run: Run) -> str:
    return f"{run.id}:{run.applied_seq_id}"
