"""Signed links, valid for an hour and fetched without a key.

A link contains the name of its target, signed with SECRET_KEY; nothing is stored. Whoever has the
link can fetch that target until it expires, as with any signed URL.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.core import signing
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from rest_framework.request import Request

from training.errors import InvalidRequest
from training.models import Checkpoint, Run, Session

LIFETIME = timedelta(hours=1)
_SALT = "tinkerapi.links"


@dataclass(frozen=True)
class Link:
    """A URL and when it stops working."""

    url: str
    expires: datetime


def file_links(
    request: Request, checkpoint: Checkpoint, names: list[str], *, reader_id: int
) -> dict[str, Link]:
    """A link to each of a checkpoint's files, by its name."""
    target = _target(checkpoint, reader_id)
    return {name: _link(request, {**target, "file": name}, name) for name in names}


def archive_link(request: Request | HttpRequest, checkpoint: Checkpoint, *, reader_id: int) -> Link:
    """A link to a checkpoint's files in one tar."""
    return _link(request, _target(checkpoint, reader_id), f"{checkpoint.name}.tar")


def _target(checkpoint: Checkpoint, reader_id: int) -> dict[str, Any]:
    """The target in a link; a reader's link stops working when the owner withdraws the
    checkpoint."""
    is_own = checkpoint.run.owner_id == reader_id
    return {"checkpoint": checkpoint.pk} | ({} if is_own else {"while_public": True})


def trace_link(request: Request | HttpRequest, of: Session | Run) -> Link:
    """A link to the timeline of a session or of a run."""
    what = "run" if isinstance(of, Run) else "session"
    return _link(request, {what: of.pk}, f"{of.pk}.json")


def link_target(token: str) -> dict[str, Any]:
    """The target of a link.

    Raises:
        InvalidRequest: It expired, or was not made by this server. (400)
    """
    try:
        target: dict[str, Any] = signing.loads(token, salt=_SALT, max_age=LIFETIME)
    except signing.SignatureExpired:
        raise InvalidRequest("this link has expired; ask for a new one") from None
    except signing.BadSignature:
        raise InvalidRequest("this link was not made by this server") from None
    return target


def _link(request: Request | HttpRequest, target: dict[str, Any], file_name: str) -> Link:
    token = signing.dumps(target, salt=_SALT)
    path = reverse("sdk-download", args=[token, file_name])
    url = settings.PUBLIC_URL + path if settings.PUBLIC_URL else request.build_absolute_uri(path)
    return Link(url=url, expires=timezone.now() + LIFETIME)
