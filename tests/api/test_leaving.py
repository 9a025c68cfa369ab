"""A client that leaves and a view that still works in its thread: one of both acts, once."""

from __future__ import annotations

import asyncio

from django.http import HttpRequest

from tinkerapi.api.leaving import client_left, when_client_leaves


def test_what_was_to_be_done_is_done_when_the_client_leaves(transactional_db):
    request, done = HttpRequest(), []
    when_client_leaves(request, lambda: done.append("act"))
    assert done == []

    asyncio.run(client_left(request))
    asyncio.run(client_left(request))
    assert done == ["act"]


def test_a_view_that_is_too_late_to_be_told_does_it_itself(transactional_db):
    request, done = HttpRequest(), []
    asyncio.run(client_left(request))

    when_client_leaves(request, lambda: done.append("act"))
    assert done == ["act"]
