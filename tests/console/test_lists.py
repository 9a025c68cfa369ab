"""What lists show of runs, checkpoints and sessions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from futures.models import Future
from tests.console.conftest import list_page, page
from training.models import Checkpoint, ClientMetrics, Run, Session

Traces = Callable[..., SimpleNamespace]


@pytest.mark.parametrize(
    ("summary", "reward", "shown"),
    [
        ({"loss": 0.123456}, None, "0.1235"),
        ({"loss": 1e30}, None, "1e+30"),
        ({"loss": 0.5, "loss_fn": "ppo"}, None, "0.5 (ppo)"),
        ({"loss": 0.5, "loss_fn": "ppo"}, 0.75, "reward 0.75"),
        ({"loss": "NaN"}, None, "nan"),
        ({}, None, "-"),
    ],
)
def test_a_runs_last_result_is_its_reward_or_its_loss_and_never_long(
    console: Client,
    trained: Traces,
    superuser: User,
    summary: dict[str, object],
    reward: float | None,
    shown: str,
) -> None:
    traces = trained(superuser)
    Future.objects.filter(pk=traces.forward_backward.pk).update(summary=summary)
    ClientMetrics.objects.create(run=traces.run, step=1, metrics={"reward": 0.1})
    ClientMetrics.objects.create(run=traces.run, step=2, metrics={"reward": reward})
    html = console.get(list_page(Run)).content.decode()
    assert f">{shown}<" in html


def test_checkpoints_of_sampling_sessions_are_not_listed_but_have_pages(
    console: Client, trained: Traces, superuser: User
) -> None:
    checkpoint = trained(superuser).checkpoint
    assert checkpoint.name in console.get(list_page(Checkpoint)).content.decode()
    Checkpoint.objects.update(ephemeral=True)
    assert not console.get(list_page(Checkpoint)).context["cl"].result_list
    assert console.get(page(checkpoint)).status_code == 200


@pytest.mark.parametrize(
    ("public", "words"), [(True, "everybody, at its published path"), (False, "its owner")]
)
def test_a_checkpoint_says_in_words_who_may_read_it(
    console: Client, trained: Traces, superuser: User, public: bool, words: str
) -> None:
    checkpoint = trained(superuser).checkpoint
    Checkpoint.objects.update(public=public)
    assert words in console.get(page(checkpoint)).content.decode()


@pytest.mark.parametrize(
    ("silent", "finished", "words"),
    [(1, "", "active"), (90, "", "client gone"), (90, "success", "success")],
)
def test_a_session_whose_client_is_silent_is_not_active(
    console: Client, trained: Traces, superuser: User, silent: int, finished: str, words: str
) -> None:
    session = trained(superuser).session
    now = timezone.now()
    Session.objects.filter(pk=session.pk).update(
        heartbeat_at=now - timedelta(seconds=silent),
        finish_reason=finished,
        finished_at=now if finished else None,
    )
    html = console.get(list_page(Session)).content.decode()
    assert words in html
    assert ("active" in html.lower().split("<tbody", 1)[1]) == (words == "active")
