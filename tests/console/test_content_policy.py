"""Every page's policy forbids content from elsewhere and scripts in its text."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

ADMIN = ("/admin/", "/admin/training/run/", "/admin/futures/future/", "/admin/auth/user/add/")
PAGES = ("/admin/login/", "/docs/", "/docs/operations", "/api/docs", "/api/docs?script=")
SCRIPT = re.compile(r"<script(?![^>]*\bsrc=)(?![^>]*type=\"application/json\")[^>]*>\s*\S")
ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=\"(?:https?:)?//")


def policy_of(answer: Any) -> dict[str, list[str]]:
    parts = [part.split() for part in answer["Content-Security-Policy"].split(";")]
    return {name: sources for name, *sources in parts}


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_nothing_from_elsewhere(db: None, path: str) -> None:
    answer = Client().get(path)

    assert answer.status_code == 200
    policy = policy_of(answer)
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == ["'none'"]
    allowed = {"'self'", "'none'", "data:", "'unsafe-inline'", "'unsafe-eval'"}
    assert set().union(*policy.values()) <= allowed
    assert "'unsafe-inline'" not in policy["script-src"]
    assert ("'unsafe-eval'" in policy["script-src"]) is path.startswith("/admin")


@pytest.mark.parametrize("path", [*ADMIN, *PAGES[:-1]])
def test_a_page_needs_nothing_that_its_policy_forbids(
    db: None, admin_client: Client, path: str
) -> None:
    content = admin_client.get(path).content.decode()

    assert SCRIPT.search(content) is None
    assert ELSEWHERE.search(content) is None
    assert re.search(r"\son(?:click|change|load|submit|error)=\"", content) is None
