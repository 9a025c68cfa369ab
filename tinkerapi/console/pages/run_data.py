"""The data tab of a run: a training example token by token."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat

from tinkerapi.console.kit.display import page_url, tab_url
from tinkerapi.console.kit.parameters import number_of
from training.inspection import pass_inspect, pass_neighbours, passes_listed
from training.models import Run
from training.token_view import TokenView

NEWEST_PASSES = 40
"""Passes that can be chosen from the list; others are reached one by one, or by their number."""

MAX_IMAGES = 16
MAX_IMAGE_BYTES = 1024**2
"""Images that are shown on one page, and the largest of them."""


def data_tab(request: HttpRequest, run: Run) -> dict[str, Any]:
    """The chosen datum, and links to its neighbours."""
    shown = pass_inspect(
        run,
        request_id=request.GET.get("request", "").replace("\0", "") or None,
        number=number_of(request, "datum") or 0,
    )
    if shown is None:
        return {"shown": None, "passes": passes_listed(run, limit=NEWEST_PASSES)}
    before, after = pass_neighbours(run, shown.future.seq_id or 0)
    own, last = shown.future.pk, shown.num_datums - 1

    def url(request_id: str | None, datum: int = 0) -> str | None:
        return request_id and tab_url(run, "data", request=request_id, datum=datum)

    return {
        "shown": shown,
        "passes": passes_listed(run, limit=NEWEST_PASSES),
        "tokens": tokens_json(shown.view),
        "view": shown.view,
        "thumbnails": thumbnails(shown.view),
        "request_url": page_url(shown.future),
        "steps": {"before": url(before), "after": url(after)},
        "datums": {
            "before": url(own, shown.number - 1) if shown.number else None,
            "after": url(own, shown.number + 1) if shown.number < last else None,
        },
    }


def thumbnails(view: TokenView) -> list[dict[str, Any]]:
    """The first images of a view as data URLs, which the pages' policy allows; None for a large
    one."""
    return [
        {
            "url": f"data:image/{image.format};base64,{b64encode(image.data).decode()}"
            if len(image.data) <= MAX_IMAGE_BYTES
            else None,
            "size": filesizeformat(len(image.data)),
        }
        for image in view.images[:MAX_IMAGES]
    ]


def tokens_json(view: TokenView) -> dict[str, Any]:
    """What ``static/tinkerapi/tokens.js`` draws."""
    names = ("ids", "texts", "columns", "top", "prompt_length")
    return {name: getattr(view, name) for name in names}
