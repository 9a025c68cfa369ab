"""``GET /`` in a browser: what this server is, and how to begin. Other clients get JSON there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.db import Error as DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import render
from django.utils.cache import patch_vary_headers
from django.views.decorators.csrf import csrf_exempt

from tinkerapi.console.manual import titles
from tinkerapi.console.quickstart import quickstart
from tinkerapi.page_addresses import is_front_page
from training.base_models import ServedBaseModel, base_models


def front_page(description: Callable[..., Any]) -> Callable[..., Any]:
    """A view that shows the page to a browser and calls ``description`` for everybody else."""

    @csrf_exempt
    async def view(request: HttpRequest) -> HttpResponseBase:
        accept = request.headers.get("Accept", "")
        if request.method in ("GET", "HEAD") and is_front_page(request.path, accept):
            response: HttpResponseBase = await sync_to_async(_page)(request)
        else:
            response = cast(HttpResponseBase, await description(request))
        patch_vary_headers(response, ["Accept"])
        return response

    return view


def _page(request: HttpRequest) -> HttpResponse:
    context = {
        "titles": titles(),
        "quickstart": quickstart(request),
        "base_models": [(model.name, _context_tokens(model)) for model in base_models()],
    }
    return render(request, "docs/front.html", context)


def _context_tokens(model: ServedBaseModel) -> int | None:
    try:
        return model.max_context_tokens
    except DatabaseError:  # the page says how to begin, also while Postgres is down
        return None
