"""The README names every OpenAI-compatible route, and the manual's page every field."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinkerapi.api.openai.tables import CHAT_FIELDS, COMPLETION_FIELDS
from tinkerapi.api.openai.urls import urlpatterns

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "tinkerapi" / "docs" / "openai.md").read_text()


@pytest.mark.parametrize("route", [str(pattern.pattern) for pattern in urlpatterns])
def test_every_route_is_in_the_readme(route: str) -> None:
    assert f" /v1/{route}`" in README


@pytest.mark.parametrize("field", sorted({*CHAT_FIELDS, *COMPLETION_FIELDS} - {"model"}))
def test_every_field_is_on_the_page(field: str) -> None:
    _, _, fields = PAGE.partition("## Fields")
    assert f"`{field}`" in fields
