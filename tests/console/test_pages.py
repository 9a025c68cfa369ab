"""Every page of the admin renders, stays cheap, and shows what came from clients as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.db import connection
from django.db.models import Model
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from futures.models import Future, Lane, Worker
from tests.conftest import InProcessWorker
from tests.console.conftest import SCRIPT, list_page, page
from tinkerapi.console.pages.futures import short_id
from tinkerapi.models import ApiKey
from training.models import Checkpoint, Run, SamplingSession, Session, Snapshot

OURS: list[type[Model]] = [
    Future,
    Lane,
    Worker,
    Run,
    Checkpoint,
    Snapshot,
    Session,
    SamplingSession,
    ApiKey,
]

POLL = {"HX-Request": "true"}
"""The header of a request by which a page reads itself again."""
LIST_QUERIES = 9
"""A list of ten rows costs fewer queries than it has rows; two are the session and the user."""


@pytest.fixture
def traces(
    trained: Callable[..., SimpleNamespace], user_factory: Callable[..., User]
) -> SimpleNamespace:
    """The rows of one person's training, with a script in every text from the client."""
    traces = trained(user_factory(first_name=SCRIPT), text=SCRIPT)
    Run.objects.filter(pk=traces.run.pk).update(
        name=SCRIPT, base_model=SCRIPT, user_metadata={SCRIPT: SCRIPT}, target_modules=[SCRIPT]
    )
    Checkpoint.objects.filter(pk=traces.checkpoint.pk).update(name=SCRIPT, directory=SCRIPT)
    Future.objects.filter(pk=traces.sample.pk).update(
        state="failed",
        error=f"{SCRIPT}\nsecond line",
        category="user",
        error_code=SCRIPT,
        summary={SCRIPT: SCRIPT},
        idempotency_key=SCRIPT,
    )
    Worker.objects.update(figures={"device": SCRIPT, SCRIPT: [SCRIPT]}, hostname=SCRIPT)
    snapshot(traces.run)
    Session.objects.update(
        display_name=SCRIPT,
        tags=[SCRIPT],
        user_metadata={SCRIPT: SCRIPT},
        project_id=SCRIPT,
        sdk_version=SCRIPT,
        finish_detail=SCRIPT,
    )
    SamplingSession.objects.update(model_path=SCRIPT)
    return traces


def snapshot(run: Run) -> None:
    Snapshot.objects.get_or_create(
        run=run,
        seq_id=999,
        defaults={
            "step": 1,
            "directory": SCRIPT,
            "size_bytes": 1,
            "write_seconds": 0.1,
            "epoch": 1,
        },
    )


def test_every_list_renders_with_text_from_clients_escaped(
    console: Client, traces: SimpleNamespace
) -> None:
    for model in OURS:
        answer = console.get(list_page(model))
        html = answer.content.decode()
        assert answer.status_code == 200
        assert answer.context["cl"].result_count >= 1
        assert SCRIPT not in html
        assert model is Lane or "&lt;script&gt;" in html


def test_every_detail_page_renders_with_text_from_clients_escaped(
    console: Client, traces: SimpleNamespace
) -> None:
    for model in OURS:
        rows = model._default_manager.all()
        assert rows
        for row in rows:
            answer = console.get(page(row))
            assert answer.status_code == 200
            assert SCRIPT not in answer.content.decode()


def test_the_dashboard_escapes_text_from_clients(console: Client, traces: SimpleNamespace) -> None:
    html = console.get(reverse("admin:index")).content.decode()
    assert SCRIPT not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # run, model, error, device


def filtered_fields(model_admin: Any) -> list[str]:
    return [item[0] for item in model_admin.list_filter if isinstance(item, tuple)]


def test_every_list_can_be_searched_and_filtered(console: Client, traces: SimpleNamespace) -> None:
    for model, model_admin in admin.site._registry.items():
        queries = [{"q": "x'\";%"}, {"q": SCRIPT}, {"p": "2"}, {"o": "1"}]
        for name in filtered_fields(model_admin):
            queries.append({f"{name}_from_0": "2026-01-01", f"{name}_to_0": "nonsense"})
            queries.append({f"{name}__id__exact": "1"})
            queries.append({f"{name}__exact": "ready"})
        for query in queries:
            answer = console.get(list_page(model), query, follow=True)
            assert answer.status_code in (200, 400), query  # 400: no such filter here
            assert SCRIPT not in answer.content.decode()


def test_a_search_finds_a_request_by_its_id_its_run_and_its_key(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    mine, other = trained(superuser, name="mine"), trained(superuser, name="other")
    Future.objects.filter(pk=mine.waiting.pk).update(idempotency_key="abc")

    def found(term: str) -> set[str]:
        answer = console.get(list_page(Future), {"q": term})
        return {future.pk for future in answer.context["cl"].result_list}

    assert found(mine.waiting.pk[:20]) == {mine.waiting.pk}
    assert found(short_id(mine.waiting)) == {mine.waiting.pk}
    assert found("abc") == {mine.waiting.pk}
    in_run = set(Future.objects.filter(lane_id=mine.run.pk).values_list("pk", flat=True))
    assert found("mine") == found(mine.run.pk) == in_run
    assert other.waiting.pk in found("other")


def test_filters_narrow_the_list_of_requests(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    traces = trained(superuser)

    def found(**query: str) -> set[str]:
        answer = console.get(list_page(Future), query)
        return {future.pk for future in answer.context["cl"].result_list}

    assert found(state__exact="pending") == {traces.waiting.pk}
    assert found(kind="sample") == {traces.sample.pk}
    everything = found()
    today = f"{traces.waiting.created_at:%Y-%m-%d}"
    assert found(created_at_from_0=today, created_at_to_0=today) == everything
    assert found(created_at_from_0="2036-01-01", created_at_from_1="00:00") == set()
    assert found(created_at_to_0=today, created_at_to_1="00:00:00") == set()
    assert found(lane__id__exact=traces.run.pk) == found()


def test_lists_of_ten_rows_cost_fewer_than_ten_queries_and_read_no_bodies(
    console: Client,
    trained: Callable[..., SimpleNamespace],
    user_factory: Callable[..., User],
) -> None:
    for _ in range(10):
        run = trained(user_factory()).run
        Worker.objects.create(queue="another", state="lost", hostname="h", pid=1)
        snapshot(run)
    for model in OURS:
        with CaptureQueriesContext(connection) as queries:
            answer = console.get(list_page(model))
        assert len(answer.context["cl"].result_list) >= 10
        statements = [query["sql"] for query in queries]
        assert len(statements) <= LIST_QUERIES, "\n".join(statements)
        assert not any(re.search(r'"(payload|result|key_hash)"', sql) for sql in statements)


def test_the_count_of_a_list_stops_at_its_limit(
    console: Client,
    trained: Callable[..., SimpleNamespace],
    superuser: User,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained(superuser)
    monkeypatch.setattr("tinkerapi.console.kit.console_admin.COUNT_LIMIT", 2)
    with CaptureQueriesContext(connection) as queries:
        answer = console.get(list_page(Future))
    assert answer.context["cl"].result_count == 2
    counts = [query["sql"] for query in queries if "COUNT(" in query["sql"]]
    assert counts
    assert all("LIMIT 2" in sql for sql in counts)


def test_a_request_page_shows_its_parts_and_its_links(
    console: Client,
    trained: Callable[..., SimpleNamespace],
    superuser: User,
    work: InProcessWorker,
) -> None:
    traces = trained(superuser, text="what is a lane?")
    html = console.get(page(traces.forward_backward)).content.decode()
    assert "what is a lane?" in html  # the payload, decoded
    assert "num_weighted_tokens" in html  # the result, decoded
    worker = Worker.objects.get()
    for row in (traces.run, worker, superuser):
        assert f'href="{page(row)}"' in html


def test_a_failed_request_shows_its_whole_error(console: Client, traces: SimpleNamespace) -> None:
    html = console.get(page(traces.sample)).content.decode()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\nsecond line</pre>" in html


def body_texts(answer: Any) -> dict[str, str]:
    return {body["title"]: body["text"] for body in answer.context["bodies"]}


def test_a_request_page_says_why_there_is_no_result(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    traces = trained(superuser)
    waiting, ran = traces.waiting, traces.sample

    assert body_texts(console.get(page(waiting)))["Result"] == "none yet"
    Future.objects.filter(pk=waiting.pk).update(state="cancelled", finished_at=timezone.now())
    assert body_texts(console.get(page(waiting)))["Result"] == "none: it was cancelled"
    failure = {"state": "failed", "error": "no", "category": "user", "result": None}
    Future.objects.filter(pk=ran.pk).update(
        **failure, payload=None, pruned_at=timezone.now(), attempts=2
    )
    answer = console.get(page(ran))
    assert body_texts(answer) == {
        "Request": "pruned by the retention policy",
        "Result": "none: it failed",
    }
    assert re.search(
        r"Workers that ended while it ran.*?readonly[^>]*>2<", answer.content.decode(), re.S
    )


def test_a_huge_number_of_a_summary_is_short(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    step = trained(superuser).optim_step
    Future.objects.filter(pk=step.pk).update(
        summary={"learning_rate": 1e300, "smallest": 1e-300, "tokens": 123_456_789}
    )
    step.refresh_from_db()

    assert step.summary_line == "tokens 123456789  smallest 1e-300  learning_rate 1e+300"


def test_a_run_of_a_finished_session_is_shown_as_finished(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    traces = trained(superuser)
    Run.objects.filter(pk=traces.run.pk).update(session=traces.session, model_seq_id=0)
    Session.objects.filter(pk=traces.session.pk).update(
        finished_at=timezone.now(), finish_reason="success"
    )
    for url in (list_page(Run), page(traces.run)):
        html = console.get(url).content.decode()
        assert re.findall(r">\s*(ready|finished)\s*</span>", html)[0] == "finished"


@pytest.mark.parametrize("own_objective", [False, True])
def test_a_runs_page_says_if_an_objective_only_has_the_hosted_ones_name(
    own_objective: bool, console: Client, traces: SimpleNamespace
) -> None:
    Run.objects.filter(pk=traces.run.pk).update(own_objective=own_objective)
    html = console.get(page(traces.run)).content.decode()
    assert ("this server&#x27;s own objective, not the hosted service" in html) == own_objective


def test_the_title_of_a_page_is_the_name_that_clients_use(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    traces = trained(superuser, name="lower-case")
    path = f"tinker://lower-case/weights/{traces.checkpoint.name}"
    titles = {
        traces.run: "lower-case",
        traces.waiting: traces.waiting.pk,
        traces.checkpoint: path,
        traces.session: traces.session.pk,
        superuser: superuser.username,
    }
    for row, title in titles.items():
        html = console.get(page(row)).content.decode()
        *_, last = re.findall(r'class="align-middle inline-block leading-5[^>]*>([^<]*)</a', html)
        assert last.strip() == title


def test_a_waiting_request_shows_how_many_are_ahead_of_it(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    trained(superuser)
    last = trained(superuser).waiting
    ahead = Future.objects.open().filter(created_at__lt=last.created_at).count()
    html = console.get(page(last)).content.decode()
    field = html[html.index("Ahead of it in the queue") :]
    assert re.search(r"<div[^>]*readonly[^>]*>(\d+)", field)[1] == str(ahead)  # type: ignore[index]


def test_a_request_says_what_it_waits_for_until_it_is_finished(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    traces = trained(superuser)
    waiting, last = traces.waiting, traces.waiting.seq_id
    assert "The worker is starting." in console.get(page(waiting)).content.decode()

    Future.objects.filter(pk=waiting.pk).update(seq_id=last + 1)
    html = console.get(page(waiting)).content.decode()
    assert f"The request with seq_id {last} has not arrived" in html
    assert "this one fails not before" in html

    assert console.get(page(waiting), headers=POLL).headers.get("HX-Refresh") is None
    finished = console.get(page(traces.sample), headers=POLL)
    assert "console-waiting" not in finished.content.decode()
    assert finished.headers["HX-Refresh"] == "true"


def test_a_request_page_stays_small_however_large_the_request(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    words = "x" * 400_000
    traces = trained(superuser, text=words)
    html = console.get(page(traces.forward_backward)).content
    assert len(html) < 120_000


def test_nothing_can_be_added_changed_or_deleted_by_a_form(
    console: Client, traces: SimpleNamespace
) -> None:
    for model in OURS:
        row = model._default_manager.all()[0]
        before = model._default_manager.filter(pk=row.pk).values().get()
        form = dict.fromkeys(before, "changed")
        add = f"{list_page(model)}add/"
        assert console.get(add).status_code == 403
        assert console.post(add, form).status_code == 403
        assert console.post(page(row), form).status_code == 403
        assert console.post(page(row, "delete"), {"post": "yes"}).status_code == 403
        chosen = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
        console.post(list_page(model), chosen)
        assert model._default_manager.filter(pk=row.pk).values().get() == before


def test_no_page_shows_the_hash_of_a_key(console: Client, traces: SimpleNamespace) -> None:
    for api_key in ApiKey.objects.all():
        for url in (list_page(ApiKey), page(api_key), page(api_key, "history")):
            assert api_key.key_hash not in console.get(url).content.decode()


def test_a_list_cannot_be_asked_about_hashes_of_keys(
    console: Client, traces: SimpleNamespace
) -> None:
    answer = console.get(list_page(ApiKey), {"key_hash__startswith": "a"})
    assert answer.status_code == 400


def test_the_page_of_a_person_leads_to_what_is_theirs(
    console: Client, trained: Callable[..., SimpleNamespace], user_factory: Callable[..., User]
) -> None:
    mine, _ = trained(user_factory()), trained(user_factory())
    html = console.get(page(mine.run.owner)).content.decode()
    expected = {Run: [mine.run], Checkpoint: [mine.checkpoint], ApiKey: [mine.api_key]}
    for model, rows in expected.items():
        href = re.search(rf'href="({list_page(model)}\?[^"]+)"', html)
        assert href is not None
        found = console.get(href[1].replace("&amp;", "&")).context["cl"].result_list
        assert list(found) == rows
