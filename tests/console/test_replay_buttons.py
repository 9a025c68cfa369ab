"""The buttons that replay and fork a run, and what the new run's page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.contrib.auth.models import User
from django.test import Client

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.console.conftest import page
from training.models import Run


@pytest.fixture
def traces(trained: Callable[..., SimpleNamespace], staff: User) -> SimpleNamespace:
    """Of a user who is no superuser."""
    return trained(staff)


def form_of(client: Client, run: Run, verb: str) -> dict[str, str]:
    """The fields of a button's dialog, as a browser sends them."""
    html = client.get(page(run, verb)).content.decode()
    inputs = re.findall(r"<input[^>]*>", html)
    found = {}
    for one in inputs:
        name, value = re.search(r'name="([^"]+)"', one), re.search(r'value="([^"]*)"', one)
        if name and value:
            found[name[1]] = value[1]
    return {name: found[name] for name in found if name != "csrfmiddlewaretoken"}


def test_an_owner_replays_a_run_and_its_page_says_the_outcome(
    browser: Callable[[User], Client],
    staff: User,
    traces: SimpleNamespace,
    work: InProcessWorker,
) -> None:
    work()  # what waits in the run
    client = browser(staff)
    answer = client.post(page(traces.run, "replay"), form_of(client, traces.run, "replay"))

    copy = Run.objects.get(replay_of=traces.run)
    assert answer["Location"] == page(copy)
    log = Future.objects.filter(lane_id=copy.pk, replay_of__isnull=False).count()
    assert f"Replay of {traces.run}. 0 of {log} requests" in client.get(page(copy)).content.decode()
    work()
    assert "Equal to the last bit" in client.get(page(copy)).content.decode()
    lineage = client.get(f"{page(traces.run)}?tab=lineage").content.decode()
    assert page(copy) in lineage


@pytest.mark.parametrize("verb", ["replay", "fork"])
def test_a_double_click_makes_one_run_and_a_second_dialog_another(
    browser: Callable[[User], Client], staff: User, traces: SimpleNamespace, verb: str
) -> None:
    client = browser(staff)
    form = form_of(client, traces.run, verb)
    first, second = (client.post(page(traces.run, verb), form) for _ in range(2))

    assert first["Location"] == second["Location"]
    assert Run.objects.filter(replay_of=traces.run).count() == 1
    client.post(page(traces.run, verb), form_of(client, traces.run, verb))
    assert Run.objects.filter(replay_of=traces.run).count() == 2


def test_a_run_is_forked_at_a_step(
    browser: Callable[[User], Client], staff: User, traces: SimpleNamespace, work: InProcessWorker
) -> None:
    client = browser(staff)
    form = form_of(client, traces.run, "fork")
    assert form["step"] == "1"
    client.post(page(traces.run, "fork"), form)
    work()

    fork = Run.objects.get(replay_of=traces.run)
    assert (fork.step, str(fork)) == (1, f"{traces.run}, from step 1")
    assert f"Fork at step 1 of {traces.run}." in client.get(page(fork)).content.decode()
    refused = client.post(
        page(traces.run, "fork"), {**form, "step": "9", "key": "new"}, follow=True
    )
    assert "step: expected 1 to 2, got 9" in refused.content.decode()


@pytest.mark.parametrize("verb", ["replay", "fork"])
def test_others_cannot_repeat_a_run_and_superusers_can(
    browser: Callable[[User], Client],
    user_factory: Callable[..., User],
    console: Client,
    traces: SimpleNamespace,
    verb: str,
) -> None:
    stranger = browser(user_factory(is_staff=True))
    form = form_of(console, traces.run, verb)
    for ask in (stranger.get, stranger.post):
        assert ask(page(traces.run, verb), form).status_code in (403, 404)
    assert console.get(page(traces.run, verb)).status_code == 200
    assert not Run.objects.filter(replay_of=traces.run).exists()

    console.post(page(traces.run, verb), form)
    copy = Run.objects.get(replay_of=traces.run)
    assert copy.owner == traces.run.owner
    assert not Future.objects.filter(lane_id=copy.pk).exclude(owner=traces.run.owner).exists()


def test_a_post_without_a_csrf_token_does_nothing(staff: User, traces: SimpleNamespace) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(staff)
    form = form_of(client, traces.run, "replay")

    assert client.post(page(traces.run, "replay"), form).status_code == 403
    assert not Run.objects.filter(replay_of=traces.run).exists()
