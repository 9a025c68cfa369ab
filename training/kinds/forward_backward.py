"""A loss of some data, with or without its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from training import payloads
from training.kinds.request import Kind, Order, Request
from training.kinds.result import Result, divided, joined
from training.loss_fns import DEFAULT_LOSS_FN
from training.payloads import Payload
from training.types import Datum, Example


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackward(Request):
    """Compute a loss and add its gradient to the run's accumulated gradient."""

    kind: ClassVar = Kind.FORWARD_BACKWARD
    order: ClassVar = Order.PASS
    is_logged: ClassVar = True

    data: Sequence[Example]
    loss_fn: str
    loss_fn_config: Mapping[str, float]
    train_on: str = "auto"
    """The roles in a conversation whose turns are trained; see ``Renderer.render_conversation``."""
    loss_id: str | None = None
    """The uploaded loss of ``loss_fn="custom"``."""

    def to_payload(self) -> Payload:
        payload: Payload = {
            "data": [
                {"model_input": item.model_input, "loss_fn_inputs": dict(item.loss_fn_inputs)}
                if isinstance(item, Datum)
                else payloads.unrendered_to_payload(item)
                for item in self.data
            ],
            "loss_fn": self.loss_fn,
            "loss_fn_config": dict(self.loss_fn_config),
            "train_on": self.train_on,
        }
        return payload if self.loss_id is None else {**payload, "loss_id": self.loss_id}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            data=[
                Datum(model_input=item["model_input"], loss_fn_inputs=item["loss_fn_inputs"])
                if "model_input" in item
                else payloads.unrendered_from_payload(item)
                for item in payload["data"]
            ],
            loss_fn=payload["loss_fn"],
            loss_fn_config=payload["loss_fn_config"],
            train_on=payload["train_on"],
            loss_id=payload.get("loss_id"),
        )

    @property
    def cost(self) -> int:
        return sum(
            len(item.model_input) if isinstance(item, Datum) else payloads.unrendered_cost(item)
            for item in self.data
        )

    @property
    def most_tokens(self) -> int:
        return self.cost

    @property
    def has_text(self) -> bool:
        return any(not isinstance(item, Datum) for item in self.data)

    @property
    def summary(self) -> dict[str, Any]:
        named = {} if self.loss_fn == DEFAULT_LOSS_FN else {"loss_fn": self.loss_fn}
        return {"datums": len(self.data), **named}


class Forward(ForwardBackward):
    """Compute the same loss and leave the accumulated gradient unchanged."""

    kind: ClassVar = Kind.FORWARD
    is_logged: ClassVar = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackwardResult(Result):
    """The loss of the data, and the log-probabilities that it was computed from."""

    model_id: str
    """The run's name."""
    backend: str
    """The engine that computed it, such as ``torch-cpu``."""
    loss: float
    """Mean per trained token, in nats."""
    num_tokens: int
    num_weighted_tokens: int
    """Trained tokens: the weight (cross_entropy) or advantage (the others) is not zero."""
    metrics: Mapping[str, float]
    """By ``name:reduction``: ``loss:sum``, whose gradient was computed; the loss function's own;
    and ``not_read/<name>:sum``, the number of datums with an input that the loss does not read.
    And for cross_entropy ``perplexity``."""
    logprobs: Sequence[NDArray[np.float32]]
    """Of each datum's target tokens, in nats, shaped like ``target_tokens``: (N,) or (N, K)."""

    def to_payload(self) -> Payload:
        """The log-probabilities are stored as one array: datum by datum, row by row."""
        payload: Payload = {
            "model_id": self.model_id,
            "backend": self.backend,
            "loss": self.loss,
            "num_tokens": self.num_tokens,
            "num_weighted_tokens": self.num_weighted_tokens,
            "metrics": dict(self.metrics),
            "logprobs": joined([array.ravel() for array in self.logprobs], np.float32),
            "sizes": [array.size for array in self.logprobs],
        }
        if any(array.ndim != 1 for array in self.logprobs):
            payload["shapes"] = [list(array.shape) for array in self.logprobs]
        return payload

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        logprobs = divided(payload["logprobs"], payload["sizes"])
        if "shapes" in payload:
            shapes = payload["shapes"]
            logprobs = [part.reshape(s) for part, s in zip(logprobs, shapes, strict=True)]
        return cls(
            model_id=payload["model_id"],
            backend=payload["backend"],
            loss=payload["loss"],
            num_tokens=payload["num_tokens"],
            num_weighted_tokens=payload["num_weighted_tokens"],
            metrics=payload["metrics"],
            logprobs=logprobs,
        )
