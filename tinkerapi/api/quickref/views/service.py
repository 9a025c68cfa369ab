"""The server: its description, health and capabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from django.http import HttpResponse
from rest_framework.request import Request

from futures.selectors import queue_state
from tinkerapi.api.endpoints import endpoints
from tinkerapi.api.fields.field import Schema
from tinkerapi.api.quickref.render import loss_fns_description
from tinkerapi.api.quickref.views.base import ApiView
from tinkerapi.api.renderers import JSONResponse
from training.base_models import ServedBaseModel, base_models
from training.loss_fns import DEFAULT_LOSS_FN

GROUP = "Server"

ENDPOINTS_SCHEMA: Schema = {
    "type": "object",
    "additionalProperties": {"type": "array", "items": {"type": "object"}},
}


class OpenView(ApiView):
    """A view of the server that answers without a key."""

    group = GROUP
    authentication_classes = ()
    permission_classes = ()


class IndexView(OpenView):
    """Describe this server and list its endpoints by group."""

    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "version": {"type": "string"},
            "docs": {"type": "string"},
            "endpoints": ENDPOINTS_SCHEMA,
        },
        "required": ["name", "version", "docs", "endpoints"],
    }

    def get(self, request: Request) -> HttpResponse:
        return JSONResponse(
            {
                "name": settings.SPECTACULAR_SETTINGS["TITLE"],
                "version": settings.SPECTACULAR_SETTINGS["VERSION"],
                "docs": "/docs/",
                "api_docs": "/api/docs",
                "admin": "/admin/",
                "endpoints": endpoints(),
            }
        )


class HealthView(OpenView):
    """Report that the web process answers; checks nothing else."""

    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {"status": {"type": "string", "enum": ["ok"]}},
        "required": ["status"],
    }
    answer_example: ClassVar[Any] = {"status": "ok"}

    def get(self, request: Request) -> HttpResponse:
        return JSONResponse({"status": "ok"})


class ReadyView(OpenView):
    """Report whether requests can run: the database and a live worker for each base model."""

    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "status": {"type": "string", "enum": ["ready", "not ready"]},
            "missing": {"type": "array", "items": {"type": "string"}},
            "workers": {
                "type": "object",
                "additionalProperties": {"type": "integer"},
                "description": "How many live workers each base model has.",
            },
        },
        "required": ["status", "missing", "workers"],
    }
    answer_example: ClassVar[Any] = {
        "status": "ready",
        "missing": [],
        "workers": {"HuggingFaceTB/SmolLM2-135M-Instruct": 1},
    }
    errors: ClassVar[Mapping[int, str]] = {503: "A part is not ready; `missing` names it."}

    def get(self, request: Request) -> HttpResponse:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            states = {model.name: queue_state(model.queue) for model in base_models()}
            missing = [
                f"{name}: {state.reason}"
                for name, state in states.items()
                if state.state != "active"
            ]
        except DatabaseError:
            states, missing = {}, ["the database does not answer"]
        workers = {name: state.workers for name, state in states.items()}
        if not missing:
            return JSONResponse({"status": "ready", "missing": [], "workers": workers})
        response = JSONResponse(
            {
                "status": "not ready",
                "missing": missing,
                "workers": workers,
                "detail": "; ".join(missing),
                "error_code": "NotReady",
                "category": "server",
            },
            status=503,
        )
        response["Retry-After"] = "2"
        return response


class CapabilitiesView(ApiView):
    """List this server's base models and its limits."""

    group = GROUP
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "supported_models": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "model_name": {"type": "string"},
                        "max_context_length": {"type": "integer", "nullable": True},
                        "exact_logprobs": {"type": "boolean", "nullable": True},
                        "trainable": {"type": "boolean"},
                        "sampleable": {"type": "boolean"},
                    },
                    "required": ["model_name"],
                },
            },
            "limits": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        "required": ["supported_models", "limits"],
    }

    def get(self, request: Request) -> HttpResponse:
        return JSONResponse(
            {
                "supported_models": [
                    {
                        "model_name": model.name,
                        "max_context_length": _longest_sequence(model),
                        "exact_logprobs": model.has_exact_logprobs,
                        "trainable": True,
                        "sampleable": True,
                    }
                    for model in base_models()
                ],
                "limits": {
                    "max_body_bytes": settings.MAX_BODY_BYTES,
                    "max_datums": settings.MAX_DATUMS,
                    "max_datum_tokens": settings.MAX_DATUM_TOKENS,
                    "max_samples": settings.MAX_SAMPLES,
                    "max_lora_rank": settings.MAX_LORA_RANK,
                    "max_adapters": settings.MAX_ADAPTERS,
                    "max_pending": settings.MAX_PENDING,
                    "sync_timeout_seconds": settings.SYNC_TIMEOUT_SECONDS,
                    "max_wait_seconds": settings.MAX_WAIT_SECONDS,
                },
            }
        )


class LossFunctionListView(ApiView):
    """List the loss functions with their inputs and settings."""

    group = GROUP
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "loss_functions": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "properties": {
                        "inputs": {"type": "array", "items": {"type": "string"}},
                        "config": {
                            "type": "object",
                            "additionalProperties": {"type": "number", "nullable": True},
                        },
                    },
                },
            },
            "default": {"type": "string"},
        },
        "required": ["loss_functions", "default"],
    }

    def get(self, request: Request) -> HttpResponse:
        return JSONResponse({"loss_functions": loss_fns_description(), "default": DEFAULT_LOSS_FN})


def _longest_sequence(model: ServedBaseModel) -> int | None:
    """The tokens of a sequence that is accepted, whether to train on or to sample; None if the base
    model's limit is not known yet."""
    within = model.max_context_tokens
    return None if within is None else min(within, settings.MAX_DATUM_TOKENS)
