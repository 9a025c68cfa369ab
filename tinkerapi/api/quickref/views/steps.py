"""Training: forward, forward_backward, optim_step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tinkerapi.api.fields.field import Choice, Custom, Field, Number, Schema, Text
from tinkerapi.api.fields.optimizer import ADAM_PARAMS
from tinkerapi.api.fields.refusals import refuse
from tinkerapi.api.quickref.training_data import TrainingData
from tinkerapi.api.quickref.views.base import OperationView
from training.loss_fns import DEFAULT_LOSS_FN
from training.services import Submission, forward_backward_submit, optim_step_submit
from training.types import MAX_FLOAT32, AdamParams

MODEL_ID = Text(
    description="The name of your model: your adapter and its optimizer state.",
    pattern="^[A-Za-z0-9][A-Za-z0-9._:-]*$",
    max_length=128,
    required=True,
    example="my_model",
)

PASS_ANSWER: Schema = {
    "type": "object",
    "properties": {
        "loss": {
            "type": "number",
            "nullable": True,
            "description": "Mean per trained token; of cross_entropy the weighted one, in nats.",
        },
        "num_samples": {"type": "integer"},
        "num_tokens": {"type": "integer"},
        "model_id": {"type": "string"},
        "backend": {"type": "string"},
        "metrics": {"type": "object", "additionalProperties": {"type": "number"}},
        "loss_fn_outputs": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["loss", "num_samples", "num_tokens", "model_id", "metrics", "loss_fn_outputs"],
}


def check_loss_fn_config(value: Any, where: str) -> dict[str, float]:
    """Names to numbers of float32; the loss function defines the names."""
    if not isinstance(value, dict):
        raise refuse(where, "an object of numbers by name", value)
    number = Number(description="", minimum=-MAX_FLOAT32)
    return {name: number.check(item, f"{where}.{name[:60]}") for name, item in value.items()}


class ForwardBackwardView(OperationView):
    """Compute the loss of some data and add its gradient to the model's.

    An unknown `model_id` makes a model of that name on the default base model. The gradient
    is that of the **sum** over trained tokens; `loss` is the mean. Operations of one model run
    in the order in which they were submitted, and a failed one changes nothing (except an
    `optim_step` that must drop a gradient too large for any step).
    """

    group = "Training"
    takes_data = True
    forward_only: ClassVar[bool] = False
    fields: ClassVar[Mapping[str, Field]] = {
        "model_id": MODEL_ID,
        "data": TrainingData(
            description='Conversations (lists of messages, or `{"messages": [...]}`) or '
            'token-level datums `{"model_input": [...], "loss_fn_inputs": {...}}`. Position i '
            "of a datum's inputs belongs to the prediction of token i + 1.",
            required=True,
            example=[
                [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]
            ],
        ),
        "loss_fn": Text(
            description="The loss function; GET /list_loss_functions lists them.",
            default=DEFAULT_LOSS_FN,
            max_length=60,
        ),
        "loss_fn_config": Custom(
            description="Settings of the loss function.",
            default={},
            checker=check_loss_fn_config,
            json={"type": "object", "additionalProperties": {"type": "number"}},
        ),
        "train_on": Choice(
            description="Which tokens of a conversation are trained: the assistant's, "
            "all, or (auto) the assistant's if there is an assistant turn.",
            choices=("auto", "assistant", "all"),
            default="auto",
        ),
    }
    answer = PASS_ANSWER
    answer_example: ClassVar[Any] = {
        "loss": 2.31,
        "num_samples": 1,
        "num_tokens": 14,
        "model_id": "my_model",
        "backend": "torch-cpu",
        "metrics": {"loss:sum": 6.93, "num_tokens": 14, "num_weighted_tokens": 3},
        "loss_fn_outputs": [{"logprobs": [-0.1, -2.4, -4.43]}],
    }
    errors: ClassVar[Mapping[int, str]] = {429: "Too many of your futures are waiting."}

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        return forward_backward_submit(
            owner_id=owner_id,
            model_id=body["model_id"],
            data=body["data"],
            loss_fn=body["loss_fn"],
            loss_fn_config=body["loss_fn_config"],
            train_on=body["train_on"],
            forward_only=self.forward_only,
            delayable=not self.waits,
            idempotency_key=idempotency_key,
        )


class ForwardView(ForwardBackwardView):
    """Compute the loss of some data and leave the gradient unchanged."""

    forward_only = True


class OptimStepView(OperationView):
    """Take one AdamW step with the gradient accumulated so far, and clear it."""

    group = "Training"
    fields: ClassVar[Mapping[str, Field]] = {
        "model_id": MODEL_ID,
        "adam_params": ADAM_PARAMS,
    }
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "metrics": {
                "type": "object",
                "properties": {
                    "learning_rate": {"type": "number"},
                    "grad_norm": {"type": "number"},
                    "step": {"type": "integer"},
                },
            },
            "model_id": {"type": "string"},
            "backend": {"type": "string"},
        },
        "required": ["metrics", "model_id"],
    }
    answer_example: ClassVar[Any] = {
        "metrics": {"learning_rate": 1e-4, "grad_norm": 3.2, "step": 1},
        "model_id": "my_model",
        "backend": "torch-cpu",
    }
    errors: ClassVar[Mapping[int, str]] = {404: "No model of this name."}

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        return optim_step_submit(
            owner_id=owner_id,
            model_id=body["model_id"],
            adam_params=AdamParams(**body["adam_params"]),
            idempotency_key=idempotency_key,
        )
