"""The OpenAPI description, read from the views themselves.

drf-spectacular walks the routes. An operation's request and answer are described by the same
declarations that its view checks with, so the description cannot differ from the behaviour.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.plumbing import ComponentRegistry, ResolvedComponent

from tinkerapi.api.fields.field import Field, Schema, object_schema

ERROR_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "detail": {"type": "string", "description": "The error message."},
        "error_code": {"type": "string"},
        "category": {"type": "string", "enum": ["user", "server", "unknown"]},
        "request_id": {"type": "string", "description": "The future that failed, if one did."},
        "log_id": {"type": "string", "description": "The id of the details in the server's log."},
    },
    "required": ["detail", "error_code", "category"],
}
ERROR_EXAMPLE = {
    "detail": "model_id: this field is required",
    "error_code": "InvalidRequest",
    "category": "user",
}

PENDING_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["pending"]},
        "request_id": {"type": "string"},
        "model_id": {"type": "string", "nullable": True},
        "queue_position": {
            "nullable": True,
            "type": "integer",
            "description": "How many futures of the same queue come before it; users take turns.",
        },
        "estimated_wait_seconds": {
            "type": "number",
            "nullable": True,
            "description": "Estimated at the worker's recent rate; null if unknown.",
        },
        "queue_state": {"type": "string", "enum": ["active", "paused_capacity"]},
        "queue_state_reason": {"type": "string", "description": "The reason for waiting."},
    },
    "required": [
        "status",
        "request_id",
        "queue_position",
        "estimated_wait_seconds",
        "queue_state",
    ],
}
PENDING_EXAMPLE = {
    "status": "pending",
    "request_id": "future_0123456789abcdef0123456789abcdef",
    "queue_position": 2,
    "estimated_wait_seconds": 0.4,
    "queue_state": "active",
    "queue_state_reason": "It runs after 2 earlier requests of the same model.",
}

SUBMITTED_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "request_id": {"type": "string"},
        "model_id": {"type": "string", "nullable": True},
    },
    "required": ["request_id", "model_id"],
}
SUBMITTED_EXAMPLE = {
    "request_id": "future_0123456789abcdef0123456789abcdef",
    "model_id": "my_model",
}

IDEMPOTENCY_PARAMETER: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Your key for this request: sending it again answers with the first one's "
    "future instead of running it twice.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
}


class Described(Protocol):
    """The declarations of a view beyond those of DRF's views (``views.base.ApiView``)."""

    group: str
    files: Mapping[str, str]
    answer: Schema
    answer_example: Any
    answer_type: str
    errors: Mapping[int, str]
    waits: bool | None
    legacy: bool

    def body_fields(self) -> Mapping[str, Field]: ...

    def get_authenticators(self) -> Sequence[object]: ...


class ApiSchema(AutoSchema):
    """Describes such a view; attached to it as ``schema``."""

    def get_operation(
        self,
        path: str,
        path_regex: str,
        path_prefix: str,
        method: str,
        registry: ComponentRegistry,
    ) -> dict[str, Any] | None:
        self.registry = registry
        self.path, self.path_regex = path, path_regex
        self.path_prefix, self.method = path_prefix, method.upper()
        view = self.api_view
        summary, _, details = (view.__doc__ or "").strip().partition("\n")
        if view.waits is False:
            details = f"Answers at once with a future for /retrieve_future.\n{details}"
        operation: dict[str, Any] = {
            "operationId": _operation_id(path, method),
            "summary": summary.removesuffix("."),
            "description": re.sub(r"\n +", "\n", details).strip(),
            "tags": [view.group],
            "parameters": self._parameters(),
            "responses": self._answers(),
        }
        if self.method == "POST":
            operation["requestBody"] = self._body()
        if security := self.get_auth():
            operation["security"] = security
        if view.legacy:
            operation["deprecated"] = True
        return operation

    @property
    def api_view(self) -> Described:
        """The view being described, with its extra declarations."""
        return cast(Described, self.view)

    def _parameters(self) -> list[Schema]:
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", self.path)
        ]
        if self.api_view.waits is not None:
            parameters.append(IDEMPOTENCY_PARAMETER)
        return parameters

    def _body(self) -> Schema:
        fields, files = self.api_view.body_fields(), self.api_view.files
        if files:
            return {"required": True, "content": _form_content(fields, files)}
        required = any(field.required for field in fields.values())
        example = {
            name: field.example
            for name, field in fields.items()
            if field.required or (field.example is not None and not required)
        }
        return {
            "required": required,
            "content": _content(object_schema(fields), example or None),
        }

    def _answers(self) -> dict[str, Schema]:
        view = self.api_view
        is_operation = view.waits is not None
        if view.waits is False:
            answers = {"200": _answer("Accepted.", SUBMITTED_SCHEMA, SUBMITTED_EXAMPLE)}
        else:
            done = _content(view.answer, view.answer_example, view.answer_type)
            answers = {"200": {"description": "Done.", "content": done}}
        errors = dict(view.errors)
        if view.get_authenticators():
            errors[401] = "No valid API key, and one is needed."
        if self.method == "POST":
            errors |= {
                400: "The request is wrong; `detail` names the field.",
                413: "The body is too large.",
                415: f"The body is not {'a form' if view.files else 'JSON'}.",
            }
        if is_operation:
            errors |= {409: errors.get(409, "The Idempotency-Key names another request.")}
            errors |= {429: "Too many of your futures are waiting."}
            if view.waits:
                errors |= {
                    202: "Not finished in time; continue with /retrieve_future.",
                    400: "The request is wrong, which may be found only when it runs; "
                    "`detail` names the field.",
                    500: "The server failed; `detail` says why.",
                }
        for status, description in sorted(errors.items()):
            if status == 202:
                answers["202"] = _answer(description, PENDING_SCHEMA, PENDING_EXAMPLE)
            else:
                example = ERROR_EXAMPLE if status == 400 else None
                answers[str(status)] = _answer(description, self._error_ref(), example)
        return answers

    def _error_ref(self) -> Schema:
        component = ResolvedComponent(  # type: ignore[no-untyped-call]  # it has no annotations
            name="Error", type=ResolvedComponent.SCHEMA, object="Error", schema=ERROR_SCHEMA
        )
        self.registry.register_on_missing(component)
        return dict(component.ref)


class ApiKeyScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]  # likewise
    """Both headers that a key may come in."""

    target_class = "tinkerapi.api.authentication.ApiKeyAuthentication"
    name = ["ApiKey", "Bearer"]  # noqa: RUF012 - the base class declares it so

    def get_security_requirement(self, auto_schema: AutoSchema) -> list[dict[str, list[Any]]]:
        # The empty one: a request from this machine may need no key.
        return [{"ApiKey": []}, {"Bearer": []}, {}]

    def get_security_definition(self, auto_schema: AutoSchema) -> list[Schema]:
        return [
            {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            {"type": "http", "scheme": "bearer"},
        ]


def _operation_id(path: str, method: str) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "_", path.removeprefix("/api/v1")).strip("_") or "index"
    if path.startswith("/api/v1/"):
        return f"{words}_{method.lower()}" if method != "POST" else words
    return f"root_{words}" if method == "POST" else f"{words}_{method.lower()}"


def _content(schema: Schema, example: Any, media_type: str = "application/json") -> Schema:
    media: Schema = {"schema": schema}
    if example is not None:
        media["example"] = example
    return {media_type: media}


def _form_content(fields: Mapping[str, Field], files: Mapping[str, str]) -> Schema:
    schema = object_schema(fields)
    schema["properties"] |= {
        name: {"type": "string", "format": "binary", "description": description}
        for name, description in files.items()
    }
    return {"multipart/form-data": {"schema": schema}}


def _answer(description: str, schema: Schema, example: Any) -> Schema:
    return {"description": description, "content": _content(schema, example)}
