"""Training: forward_backward, forward, optim_step; protobuf, or the JSON of clients before 0.25."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from futures.models import Future
from tinkerapi.api.fields.field import Custom, Field
from tinkerapi.api.fields.optimizer import ADAM_PARAMS
from tinkerapi.api.sdk.base import NumberedJSONView, NumberedView
from tinkerapi.api.sdk.parse.json_bodies import parse_json_forward_backward
from tinkerapi.api.sdk.parse.protobuf import parse_forward_backward
from training.errors import InvalidRequest
from training.loss_fns import CUSTOM
from training.services import forward_backward_submit, optim_step_submit
from training.types import AdamParams


class ForwardBackwardView(NumberedView):
    """Compute the loss of some data and, unless ``forward_only``, add its gradient."""

    takes_data = True
    takes_protobuf = True
    forward_only: ClassVar[bool] = False
    """True for the route that clients before 0.25 use instead of the flag."""

    def submit(
        self, body: bytes | dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        if isinstance(body, bytes):
            call = parse_forward_backward(body)
        else:
            call = parse_json_forward_backward(body, forward_only=self.forward_only)
        if call.loss_fn == CUSTOM and call.loss_id is None:
            raise InvalidRequest("loss_fn_config.loss_id: this field is required for custom")
        return forward_backward_submit(
            owner_id=owner_id,
            model_id=model_id,
            data=call.data_to_store(),
            loss_fn=call.loss_fn,
            loss_fn_config=call.loss_fn_config,
            forward_only=call.forward_only,
            loss_id=call.loss_id,
            provenance=call.provenance,
            seq_id=seq_id,
        ).future


class ForwardView(ForwardBackwardView):
    """Compute the loss of some data and leave the gradient unchanged."""

    forward_only = True


def _refuse_params(value: Any, where: str) -> None:
    """Parameters of the other optimizers."""
    family = value.get("type") if isinstance(value, dict) else None
    raise InvalidRequest(
        f"{where}: this server does not have the optimizer {str(family)[:40]!r}; send adam_params"
    )


class OptimStepView(NumberedJSONView):
    """Take one AdamW step with the gradient accumulated so far, and clear it."""

    fields: ClassVar[Mapping[str, Field]] = {
        "adam_params": ADAM_PARAMS,
        "optimizer_params": Custom(
            description="Parameters of another optimizer.", checker=_refuse_params, json={}
        ),
    }

    def submit_fields(
        self, body: dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        return optim_step_submit(
            owner_id=owner_id,
            model_id=model_id,
            adam_params=AdamParams(**body["adam_params"]),
            seq_id=seq_id,
        ).future
