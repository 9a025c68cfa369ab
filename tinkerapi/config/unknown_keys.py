"""Refuses keys of a configuration file that nothing reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from tinkerapi.config.nearest import nearest


def refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse the first key that is not known.

    Raises:
        ImproperlyConfigured: The message names it and the nearest known one.
    """
    for key in table:
        if key not in known:
            raise ImproperlyConfigured(f"{where}: unknown key {key!r}{nearest(key, known)}")
