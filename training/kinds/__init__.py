"""The kinds of requests: stored form and order of each, and the stored form of its result.

The execution of a kind is in the module of its name in ``training.worker.kinds``. A
new kind is a member of ``Kind``, a module here, one there, and a line in each of their tables; each
dialect that answers with its result renders it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from futures.payload import decode
from training.kinds.compare_runs import CompareRuns, CompareRunsResult
from training.kinds.create_custom_loss import CreateCustomLoss, CreateCustomLossResult
from training.kinds.create_run import CreateRun, CreateRunResult
from training.kinds.first_results import FIRST_RESULTS
from training.kinds.forward_backward import Forward, ForwardBackward, ForwardBackwardResult
from training.kinds.load_weights import LoadWeights, LoadWeightsResult
from training.kinds.optim_step import OptimStep, OptimStepResult
from training.kinds.remove_run import RemoveRun, RemoveRunResult
from training.kinds.request import Kind, Order, Request
from training.kinds.result import FORM, FORM_FIELD, Result
from training.kinds.sample import Sample
from training.kinds.sample_result import SampleResult
from training.kinds.save_weights import SaveWeights, SaveWeightsResult

__all__ = [
    "LOGGED",
    "REQUESTS",
    "RESULTS",
    "CompareRuns",
    "CompareRunsResult",
    "CreateCustomLoss",
    "CreateCustomLossResult",
    "CreateRun",
    "CreateRunResult",
    "Forward",
    "ForwardBackward",
    "ForwardBackwardResult",
    "Kind",
    "LoadWeights",
    "LoadWeightsResult",
    "OptimStep",
    "OptimStepResult",
    "Order",
    "RemoveRun",
    "RemoveRunResult",
    "Request",
    "Result",
    "Sample",
    "SampleResult",
    "SaveWeights",
    "SaveWeightsResult",
    "stored_request",
    "stored_result",
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


RESULTS: Mapping[str, type[Result]] = {
    Kind.CREATE_RUN: CreateRunResult,
    Kind.REMOVE_RUN: RemoveRunResult,
    Kind.FORWARD: ForwardBackwardResult,
    Kind.FORWARD_BACKWARD: ForwardBackwardResult,
    Kind.OPTIM_STEP: OptimStepResult,
    Kind.SAMPLE: SampleResult,
    Kind.SAVE_WEIGHTS: SaveWeightsResult,
    Kind.LOAD_WEIGHTS: LoadWeightsResult,
    Kind.COMPARE_RUNS: CompareRunsResult,
    Kind.CREATE_CUSTOM_LOSS: CreateCustomLossResult,
}
"""Every kind's result."""


def stored_result(kind: str, data: bytes) -> Result:
    """The result that a ready future of this kind stores, in the form of any version.

    Raises:
        ValueError: A later version stored it.
    """
    stored = decode(data)
    form = stored.get(FORM_FIELD)
    if form is None:
        return FIRST_RESULTS[kind](stored)
    if form != FORM:
        raise ValueError(f"a {kind} result of form {form}; this version reads {FORM}")
    return RESULTS[kind].from_payload(stored)


def result_value(kind: str, data: bytes) -> Any:
    """A stored result as plain values that are equal for equal results, whichever versions stored
    them."""
    return stored_result(kind, data).to_payload()
