"""Rebuilds a run's adapter from its log: the same requests in the same order.

The effect of each request on the adapter is defined once, in its kind's ``apply``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import cast

from futures.models import Future
from futures.transitions import State
from training.engine.interface import Trainer
from training.errors import RunLost, TrainingError
from training.kinds import REQUESTS, CreateRun, ForwardBackward, Order
from training.models import Run
from training.worker.kinds import BARRIERS, forward_backward
from training.worker.kinds.barrier import LoggedBarrier
from training.worker.kinds.forward_backward import TakeTokens
from training.worker.requests import request_of


class Replay:
    """Applies committed futures again."""

    def __init__(self, trainer: Trainer, render: TakeTokens, on_turn: Callable[[], None]) -> None:
        """
        Args:
            render: The tokens that a request had when it was first computed.
            on_turn: Called whenever the replay makes progress.
        """
        self._trainer = trainer
        self._render = render
        self._on_turn = on_turn

    def __call__(self, run: Run, log: Sequence[Future]) -> None:
        """Bring the run's adapter, from its snapshot or not in memory yet, to the log's end.

        Consecutive requests that shared a batch share it again.

        Raises:
            RunLost: The adapter is not in memory and the log does not begin with its creation.
            TrainingError: A request cannot be computed again.
        """
        if run.id not in self._trainer.adapter_names() and (
            not log or log[0].kind != CreateRun.kind
        ):
            raise RunLost("its snapshots are missing and the beginning of its log was pruned")
        for (_, _, kind), group in groupby(log, key=lambda f: (f.worker_id, f.batch, f.kind)):
            self._on_turn()
            if REQUESTS[kind].order is Order.PASS:
                self._apply_passes(run, list(group))
            else:
                for future in group:
                    self._apply_barrier(run, future)

    def _apply_passes(self, run: Run, futures: Sequence[Future]) -> None:
        requests = [
            (run.id, future, cast(ForwardBackward, request_of(future))) for future in futures
        ]
        for answer in forward_backward.apply(self._trainer, requests, self._render, is_replay=True):
            if isinstance(answer.output, TrainingError):
                raise answer.output

    def _apply_barrier(self, run: Run, future: Future) -> None:
        barrier = BARRIERS[future.kind]
        if not isinstance(barrier, LoggedBarrier):
            raise TypeError(f"{future.kind} is not logged")
        request = request_of(future)
        if future.state == State.FAILED:
            barrier.apply_failed(self._trainer, run, request)
        else:
            barrier.apply(self._trainer, run, request)
