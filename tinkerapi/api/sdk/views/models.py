"""Models: make, describe, unload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.request import Request

from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.adapters import ADAPTER_FIELDS, check_adapts_something
from tinkerapi.api.fields.field import Custom, Field, Integer, Text, check_object
from tinkerapi.api.fields.refusals import refuse, refuse_unknown
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.base import SdkView
from tinkerapi.api.sdk.views.service import METADATA, SESSION_ID
from training.errors import InvalidRequest
from training.selectors import run_get
from training.services import run_remove_submit
from training.services.sessions import model_create_submit, seeded
from training.types import LoraConfig

OPTIMIZER = "adamw"
"""The one family of optimizers that this server has."""

_LORA = LoraConfig()
_LORA_FIELDS: Mapping[str, Field] = {
    **ADAPTER_FIELDS,
    "seed": Integer(description="Seeds the initial matrices; absent, the server chooses."),
}

MODEL_ID = Text(description="The model.", required=True)
MODEL_SEQ_ID = Integer(description="Its number in the session.", required=True, maximum=2**31 - 1)


def check_lora_config(value: Any, where: str) -> dict[str, Any]:
    """Rank, seed or None, and which layers; alpha is fixed at 32, as the SDK documents it."""
    checked = check_object(_LORA_FIELDS, value, where)
    check_adapts_something(checked, f"{where}.")
    return checked


def check_optimizer_config(value: Any, where: str) -> str:
    """The optimizer's family; there is only one."""
    if not isinstance(value, dict):
        raise refuse(where, 'an object such as {"type": "adamw"}', value)
    if value.get("type", OPTIMIZER) != OPTIMIZER:
        raise InvalidRequest(
            f"{where}.type: this server does not have the optimizer {str(value['type'])[:40]!r}; "
            f"use {OPTIMIZER!r}"
        )
    refuse_unknown(value.keys(), ("type",), where)
    return OPTIMIZER


OPTIMIZER_CONFIG = Custom(
    description="The optimizer's family.",
    default=OPTIMIZER,
    checker=check_optimizer_config,
    json={},
)


class CreateModelView(SdkView):
    """Make the session's model of a number; asking twice makes one model."""

    fields: ClassVar[Mapping[str, Field]] = {
        "session_id": SESSION_ID,
        "model_seq_id": MODEL_SEQ_ID,
        "base_model": Text(description="The base model.", required=True, max_length=255),
        "user_metadata": METADATA,
        "lora_config": Custom(
            description="The adapter's shape.",
            default={**asdict(_LORA), "seed": None},
            checker=check_lora_config,
            json={},
        ),
        "optimizer_config": OPTIMIZER_CONFIG,
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        shape = body["lora_config"]
        config = LoraConfig(**{name: shape[name] for name in ADAPTER_FIELDS})
        submission = model_create_submit(
            owner_id=owner_of(request),
            session_id=body["session_id"],
            model_seq_id=body["model_seq_id"],
            base_model=body["base_model"],
            lora_config=seeded(
                config,
                seed=shape["seed"],
                session_id=body["session_id"],
                model_seq_id=body["model_seq_id"],
            ),
            user_metadata=body["user_metadata"],
        )
        return JSONResponse({"request_id": submission.future.id, "model_id": submission.model_id})


class GetInfoView(SdkView):
    """Describe a model."""

    fields: ClassVar[Mapping[str, Field]] = {"model_id": MODEL_ID}

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        run = run_get(owner_id=owner_of(request), model_id=body["model_id"])
        return JSONResponse(
            {
                "type": "get_info",
                "model_id": run.name,
                "model_name": run.base_model,
                # The client samples from model_name and loads its tokenizer.
                "model_data": {"model_name": run.base_model, "tokenizer_id": run.base_model},
                "is_lora": True,
                "lora_rank": run.rank,
                "optimizer_config": {"type": OPTIMIZER},
            }
        )


class UnloadModelView(SdkView):
    """Remove a model; its checkpoints stay."""

    fields: ClassVar[Mapping[str, Field]] = {"model_id": MODEL_ID}

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        submission = run_remove_submit(
            owner_id=owner_of(request),
            model_id=body["model_id"],
            idempotency_key=request.headers.get("X-Idempotency-Key", "")[:200] or None,
        )
        return JSONResponse({"request_id": submission.future.id, "model_id": submission.model_id})
