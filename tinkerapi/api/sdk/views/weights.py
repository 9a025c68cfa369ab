"""Weights: save, load, make a model from them, describe, copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.exceptions import APIException
from rest_framework.request import Request

from futures.errors import PayloadTooLarge
from futures.models import Future
from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.checkpoints import TTL_SECONDS, USER_METADATA
from tinkerapi.api.fields.field import Choice, Custom, Field, Flag, Integer, Text
from tinkerapi.api.fields.refusals import refuse
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.base import NumberedJSONView, SdkView, check_fields
from tinkerapi.api.sdk.views.models import (
    MODEL_SEQ_ID,
    OPTIMIZER,
    OPTIMIZER_CONFIG,
)
from tinkerapi.api.sdk.views.service import METADATA, SESSION_ID
from tinkerapi.services import api_key_verify
from tinkerapi.tokens import TOKEN_PREFIX, token_verify
from training.errors import InvalidRequest, TrainingError
from training.paths import TinkerPath, check_name
from training.selectors import checkpoint_get
from training.services import load_weights_submit, save_weights_submit
from training.services.checkpoints import model_load_submit, save_for_sampling_session_submit
from training.services.copies import checkpoint_copy

MAX_SEQ_ID = 2**31 - 1


def check_checkpoint_name(value: Any, where: str) -> str:
    """The bare name that the client calls ``path``."""
    return check_name(Text(description="", max_length=128).check(value, where), field=where)


def check_recipient_list(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise refuse(where, "a list of age public keys", value)
    key = Text(description="", max_length=2000)
    return [key.check(item, f"{where}[{i}]") for i, item in enumerate(value)]


def check_lender(value: Any, where: str) -> int:
    """The id of the user whose key (or token for a key) this is; it gives read access to that
    user's checkpoints."""
    given = Text(description="", max_length=4000).check(value, where)
    api_key = token_verify(given) if given.startswith(TOKEN_PREFIX) else api_key_verify(given)
    if api_key is None:
        raise InvalidRequest(f"{where}: the key is unknown, expired or revoked")
    return api_key.user_id


NAME = Custom(
    description="The checkpoint's name.", required=True, checker=check_checkpoint_name, json={}
)
PATH = Text(description="The checkpoint.", required=True, max_length=500)
LENDER = Custom(description="Another user's key.", checker=check_lender, json={})


class SaveWeightsView(NumberedJSONView):
    """Save the model with its optimizer state under a name."""

    fields: ClassVar[Mapping[str, Field]] = {
        "path": NAME,
        "ttl_seconds": TTL_SECONDS,
        "overwrite": Flag(description="Replace one of this name.", default=False),
        "user_metadata": USER_METADATA,
    }

    def submit_fields(
        self, body: dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        name = body.pop("path")
        return save_weights_submit(
            owner_id=owner_id, model_id=model_id, seq_id=seq_id, name=name, kind="training", **body
        ).future


class SaveWeightsForSamplerView(NumberedJSONView):
    """Save the model's weights to sample from: under a name, or as a new sampling session."""

    fields: ClassVar[Mapping[str, Field]] = {
        "path": Custom(description="The name.", checker=check_checkpoint_name, json={}),
        "sampling_session_seq_id": Integer(description="Instead of a name.", maximum=MAX_SEQ_ID),
        "kind": Choice(
            description="Both freeze the current weights.",
            choices=("snapshot", "inflight"),
            default="snapshot",
        ),
        "ttl_seconds": TTL_SECONDS,
        "user_metadata": USER_METADATA,
    }

    def submit_fields(
        self, body: dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        name, number = body["path"], body["sampling_session_seq_id"]
        if (name is None) == (number is None):
            raise InvalidRequest(
                "path, sampling_session_seq_id: give exactly one of them; a name makes a "
                "checkpoint, a number makes a sampling session"
            )
        if number is not None:
            for field in ("ttl_seconds", "user_metadata"):
                if body[field]:
                    raise InvalidRequest(f"{field}: only a checkpoint with a name can have one")
            return save_for_sampling_session_submit(
                owner_id=owner_id, model_id=model_id, seq_id=seq_id, sampling_session_seq_id=number
            ).future
        return save_weights_submit(
            owner_id=owner_id,
            model_id=model_id,
            seq_id=seq_id,
            name=name,
            kind="sampler",
            ttl_seconds=body["ttl_seconds"],
            user_metadata=body["user_metadata"],
        ).future


class SaveWeightsExternalView(NumberedJSONView):
    """Write the model's weights as files for peft, encrypted if requested."""

    fields: ClassVar[Mapping[str, Field]] = {
        "path": NAME,
        "ttl_seconds": TTL_SECONDS,
        "age_encryption_recipients": Custom(
            description="age public keys.", default=[], checker=check_recipient_list, json={}
        ),
    }

    def submit_fields(
        self, body: dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        return save_weights_submit(
            owner_id=owner_id,
            model_id=model_id,
            seq_id=seq_id,
            name=body["path"],
            kind="external",
            ttl_seconds=body["ttl_seconds"],
            recipients=body["age_encryption_recipients"],
        ).future


class LoadWeightsView(NumberedJSONView):
    """Load a checkpoint into a model; without a ``model_id``, make a model from it."""

    fields: ClassVar[Mapping[str, Field]] = {
        "path": PATH,
        # Absent only in SDK 0.5, whose load_state restored the optimizer's state.
        "optimizer": Flag(description="Also load the optimizer's state.", default=True),
        "weights_access_token": LENDER,
    }
    creation_fields: ClassVar[Mapping[str, Field]] = {
        **fields,
        "session_id": SESSION_ID,
        "model_seq_id": MODEL_SEQ_ID,
        "base_model": Text(description="The checkpoint's base model.", max_length=255),
        "user_metadata": METADATA,
        "optimizer_config": OPTIMIZER_CONFIG,
    }

    def post(self, request: Request) -> HttpResponse:
        try:
            body = self.json_body(request)
        except (APIException, PayloadTooLarge, TrainingError):
            return super().post(request)  # which uses its number if it had one
        if "model_id" in body or "session_id" not in body:
            return super().post(request)
        return self._create(check_fields(self.creation_fields, body), owner_of(request))

    def _create(self, body: dict[str, Any], owner_id: int) -> HttpResponse:
        submission = model_load_submit(
            owner_id=owner_id,
            session_id=body["session_id"],
            model_seq_id=body["model_seq_id"],
            path=body["path"],
            optimizer=body["optimizer"],
            base_model=body["base_model"],
            user_metadata=body["user_metadata"],
            lender_id=body["weights_access_token"],
        )
        return JSONResponse({"request_id": submission.future.id, "model_id": submission.model_id})

    def submit_fields(
        self, body: dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        return load_weights_submit(
            owner_id=owner_id,
            model_id=model_id,
            seq_id=seq_id,
            path=body["path"],
            optimizer=body["optimizer"],
            lender_id=body["weights_access_token"],
        ).future


class WeightsInfoView(SdkView):
    """Describe a checkpoint's base model and LoRA shape."""

    fields: ClassVar[Mapping[str, Field]] = {
        "tinker_path": PATH,
        "weights_access_token": LENDER,
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        run = checkpoint_get(
            owner_id=owner_of(request),
            path=TinkerPath.parse(body["tinker_path"], field="tinker_path"),
            lender_id=body["weights_access_token"],
            with_files=True,
        ).run
        return JSONResponse(
            {
                "base_model": run.base_model,
                "is_lora": True,
                "lora_rank": run.rank,
                "train_unembed": run.train_unembed,
                "train_mlp": run.train_mlp,
                "train_attn": run.train_attn,
                "optimizer_config": {"type": OPTIMIZER},
            }
        )


class CopyWeightsView(SdkView):
    """Copy a readable checkpoint to a run of the caller; asking twice makes one copy."""

    uses_storage = True

    fields: ClassVar[Mapping[str, Field]] = {
        "source_path": PATH,
        "destination_project_id": Text(description="The copy's project."),
        "session_id": Text(description="The copy's session.", max_length=64),
        "model_seq_id": Integer(description="Its number there.", maximum=MAX_SEQ_ID),
        "ttl_seconds": TTL_SECONDS,
        "weights_access_token": LENDER,
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        token = request.headers.get("X-Tinker-Weights-Access-Token")
        lender_id = body.pop("weights_access_token")
        if token is not None:
            lender_id = check_lender(token, "X-Tinker-Weights-Access-Token")
        checkpoint = checkpoint_copy(
            owner_id=owner_of(request),
            source=TinkerPath.parse(body.pop("source_path"), field="source_path"),
            lender_id=lender_id,
            idempotency_key=request.headers.get("X-Idempotency-Key"),
            project_id=body.pop("destination_project_id") or "",
            **body,
        )
        return JSONResponse({"tinker_path": str(checkpoint)})
