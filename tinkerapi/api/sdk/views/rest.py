"""Runs and checkpoints by address: list, describe, publish, set a time to live, delete."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.exceptions import ParseError
from rest_framework.request import Request

from tinkerapi.api.bodies.parsers import parse_json
from tinkerapi.api.caller import owner_of
from tinkerapi.api.dialect import is_sdk_dialect
from tinkerapi.api.fields.field import Integer
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.base import SdkView, empty_response
from tinkerapi.api.sdk.parse.queries import check_access_scope, query_page, query_text
from tinkerapi.api.sdk.render.descriptions import (
    checkpoint_description,
    cursor_description,
    published_description,
    run_description,
)
from training.errors import InvalidRequest
from training.listings import (
    checkpoint_page,
    checkpoints_of_run,
    newest_checkpoints,
    run_described,
    run_page,
)
from training.models import Checkpoint
from training.paths import TinkerPath
from training.services.upkeep import checkpoint_publish, checkpoint_remove, checkpoint_set_ttl


class TrainingRunListView(SdkView):
    """List the caller's runs."""

    def get(self, request: Request) -> HttpResponse:
        check_access_scope(request)
        runs, page = run_page(
            owner_id=owner_of(request),
            project_id=query_text(request, "project_id"),
            **query_page(request, limit=20),
        )
        newest = newest_checkpoints(runs)
        return JSONResponse(
            {
                "training_runs": [run_description(run, newest) for run in runs],
                "cursor": cursor_description(page),
            }
        )


class TrainingRunView(SdkView):
    """Describe a run."""

    def get(self, request: Request, run: str) -> HttpResponse:
        check_access_scope(request)
        found = run_described(owner_id=owner_of(request), run_name=run)
        return JSONResponse(run_description(found, newest_checkpoints([found])))


def described(request: Request, checkpoints: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """Checkpoints in a list; those not made by the SDK also give their global path."""
    is_sdk = is_sdk_dialect(request._request)
    return [
        checkpoint_description(checkpoint) | ({} if is_sdk else published_description(checkpoint))
        for checkpoint in checkpoints
    ]


class RunCheckpointListView(SdkView):
    """List a run's checkpoints of all kinds."""

    def get(self, request: Request, run: str) -> HttpResponse:
        found = checkpoints_of_run(owner_id=owner_of(request), run_name=run)
        return JSONResponse({"checkpoints": described(request, found)})


class CheckpointListView(SdkView):
    """List the caller's checkpoints of all runs."""

    def get(self, request: Request) -> HttpResponse:
        found, page = checkpoint_page(owner_id=owner_of(request), **query_page(request, limit=100))
        return JSONResponse(
            {
                "checkpoints": described(request, found),
                "cursor": cursor_description(page),
            }
        )


class CheckpointView(SdkView):
    """Delete a checkpoint."""

    def delete(self, request: Request, run: str, checkpoint_id: str) -> HttpResponse:
        path = TinkerPath.of_checkpoint_id(run, checkpoint_id)
        checkpoint_remove(owner_id=owner_of(request), path=path)
        return empty_response()


class CheckpointPublishView(SdkView):
    """Publish a checkpoint to everybody with a key (POST), or withdraw it (DELETE).

    Publishing twice succeeds: the SDK would retry a 409 for minutes. The SDK expects an empty
    answer; other clients get the path to give away.
    """

    def post(self, request: Request, run: str, checkpoint_id: str) -> HttpResponse:
        return self._set(request, run, checkpoint_id, public=True)

    def delete(self, request: Request, run: str, checkpoint_id: str) -> HttpResponse:
        return self._set(request, run, checkpoint_id, public=False)

    def _set(self, request: Request, run: str, checkpoint_id: str, *, public: bool) -> HttpResponse:
        path = TinkerPath.of_checkpoint_id(run, checkpoint_id)
        checkpoint = checkpoint_publish(owner_id=owner_of(request), path=path, public=public)
        if is_sdk_dialect(request._request):
            return empty_response()
        return JSONResponse(published_description(checkpoint))


class CheckpointTtlView(SdkView):
    """Set the seconds after which a checkpoint is deleted; null keeps it."""

    seconds: ClassVar[Integer] = Integer(description="From now.", minimum=0)

    def put(self, request: Request, run: str, checkpoint_id: str) -> HttpResponse:
        body: Any = parse_json(self.raw_body(request))
        if not isinstance(body, dict):
            raise ParseError("The body must be a JSON object.")
        if "ttl_seconds" not in body:
            raise InvalidRequest("ttl_seconds: this field is required; null keeps the checkpoint")
        ttl_seconds = body["ttl_seconds"]
        if ttl_seconds is not None:
            ttl_seconds = self.seconds.check(ttl_seconds, "ttl_seconds")
        checkpoint_set_ttl(
            owner_id=owner_of(request),
            path=TinkerPath.of_checkpoint_id(run, checkpoint_id),
            ttl_seconds=ttl_seconds,
        )
        return empty_response()
