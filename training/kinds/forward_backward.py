"""A loss of some data, with or without its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training import payloads
from training.kinds.request import Kind, Order, Request
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
