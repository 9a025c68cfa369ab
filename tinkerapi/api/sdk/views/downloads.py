"""Downloads: links to a checkpoint's files, and the linked files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.utils.http import http_date
from rest_framework.request import Request

from tinkerapi.api.caller import owner_of
from tinkerapi.api.renderers import JSONResponse, timestamp
from tinkerapi.api.sdk.base import SdkView
from tinkerapi.api.sdk.render.links import archive_link, file_links, link_target
from tinkerapi.api.sdk.render.trace import trace_pieces
from tinkerapi.api.streaming import file_response, tar_response
from training.errors import CheckpointNotFound
from training.models import Checkpoint
from training.paths import TinkerPath
from training.selectors import checkpoint_by_id, checkpoint_get
from training.services.checkpoints import checkpoint_audit_read
from training.storage.chosen import storage
from training.timeline import run_lanes, session_lanes


def _downloadable(request: Request, run: str, checkpoint_id: str) -> Checkpoint:
    """The client's own checkpoint, or a published one; the owner's audit log records the access.

    Raises:
        CheckpointNotFound: It does not exist or is not published. (404)
    """
    reader_id = owner_of(request)
    path = TinkerPath.of_checkpoint_id(run, checkpoint_id)
    checkpoint = checkpoint_get(owner_id=reader_id, path=path, with_files=True)
    checkpoint_audit_read(checkpoint, reader_id=reader_id, purpose="download")
    return checkpoint


class ExternalWeightsUrlsView(SdkView):
    """Link to each file of a checkpoint; the links need no key and expire."""

    uses_storage = True

    def get(self, request: Request, run: str, checkpoint_id: str) -> HttpResponse:
        checkpoint = _downloadable(request, run, checkpoint_id)
        names = storage().files(checkpoint.directory)
        links = file_links(request, checkpoint, names, reader_id=owner_of(request))
        return JSONResponse(
            {
                "urls": {name: link.url for name, link in links.items()},
                "expires": timestamp(min(link.expires for link in links.values())),
            }
        )


class ArchiveView(SdkView):
    """Link to a checkpoint's files in one tar, for clients before 0.36.

    The first of those clients ask for gzip, but expect a redirect and read its address. Later ones
    take JSON, and may follow a redirect by themselves.
    """

    def get(self, request: Request, run: str, checkpoint_id: str) -> HttpResponse:
        checkpoint = _downloadable(request, run, checkpoint_id)
        link = archive_link(request, checkpoint, reader_id=owner_of(request))
        if "application/gzip" in request.headers.get("Accept", ""):
            return HttpResponse(
                status=HTTPStatus.FOUND,
                headers={"Location": link.url, "Expires": http_date(link.expires.timestamp())},
            )
        return JSONResponse({"url": link.url, "expires": timestamp(link.expires)})


class DownloadView(SdkView):
    """Send the target of a link. The link is the permission; this server made the names in it."""

    uses_storage = True
    authentication_classes = ()
    permission_classes = ()

    def get(self, request: Request, token: str, file_name: str) -> HttpResponseBase:
        target = link_target(token)
        if "session" in target:
            return _trace_response(request, target, partial(session_lanes, target["session"]))
        if "run" in target:
            return _trace_response(request, target, partial(run_lanes, target["run"]))
        checkpoint = checkpoint_by_id(target["checkpoint"])
        if "while_public" in target and not checkpoint.public:
            raise CheckpointNotFound
        if "file" not in target:
            return tar_response(request, storage().open_all(checkpoint.directory))
        directory, name = checkpoint.directory, target["file"]
        file = storage().open(directory, name)
        return file_response(request, file, etag=f"{directory.rpartition('/')[2]}-{name}")


def _trace_response(
    request: Request, about: dict[str, str], lanes: Callable[[], list[str]]
) -> HttpResponseBase:
    if request.method == "HEAD":
        return HttpResponse(content_type="application/json")
    return StreamingHttpResponse(trace_pieces(about, lanes), content_type="application/json")
