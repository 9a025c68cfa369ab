"""Checkpoints: save, save for sampling, load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from tinkerapi.api.fields.checkpoints import TTL_SECONDS, USER_METADATA
from tinkerapi.api.fields.field import Field, Flag, Schema, Text
from tinkerapi.api.quickref.views.base import OperationView
from tinkerapi.api.quickref.views.steps import MODEL_ID
from training.services import Submission, load_weights_submit, save_weights_submit


class SaveWeightsView(OperationView):
    """Save the model's current state, with its optimizer state, under a name.

    The saved state is that after every request submitted before it.
    """

    group = "Weights"
    kind: ClassVar[Literal["training", "sampler", "external"]] = "training"
    fields: ClassVar[Mapping[str, Field]] = {
        "model_id": MODEL_ID,
        "name": Text(
            description="The checkpoint's name.", required=True, max_length=128, example="first"
        ),
        "overwrite": Flag(description="Replace one of this name.", default=False),
        "ttl_seconds": TTL_SECONDS,
        "user_metadata": USER_METADATA,
    }
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {"path": {"type": "string"}, "model_id": {"type": "string"}},
        "required": ["path"],
    }
    answer_example: ClassVar[Any] = {
        "path": "tinker://my_model/weights/first",
        "model_id": "my_model",
    }
    errors: ClassVar[Mapping[int, str]] = {
        404: "No model of this name.",
        409: "The model has a checkpoint of this name when it runs, or the Idempotency-Key "
        "names another request.",
    }

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        return save_weights_submit(
            owner_id=owner_id,
            model_id=body["model_id"],
            name=body["name"],
            kind=self.kind,
            overwrite=body["overwrite"],
            ttl_seconds=body["ttl_seconds"],
            user_metadata=body["user_metadata"],
            idempotency_key=idempotency_key,
        )


class SaveWeightsForSamplerView(SaveWeightsView):
    """Save the model's current weights, to sample from, under a name."""

    kind = "sampler"
    answer_example: ClassVar[Any] = {
        "path": "tinker://my_model/sampler_weights/first",
        "model_id": "my_model",
    }


class SaveWeightsExternalView(SaveWeightsView):
    """Write the model's current weights in the format of peft and other programs.

    ``GET /api/v1/training_runs/<run>/checkpoints/external_weights/<name>/external_weights_urls``
    links to them.
    """

    kind = "external"
    answer_example: ClassVar[Any] = {
        "path": "tinker://my_model/external_weights/first",
        "model_id": "my_model",
    }


class LoadWeightsView(OperationView):
    """Load a checkpoint into a model; the model must exist and share its base model."""

    group = "Weights"
    fields: ClassVar[Mapping[str, Field]] = {
        "model_id": MODEL_ID,
        "path": Text(
            description="The checkpoint.",
            required=True,
            max_length=400,
            example="tinker://my_model/weights/first",
        ),
        "optimizer": Flag(
            description="Also load the optimizer state; false resets it.", default=True
        ),
    }
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {"path": {"type": "string"}, "model_id": {"type": "string"}},
        "required": ["model_id"],
    }
    answer_example: ClassVar[Any] = {
        "path": "tinker://my_model/weights/first",
        "model_id": "my_model",
    }
    errors: ClassVar[Mapping[int, str]] = {404: "No such model or checkpoint."}

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        return load_weights_submit(
            owner_id=owner_id,
            model_id=body["model_id"],
            path=body["path"],
            optimizer=body["optimizer"],
            idempotency_key=idempotency_key,
        )
