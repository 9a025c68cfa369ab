"""The effects of a batch, to be committed in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from futures.finishing import Outcome
from futures.models import Future
from training.errors import TrainingError
from training.models import Run
from training.services.rollouts import RenderedRequest, rendered_record
from training.worker import outcomes


@dataclass
class Effects:
    """The outcomes of a batch and what belongs to them."""

    outcomes: list[Outcome] = field(default_factory=list)
    writes: list[tuple[Future, Callable[[], None]]] = field(default_factory=list)
    """Row changes that belong to the outcomes of these futures; called inside the commit's
    transaction. A domain error that one raises becomes its future's failure."""
    rendered: list[RenderedRequest] = field(default_factory=list)
    """The tokens of requests that were sent as text, which are kept for people."""
    runs: list[Run] = field(default_factory=list)
    """The batch's runs, with their rows after its operations."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Run id -> work that a crash would repeat."""
    after_commit: list[Callable[[], None]] = field(default_factory=list)

    def changed(self, run: Run, future: Future, seconds: float) -> None:
        """Record that a logged request changed a run, and its duration."""
        run.applied_seq_id = future.seq_id or 0
        self.seconds[run.id] = self.seconds.get(run.id, 0.0) + seconds

    def write(self) -> None:
        """Change the rows, inside the commit's transaction and before the outcomes are written:
        a row may belong to another future by now."""
        rendered_record(self.rendered)
        for future, write in self.writes:
            try:
                write()
            except TrainingError as error:
                self.outcomes = [o for o in self.outcomes if o.request_id != future.id]
                self.outcomes.append(outcomes.failed(future, error))
