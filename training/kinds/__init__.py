"""The kinds of requests: stored form and order of each.

The execution of a kind is in the module of its name in ``training.worker.kinds``. A
new kind is a member of ``Kind``, a module here, one there, and a line in each of the two tables.
"""

from __future__ import annotations

from collections.abc import Mapping

from futures.payload import decode
from training.kinds.compare_runs import CompareRuns
from training.kinds.create_custom_loss import CreateCustomLoss
from training.kinds.create_run import CreateRun
from training.kinds.forward_backward import Forward, ForwardBackward
from training.kinds.load_weights import LoadWeights
from training.kinds.optim_step import OptimStep
from training.kinds.remove_run import RemoveRun
from training.kinds.request import Kind, Order, Request
from training.kinds.sample import Sample
from training.kinds.save_weights import SaveWeights

__all__ = [
    "LOGGED",
    "REQUESTS",
    "CompareRuns",
    "CreateCustomLoss",
    "CreateRun",
    "Forward",
    "ForwardBackward",
    "Kind",
    "LoadWeights",
    "OptimStep",
    "Order",
    "RemoveRun",
    "Request",
    "Sample",
    "SaveWeights",
    "stored_request",
]

REQUESTS: Mapping[str, type[Request]] = {
    request.kind: request
    for request in (
        CreateRun,
        RemoveRun,
        Forward,
        ForwardBackward,
        OptimStep,
        Sample,
        SaveWeights,
        LoadWeights,
        CompareRuns,
    )
}
"""Every kind that a worker runs."""

LOGGED = frozenset(kind for kind, request in REQUESTS.items() if request.is_logged)
"""Kinds that change a run's state, so that replaying them in order rebuilds it."""


def stored_request(kind: str, payload: bytes) -> Request:
    """The request that a future of this kind stores."""
    return REQUESTS[kind].from_payload(decode(payload))
