"""Passes of several requests side by side: each linear layer is computed once for all of them.

A pass of a few rows reads all weights of the model, which takes most of its time. But passes over
caches of different lengths cannot be one rectangle. So each runs in a thread of its own, one at a
time: at a linear layer it waits until all others have come to theirs, and the rows of all go
through the layer together. Everything else (attention, recurrent states, norms) stays separate, so
a request's numbers are what they are alone: to the bit on a CPU, where a row of a product does not
depend on the others (``row_padding``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.engine.torch.packing.stream import (
    ContextHolder,
    PassContext,
    Segment,
    SingleContext,
)


class Layer(Protocol):
    """A linear layer that computes rows of several adapters."""

    def together(self, rows: Tensor, context: PassContext) -> Tensor:
        """(T, out) of rows (T, in), without a gradient."""


class _Abandoned(BaseException):
    """Unwinds a pass after another one has failed."""


@dataclass(kw_only=True, eq=False)
class _Pass:
    """One of the passes, in its thread."""

    run: Callable[[], Tensor]
    may_run: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    layer: Layer | None = None
    """The layer at which it waits; None before the first and after the last."""
    context: SingleContext | None = None
    rows: Tensor | None = None
    """The layer's input (n, in), then its output (n, out)."""
    result: Tensor | None = None
    error: BaseException | None = None


class SideBySide:
    """The passes that are under way; none outside of ``run``."""

    def __init__(self, holder: ContextHolder) -> None:
        self._holder = holder
        self._current: _Pass | None = None
        self._has_stopped = threading.Semaphore(0)
        self._is_abandoned = False

    def run(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of the passes, in order.

        Raises:
            BaseException: The first exception of a pass; the others are given up.
        """
        if len(passes) == 1:
            return [passes[0]()]
        under_way = [_Pass(run=run) for run in passes]
        threads = [threading.Thread(target=self._run, args=(each,)) for each in under_way]
        self._has_stopped = threading.Semaphore(0)
        self._is_abandoned = False
        self._holder.beside = self
        try:
            for each, thread in zip(under_way, threads, strict=True):
                thread.start()
                self._continue(each)
            while waiting := [each for each in under_way if each.layer is not None]:
                waiting = [each for each in waiting if each.layer is waiting[0].layer]
                _compute(waiting)
                for each in waiting:
                    self._continue(each)
        finally:
            self._is_abandoned = True
            for each, thread in zip(under_way, threads, strict=True):
                each.may_run.release()
                if thread.ident is not None:
                    thread.join()
            self._holder.beside = None
        return [each.result for each in under_way if each.result is not None]

    def product(self, layer: Layer, rows: Tensor, context: SingleContext) -> Tensor:
        """(n, out) of a layer's rows (n, in); called by the layers of the passes."""
        own = self._current
        assert own is not None  # noqa: S101 - a layer is only called inside of a pass
        own.layer, own.rows, own.context = layer, rows, context
        if not self._is_abandoned:
            self._has_stopped.release()
            own.may_run.acquire()
        if self._is_abandoned:
            raise _Abandoned
        return own.rows

    def _continue(self, one: _Pass) -> None:
        """Let a pass run up to its next linear layer or its end."""
        self._current, one.layer = one, None
        one.may_run.release()
        self._has_stopped.acquire()
        if one.error is not None:
            raise one.error

    def _run(self, own: _Pass) -> None:
        own.may_run.acquire()
        try:
            with torch.no_grad():
                own.result = own.run()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again in the caller's thread
            own.error = error
        self._has_stopped.release()


def _compute(waiting: Sequence[_Pass]) -> None:
    """Replace the rows of passes that wait at one layer by the layer's output."""
    parts, segments, end = [], [], 0
    for each in waiting:
        assert each.rows is not None and each.context is not None  # noqa: S101, PT018
        missing = each.context.enough_rows(len(each.rows)) - len(each.rows)
        parts.append(pad(each.rows, (0, 0, 0, missing)))
        start, end = end, end + len(parts[-1])
        segments.append(Segment(start=start, end=end, weights=each.context.weights))
    layer = waiting[0].layer
    assert layer is not None  # noqa: S101
    outputs = layer.together(torch.cat(parts), PassContext(segments=segments))  # (T, out)
    for each, segment in zip(waiting, segments, strict=True):
        assert each.rows is not None  # noqa: S101
        each.rows = outputs[segment.start : segment.start + len(each.rows)]
