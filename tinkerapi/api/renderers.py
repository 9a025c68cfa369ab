"""Values to bytes: every answer is JSON, whatever the request's Accept header says.

The official SDK and command-line tools send Accept headers that DRF's negotiation would
refuse with 406; so nothing is negotiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import orjson
from django.http import HttpResponse
from rest_framework.renderers import BaseRenderer

from futures.plain import plain_json

_DEPTH = 200  # of orjson's 254


def to_json(value: Any) -> bytes:
    """UTF-8 JSON. Numpy arrays become lists; NaN and infinity, which JSON lacks, null.

    Every stored value can be shown: a value that JSON cannot express becomes the closest one, so
    that one row of an older version does not break the lists that contain it.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        pass
    try:
        # orjson takes only C-contiguous native arrays; the others are rare.
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=_plain)
    except orjson.JSONEncodeError:
        shown = plain_json(value, depth=_DEPTH)
        return orjson.dumps(shown, option=orjson.OPT_SERIALIZE_NUMPY, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


class JSONResponse(HttpResponse):
    """An answer whose body is ready: Django needs no thread to render it."""

    def __init__(self, value: Any, *, status: int = 200) -> None:
        super().__init__(to_json(value), content_type="application/json", status=status)
        self["Content-Length"] = str(len(self.content))
        self["X-Content-Type-Options"] = "nosniff"
        # Django would log every failed future and every early /readyz as a server error; errors
        # that deserve a log line were logged where they were noticed.
        self._has_been_logged = True


class JSONRenderer(BaseRenderer):
    """For the views of other packages that return DRF's own Response."""

    media_type = "application/json"
    format = "json"
    charset = None

    def render(
        self,
        data: Any,
        accepted_media_type: str | None = None,
        renderer_context: Mapping[str, Any] | None = None,
    ) -> bytes:
        return b"" if data is None else to_json(data)


def timestamp(moment: datetime | None) -> str | None:
    """ISO 8601 with its offset."""
    return moment.isoformat() if moment is not None else None
