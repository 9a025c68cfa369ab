"""Runs beside each other."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from tests.console.conftest import SCRIPT, list_page, page
from tinkerapi.console.pages import runs as runs_page
from tinkerapi.console.pages.compare import ADDRESS, compare_url, setting_rows
from training.models import Run


@pytest.fixture
def three(trained: Callable[..., SimpleNamespace], superuser: User) -> list[Run]:
    return [trained(superuser).run for _ in range(3)]


def test_the_action_of_the_list_opens_the_chosen_runs(console: Client, three: list[Run]) -> None:
    chosen = [run.pk for run in three[:2]]
    answer = console.post(
        list_page(Run), {"action": "compare_selected", "_selected_action": chosen}, follow=True
    )
    names = {run["name"] for run in answer.context["runs"]}
    assert names == {run.shown_title for run in three[:2]}
    for run in three[:2]:
        assert page(run, "curves") in answer.content.decode()


def test_more_runs_cost_no_more_queries(console: Client, three: list[Run]) -> None:
    def number(runs: list[Run]) -> int:
        with CaptureQueriesContext(connection) as queries:
            assert console.get(compare_url([run.pk for run in runs])).status_code == 200
        return len(queries)

    assert number(three[:1]) == number(three) <= 6


def test_too_many_runs_are_cut_with_a_warning(
    console: Client, three: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_page, "MAX_RUNS", 2)
    selected = {"action": "compare_selected", "_selected_action": [run.pk for run in three]}
    answer = console.post(list_page(Run), selected, follow=True)
    assert len(answer.context["runs"]) == 2
    assert "Only 2 runs can be compared" in answer.content.decode()


def test_settings_that_differ_come_first(three: list[Run]) -> None:
    first, second, _ = three
    first.rank, second.rank = 8, 16
    first.user_metadata, second.user_metadata = {"lr": "1e-4"}, {"lr": 3e-4}
    rows = setting_rows([first, second])
    differing = {row["name"]: row["values"] for row in rows if row["differs"]}
    assert differing["Rank"] == ["8", "16"]
    assert differing["metadata.lr"] == ["1e-4", "0.0003"]
    assert [row["differs"] for row in rows] == sorted((r["differs"] for r in rows), reverse=True)


def test_only_own_runs_can_be_compared(
    staff: User,
    browser: Callable[[User], Client],
    trained: Callable[..., SimpleNamespace],
    three: list[Run],
) -> None:
    mine = trained(staff).run
    answer = browser(staff).get(compare_url([mine.pk, three[0].pk]))
    assert [run["name"] for run in answer.context["runs"]] == [mine.shown_title]
    assert three[0].name not in answer.content.decode()


def test_texts_from_clients_are_text(console: Client, three: list[Run]) -> None:
    Run.objects.update(title=SCRIPT, notes=SCRIPT, user_metadata={SCRIPT: SCRIPT})
    html = console.get(compare_url([run.pk for run in three])).content.decode()
    assert SCRIPT not in html


@pytest.mark.parametrize("query", ["", "?run=none", "?run=%00", "?run=" + "x" * 5000])
def test_runs_that_do_not_exist_are_left_out(console: Client, query: str) -> None:
    answer = console.get(reverse(ADDRESS) + query)
    assert answer.status_code == 200
    assert "Choose two to 10 runs" in answer.content.decode()
