"""How the admin shows values: links, coloured states, times, unchanged text.

All values from clients pass through ``format_html`` or a template, which escape them.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from urllib.parse import urlencode

from django.contrib.admin.utils import quote
from django.db.models import Model
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

STATE_VARIANTS = {
    "pending": "info",
    "starting": "info",
    "creating": "info",
    "running": "warning",
    "ready": "success",
    "live": "success",
    "active": "success",
    "training": "success",
    "sampling": "success",
    "client gone": "danger",
    "failed": "danger",
    "lost": "danger",
    "silent": "danger",
    "revoked": "danger",
    "waiting": "info",
    "delivered": "success",
    "given up": "danger",
}
"""State to the colour of its label; all other states are grey."""

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
"""Seconds and name of each unit of time, the largest first."""


def page_url(row: Model, part: str = "") -> str:
    """The admin page of a row, or of a part of it: ``curves/``."""
    url = _url(type(row), "change", quote(row.pk))
    return f"{url.removesuffix('change/')}{part}" if part else url


def tab_url(row: Model, tab: str, **parameters: object) -> str:
    """A tab of a row's page."""
    return f"{page_url(row)}?{urlencode({'tab': tab, **parameters})}"


def changelist_url(model: type[Model]) -> str:
    """The list of a model's rows."""
    return _url(model, "changelist")


def link(row: Model | None, text: str | None = None) -> SafeString | None:
    """A link to a row's page, or None if there is no row."""
    return link_to(type(row), row.pk, text or str(row)) if row is not None else None


def link_to(model: type[Model], pk: int | str, text: str) -> SafeString:
    """A link to the page of a row that need not be loaded."""
    return _anchor(_url(model, "change", quote(pk)), text)


def list_link(model: type[Model], text: str, **filters: object) -> SafeString:
    """A link to the list of a model's rows with these filters set."""
    return _anchor(f"{changelist_url(model)}?{urlencode(filters)}", text)


def _url(model: type[Model], page: str, *args: str) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}", args=args)


def _anchor(url: str, text: str) -> SafeString:
    return format_html('<a href="{}" class="text-link">{}</a>', url, text)


def state_label(state: str) -> SafeString:
    """A state in its colour."""
    return render_to_string(
        "unfold/helpers/label.html", {"text": state, "variant": STATE_VARIANTS.get(state)}
    )


def one_line(text: str) -> SafeString:
    """Text cut to the width of its column, in full on hover."""
    return format_html('<span class="console-line" title="{}">{}</span>', text, text)


def copyable(text: str) -> SafeString:
    """An id in small letters, with a button that copies it."""
    return render_to_string("console/copyable.html", {"text": text})


def preformatted(text: str) -> SafeString:
    """Text unchanged, escaped, with long lines wrapped."""
    return format_html('<pre class="console-text" tabindex="0">{}</pre>', text)


def moment(value: datetime | None) -> SafeString | None:
    """``6 min ago`` or ``in 29 d``, with the exact time on hover."""
    if value is None:
        return None
    return format_html(
        '<time class="whitespace-nowrap" title="{}">{}</time>',
        f"{timezone.localtime(value):%Y-%m-%d %H:%M:%S %Z}",
        moment_text(value),
    )


def moment_text(value: datetime) -> str:
    """``6 min ago`` or ``in 29 d``."""
    seconds = round((timezone.now() - value).total_seconds())
    size, unit = next((size, unit) for size, unit in UNITS if abs(seconds) >= size or size == 1)
    count = f"{abs(seconds) // size} {unit}"
    return f"{count} ago" if seconds >= 0 else f"in {count}"


def duration(value: timedelta | None) -> str | None:
    """A length of time with two significant units: ``41 ms``, ``3.2 s``, ``2 min 5 s``."""
    if value is None:
        return None
    seconds = value.total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    (size, unit), (smaller_size, smaller) = next(
        pair for pair in pairwise(UNITS) if whole >= pair[0][0]
    )
    return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
