"""A client's own metrics of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.request import Request

from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.field import Custom, Field, Integer, Schema, Text, check_object
from tinkerapi.api.fields.refusals import refuse, refuse_size
from tinkerapi.api.quickref.views.base import ApiView
from tinkerapi.api.renderers import JSONResponse
from training.errors import InvalidRequest
from training.services.client_metrics import Metrics, client_metrics_record

MAX_NAMES = 100
"""Metrics of one step in a request."""
MAX_POINTS = 1_000
"""Steps in a request."""
MAX_STEP = 2**53

_NAME = Text(description="", max_length=120)


def check_metrics(value: Any, where: str) -> Metrics:
    """Names and numbers, at least one; null stands for a number that is not finite."""
    if not isinstance(value, dict):
        raise refuse(where, "an object of names and numbers", value)
    if not value:
        raise InvalidRequest(f"{where}: is empty; send at least one metric")
    if len(value) > MAX_NAMES:
        raise refuse_size(where, len(value), "metrics", MAX_NAMES)
    return {
        _NAME.check(name, f"{where} (a name)"): _number(item, f"{where}.{name[:60]}")
        for name, item in value.items()
    }


def _number(value: Any, where: str) -> float | None:
    if value is not None and type(value) not in (int, float):
        raise refuse(where, "a finite number, or null for NaN and infinity", value)
    return None if value is None else float(value)


POINT: Mapping[str, Field] = {
    "step": Integer(
        description="The step that the metrics belong to, counted as the client does.",
        required=True,
        maximum=MAX_STEP,
    ),
    "metrics": Custom(
        description="Name to number; `null` for NaN and infinity.",
        required=True,
        checker=check_metrics,
        json={
            "type": "object",
            "additionalProperties": {"type": "number", "nullable": True},
            "minProperties": 1,
            "maxProperties": MAX_NAMES,
        },
        example={"reward": 0.75},
    ),
}


def check_points(value: Any, where: str) -> list[dict[str, Any]]:
    """Steps with their metrics, at least one."""
    if not isinstance(value, list) or not value:
        raise refuse(where, f"a list of 1 to {MAX_POINTS} steps with their metrics", value)
    if len(value) > MAX_POINTS:
        raise refuse_size(where, len(value), "steps", MAX_POINTS)
    return [check_object(POINT, item, f"{where}[{index}]") for index, item in enumerate(value)]


def one_form(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a body, which has either ``points`` or ``step`` and ``metrics``.

    Raises:
        InvalidRequest: It has both or neither. (400)
    """
    point = {name: body[name] for name in POINT if body[name] is not None}
    if body["points"] is None:
        return [check_object(POINT, point)]
    if point:
        raise InvalidRequest(f"{next(iter(point))}: send it in points, or without points")
    points: list[dict[str, Any]] = body["points"]
    return points


class MetricsView(ApiView):
    """Record metrics that your program measured, such as its reward.

    The console draws them beside the run's own curves. A repeat changes nothing; another request
    for the same step adds its names, and replaces values of the same name.
    """

    group = "Models"
    fields: ClassVar[Mapping[str, Field]] = {
        **{name: replace(field, required=False) for name, field in POINT.items()},
        "points": Custom(
            description="Several steps at once, instead of `step` and `metrics`.",
            checker=check_points,
            json={
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_POINTS,
                "items": {
                    "type": "object",
                    "properties": {name: field.schema() for name, field in POINT.items()},
                    "required": list(POINT),
                },
            },
        ),
    }
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "run_id": {"type": "string"},
            "steps": {"type": "integer", "description": "Steps recorded by this request."},
        },
        "required": ["run_id", "steps"],
    }
    answer_example: ClassVar[Any] = {
        "run_id": "run_0123456789abcdef0123456789abcdef",
        "steps": 1,
    }
    errors: ClassVar[Mapping[int, str]] = {404: "No run of this id or name."}

    def post(self, request: Request, run_id: str) -> HttpResponse:
        points = one_form(self.checked_body(request))
        merged: dict[int, dict[str, float | None]] = {}
        for point in points:
            merged.setdefault(point["step"], {}).update(point["metrics"])
        run = client_metrics_record(owner_id=owner_of(request), run_id=run_id, steps=merged)
        return JSONResponse({"run_id": run.pk, "steps": len(merged)})
