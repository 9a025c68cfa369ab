"""The front page's figures are correct, with a fixed number of queries."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.db.models import F
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from futures.models import Future, Worker
from tests.console.conftest import page
from tinkerapi.services import api_key_create, api_key_revoke

URL = reverse("admin:index")

QUERIES = 14
"""Session, user, and one for each thing shown."""


def test_the_tiles_and_the_chart_count_futures_by_state(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    trained(superuser)
    context = console.get(URL).context
    numbers = {tile["state"]: int(tile["number"]) for tile in context["tiles"]}
    states = list(Future.objects.values_list("state", flat=True))
    assert numbers == {state: states.count(state) for state in numbers}
    assert numbers["ready"] > 0
    assert numbers["pending"] == 1
    bars = {
        bar["label"]: sum(filter(None, bar["data"]))
        for bar in json.loads(context["futures_chart"])["datasets"]
    }
    assert bars == numbers


def test_what_is_older_than_a_day_is_counted_only_while_it_is_open(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    trained(superuser)
    Future.objects.update(created_at=F("created_at") - timedelta(days=2))
    context = console.get(URL).context
    numbers = {tile["state"]: int(tile["number"]) for tile in context["tiles"]}
    assert numbers == {"pending": 1, "running": 0, "ready": 0, "failed": 0, "cancelled": 0}


def test_the_last_loss_and_the_last_failure_are_shown_with_links(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    traces = trained(superuser)
    Future.objects.filter(pk=traces.sample.pk).update(
        state="failed", error="no memory left", category="server"
    )
    html = console.get(URL).content.decode()
    assert f"{traces.forward_backward.summary['loss']:.4g}" in html
    assert "no memory left" in html
    for row in (traces.run, traces.sample, Worker.objects.get()):
        assert f'href="{page(row)}"' in html


@pytest.mark.parametrize(("age", "label"), [(1, "live"), (120, "silent")])
def test_a_worker_that_was_not_heard_of_for_long_is_shown_as_silent(
    age: int, label: str, console: Client, superuser: User
) -> None:
    Worker.objects.create(
        queue="engine",
        state="live",
        hostname="h",
        pid=1,
        heartbeat_at=timezone.now() - timedelta(seconds=age),
        figures={"device": "cuda:0", "memory_bytes": 3 * 1024**3},
    )
    [row] = console.get(URL).context["workers"]["rows"]
    assert label in row[1]
    assert row[4:] == ["cuda:0", "3.0\xa0GB"]


def test_a_workers_page_says_what_its_adapters_take(console: Client, superuser: User) -> None:
    figures = {"resident_adapters": 12, "adapter_bytes": 2**31, "adapter_cache_bytes": 9 * 2**30}
    worker = Worker.objects.create(
        queue="engine", state="live", hostname="h", pid=1, figures=figures
    )
    html = console.get(f"/admin/futures/worker/{worker.pk}/change/").content.decode()
    assert "12, 2.0\xa0GB of 9.0\xa0GB" in html


def test_an_empty_server_has_a_front_page(console: Client) -> None:
    answer = console.get(URL)
    assert answer.status_code == 200
    assert {tile["number"] for tile in answer.context["tiles"]} == {"0"}


def test_an_empty_dashboard_says_how_to_begin(
    console: Client, superuser: User, trained: Callable[..., SimpleNamespace]
) -> None:
    html = console.get(URL, headers={"Host": "localhost:8123"}).content.decode()
    assert "curl http://localhost:8123/api/v1/forward_backward" in html
    assert "Programs on this machine need no key" in html
    api_key_create(user=superuser, name="laptop <b>")
    revoked, _ = api_key_create(user=superuser, name="stolen")
    api_key_revoke(api_key_id=revoked.pk)
    html = console.get(URL).content.decode()
    assert "Your key is “laptop &lt;b&gt;”" in html
    trained(superuser)
    assert "curl" not in console.get(URL).content.decode()


def test_the_number_of_queries_does_not_grow_with_what_is_there(
    console: Client, trained: Callable[..., SimpleNamespace], user_factory: Callable[..., User]
) -> None:
    for _ in range(3):
        trained(user_factory())
    with CaptureQueriesContext(connection) as queries:
        console.get(URL)
    assert len(queries) <= QUERIES, "\n".join(query["sql"] for query in queries)
