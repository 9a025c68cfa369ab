"""Models: make, remove, describe, list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.request import Request

from tinkerapi.api.caller import idempotency_key_of, owner_of
from tinkerapi.api.fields.adapters import ADAPTER_FIELDS, check_adapts_something
from tinkerapi.api.fields.field import (
    Custom,
    Field,
    Flag,
    Integer,
    Number,
    Schema,
    Text,
    check_object,
)
from tinkerapi.api.fields.refusals import refuse, refuse_size
from tinkerapi.api.quickref.views.base import ApiView, OperationView
from tinkerapi.api.quickref.views.steps import MODEL_ID
from tinkerapi.api.renderers import JSONResponse, timestamp
from training.errors import InvalidRequest
from training.models import Run
from training.selectors import run_get, run_list
from training.services import Submission, run_create_submit, run_remove_submit
from training.types import LoraConfig

_LORA = LoraConfig()

MAX_TARGET_MODULES = 100

RUN_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "model_id": {"type": "string"},
        "run_id": {
            "type": "string",
            "description": "Its id for all users: at `tinker://<run_id>/...` others find "
            "its published checkpoints.",
        },
        "base_model": {"type": "string"},
        "state": {
            "type": "string",
            "enum": ["creating", "ready", "finished"],
            "description": "finished: the tinker SDK's session that made it has ended.",
        },
        "error": {"type": "string"},
        "is_lora": {"type": "boolean"},
        "rank": {"type": "integer"},
        "alpha": {"type": "number"},
        "seed": {"type": "integer"},
        "target_modules": {"type": "array", "items": {"type": "string"}, "nullable": True},
        "share_across_experts": {"type": "boolean"},
        "step": {"type": "integer", "description": "Optimizer steps taken."},
        "tokens": {"type": "integer", "description": "Tokens trained on."},
        "created_at": {"type": "string", "format": "date-time"},
        "last_request_at": {"type": "string", "format": "date-time"},
    },
    "required": ["model_id", "run_id", "base_model", "state", "rank", "alpha", "step"],
}
RUN_EXAMPLE = {
    "model_id": "my_model",
    "run_id": "run_0123456789abcdef0123456789abcdef",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "state": "ready",
    "error": "",
    "is_lora": True,
    "rank": 32,
    "alpha": 32.0,
    "seed": 0,
    "target_modules": None,
    "step": 10,
    "tokens": 1400,
    "created_at": "2026-01-01T12:00:00+00:00",
    "last_request_at": "2026-01-01T12:05:00+00:00",
}

_UNKNOWN_MODEL = {404: "No model of this name."}


def render_run(run: Run) -> dict[str, Any]:
    """A run in the form that its owner sees."""
    return {
        "model_id": run.name,
        "run_id": run.id,
        "base_model": run.base_model,
        "state": run.shown_state,
        "error": run.error,
        "is_lora": True,
        "rank": run.rank,
        "alpha": run.alpha,
        "seed": run.seed,
        "target_modules": run.target_modules,
        "share_across_experts": run.share_across_experts,
        "step": run.step,
        "tokens": run.tokens,
        "created_at": timestamp(run.created_at),
        "last_request_at": timestamp(run.last_request_at),
    }


def check_target_modules(value: Any, where: str) -> tuple[str, ...]:
    """Module names, at least one; the engine checks that the base model has them."""
    if not isinstance(value, list):
        raise refuse(where, f"a list of 1 to {MAX_TARGET_MODULES} module names", value)
    if not value:
        raise InvalidRequest(f"{where}: is empty; send at least one module name, or leave it out")
    if len(value) > MAX_TARGET_MODULES:
        raise refuse_size(where, len(value), "names", MAX_TARGET_MODULES)
    text = Text(description="")
    return tuple(text.check(item, f"{where}[{index}]") for index, item in enumerate(value))


class AddLoraView(OperationView):
    """Make a model: a new LoRA adapter on a base model, with its own optimizer state."""

    group = "Models"
    fields: ClassVar[Mapping[str, Field]] = {
        "base_model": Text(
            description="A base model that this server serves; the default is its first.",
            max_length=255,
        ),
        "model_id": replace(
            MODEL_ID,
            required=False,
            description="Its name; without one, the server chooses.",
        ),
        "rank": ADAPTER_FIELDS["rank"],
        "alpha": Number(
            description="The update is scaled by alpha / rank.",
            above_minimum=True,
            maximum=1e6,
            default=_LORA.alpha,
        ),
        "seed": Integer(description="Seeds the initial matrices.", default=_LORA.seed),
        **{name: ADAPTER_FIELDS[name] for name in ("train_mlp", "train_attn", "train_unembed")},
        "target_modules": Custom(
            description="Names of the modules to adapt instead, such as `q_proj`.",
            checker=check_target_modules,
            json={"type": "array", "items": {"type": "string"}, "minItems": 1},
        ),
        "share_across_experts": Flag(
            description="In a mixture of experts: whether the experts of a layer share A of gate "
            "and up, and B of down. `false` gives each expert its own.",
            default=_LORA.share_across_experts,
        ),
    }
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "model_id": {"type": "string"},
            "base_model": {"type": "string"},
            "rank": {"type": "integer"},
            "alpha": {"type": "number"},
        },
        "required": ["model_id", "base_model", "rank", "alpha"],
    }
    answer_example: ClassVar[Any] = {
        "model_id": "my_model",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "rank": 16,
        "alpha": 32.0,
    }
    errors: ClassVar[Mapping[int, str]] = {
        404: "The base model is not served here.",
        409: "You have a model of this name.",
    }

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        check_adapts_something(body)
        config = LoraConfig(**{name: body[name] for name in LoraConfig.__dataclass_fields__})
        return run_create_submit(
            owner_id=owner_id,
            model_id=body["model_id"],
            base_model=body["base_model"],
            lora_config=config,
            idempotency_key=idempotency_key,
        )


class RemoveLoraView(OperationView):
    """Remove a model; its memory is freed and its name can be used again. Checkpoints stay."""

    group = "Models"
    fields: ClassVar[Mapping[str, Field]] = {"model_id": MODEL_ID}
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "status": {"type": "string", "enum": ["deleted"]},
            "model_id": {"type": "string"},
        },
        "required": ["status", "model_id"],
    }
    answer_example: ClassVar[Any] = {"status": "deleted", "model_id": "my_model"}
    errors: ClassVar[Mapping[int, str]] = _UNKNOWN_MODEL

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        return run_remove_submit(
            owner_id=owner_id, model_id=body["model_id"], idempotency_key=idempotency_key
        )


class GetInfoView(ApiView):
    """Describe one of your models."""

    group = "Models"
    fields: ClassVar[Mapping[str, Field]] = {"model_id": MODEL_ID}
    answer = RUN_SCHEMA
    answer_example: ClassVar[Any] = RUN_EXAMPLE
    errors: ClassVar[Mapping[int, str]] = _UNKNOWN_MODEL

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        return JSONResponse(
            render_run(run_get(owner_id=owner_of(request), model_id=body["model_id"]))
        )


class AdapterListView(ApiView):
    """List your models, the newest first."""

    group = "Models"
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {"adapters": {"type": "array", "items": RUN_SCHEMA}},
        "required": ["adapters"],
    }
    answer_example: ClassVar[Any] = {"adapters": [RUN_EXAMPLE]}

    def get(self, request: Request) -> HttpResponse:
        # At most MAX_ADAPTERS, so there are no pages.
        runs = run_list(owner_id=owner_of(request))
        return JSONResponse({"adapters": [render_run(run) for run in runs]})


class AdapterView(RemoveLoraView):
    """Remove a model and wait until it is gone."""

    http_method_names = ["delete", "options"]  # noqa: RUF012 - Django declares it so

    def delete(self, request: Request, model_id: str) -> Any:
        submission = self.submit(
            check_object(self.fields, {"model_id": model_id}),
            owner_id=owner_of(request),
            idempotency_key=idempotency_key_of(request),
        )
        return self.respond(request, submission)
