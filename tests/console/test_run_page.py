"""A run's page: its tabs, its curves as numbers, its downloads, its rollouts and its tokens."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.console.conftest import SCRIPT, page
from tests.console.test_content_policy import ELSEWHERE
from tests.console.test_content_policy import SCRIPT as SCRIPT_WITH_TEXT
from tinkerapi.console.pages.run_tabs import TABS
from training.base_models import base_model_get
from training.kinds import SampleResult, stored_result
from training.models import ClientMetrics, RenderedData, Rollout, Run
from training.services import forward_backward_submit, optim_step_submit, sample_submit
from training.types import AdamParams, Datum, SamplingParams
from training.vocabulary import vocabulary_store

PAGE_QUERIES = 16
"""Of every tab; two are the session and the user."""


def tokens_of(text: str) -> list[int]:
    """The fake engine has one token for each byte."""
    return list(text.encode())


@pytest.fixture
def policy(superuser: User, work: InProcessWorker) -> Callable[..., Run]:
    """``policy()``: a run whose samples were trained on, for some steps."""

    def make(owner: User = superuser, *, steps: int = 2, prompt: str = "2+2=") -> Run:
        renderer = work.engine.renderer
        vocabulary_store(base_model_get(None).queue, "bytes", renderer.token_bytes)
        mine: dict[str, Any] = {"owner_id": owner.pk, "model_id": "policy"}
        submit_pass(owner, [datum(prompt, [52], 1.0)])
        for step in range(steps):
            optim_step_submit(**mine, adam_params=AdamParams())
            sample = sample_submit(
                **mine,
                base_model=None,
                model_path=None,
                prompts=[np.array(tokens_of(prompt), np.int32)],
                num_samples=2,
                sampling_params=SamplingParams(max_tokens=4, seed=step),
                prompt_logprobs=False,
            ).future
            work()
            result = Future.objects.get(pk=sample.pk).result or b""
            sequences = cast(SampleResult, stored_result("sample", bytes(result))).sequences
            completions = [sequence.tokens.tolist() for sequence in sequences]
            submit_pass(
                owner,
                [datum(prompt, tokens, 1.0 - 2 * n) for n, tokens in enumerate(completions)],
            )
            work()
        optim_step_submit(**mine, adam_params=AdamParams())
        work()
        return Run.objects.get(owner=owner, name="policy")

    return make


def submit_pass(owner: User, data: list[Datum]) -> None:
    forward_backward_submit(
        owner_id=owner.pk,
        model_id="policy",
        data=data,
        loss_fn="ppo",
        loss_fn_config={},
        train_on="auto",
        forward_only=False,
    )


def datum(prompt: str, after: list[int], advantage: float) -> Datum:
    before = tokens_of(prompt)
    zeros = [0.0] * (len(before) - 1)
    return Datum(
        model_input=np.array([*before, *after][:-1], np.int32),
        loss_fn_inputs={
            "target_tokens": np.array([*before, *after][1:]),
            "advantages": np.array([*zeros, *[advantage] * len(after)], np.float32),
            "logprobs": np.array([*zeros, *[-1.0] * len(after)], np.float32),
        },
    )


def curves(client: Client, run: Run, **parameters: int) -> Any:
    return client.get(page(run, "curves"), parameters).json()


def test_every_tab_renders_with_constant_queries(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy()
    for name in TABS:
        with CaptureQueriesContext(connection) as queries:
            answer = console.get(page(run), {"tab": name})
        assert answer.status_code == 200, name
        assert 'aria-current="page"' in answer.content.decode()
        statements = [query["sql"] for query in queries]
        assert len(statements) <= PAGE_QUERIES, f"{name}\n" + "\n".join(statements)


def test_every_tab_needs_nothing_that_its_policy_forbids(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=1)
    for name in TABS:
        html = console.get(page(run), {"tab": name}).content.decode()
        assert not SCRIPT_WITH_TEXT.search(html), name
        assert not ELSEWHERE.search(html), name


def test_more_rows_cost_no_more_queries(console: Client, policy: Callable[..., Run]) -> None:
    def numbers() -> list[int]:
        counts = []
        for name in TABS:
            with CaptureQueriesContext(connection) as queries:
                console.get(page(run), {"tab": name})
            counts.append(len(queries))
        with CaptureQueriesContext(connection) as queries:
            curves(console, run)
        return [*counts, len(queries)]

    run = policy(steps=1)
    before = numbers()
    policy(steps=4)
    assert numbers() == before


def test_the_overview_says_what_the_run_does(console: Client, policy: Callable[..., Run]) -> None:
    run = policy(steps=2)
    html = console.get(page(run)).content.decode()
    assert f"{run.step} steps" in html
    assert "Training:" in html
    assert page(run, "curves") in html


def test_the_curves_have_own_steps_samples_and_the_clients_metrics(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=2)
    ClientMetrics.objects.create(run=run, step=1, metrics={"reward": 0.5, SCRIPT: None})
    found = curves(console, run)
    own = found["own"]
    assert own["steps"] == list(range(1, run.step + 1))
    assert {"loss", "grad_norm", "advantage_mean", "kl_k3", "clip_share"} <= own["columns"].keys()
    assert found["client"]["values"] == [[SCRIPT, [None]], ["reward", [0.5]]]
    assert sum(found["sampled"]["length"]) > 0
    titles = [chart["title"] for group in found["groups"] for chart in group["charts"]]
    assert "KL of sampler to trainer" in titles
    [loss] = [c for group in found["groups"] for c in group["charts"] if c["title"] == "Loss"]
    assert loss["note"] == "ppo, per trained token"
    later = curves(console, run, after=own["seq_ids"][0])
    assert later["own"]["steps"] == own["steps"][1:]


def test_a_nonsense_part_of_the_curves_is_no_error(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=1)
    for query in ("after=-1", "after=x", "after=99999999999999999999", "until=0", "metrics=%00"):
        assert console.get(f"{page(run, 'curves')}?{query}").status_code == 200
    for query in (
        "tab=%00",
        "tab=data&datum=9999",
        "tab=data&request=%00",
        "tab=rollouts&before=0",
        "tab=rollouts&group=zz&step=1",
        "tab=rollouts&q=%00%25_",
        "tab=rollouts&sample=x&number=99999999999",
        "tab=rollouts&step=99999999999999",
    ):
        assert console.get(f"{page(run)}?{query}").status_code == 200, query


def test_the_downloads_have_every_step_and_the_clients_metrics(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=2)
    ClientMetrics.objects.create(run=run, step=2, metrics={"reward": 0.5})
    ClientMetrics.objects.create(run=run, step=99, metrics={"=1+1": 1.0})
    answer = console.get(page(run, "export"), {"format": "csv"})
    rows = list(csv.DictReader(io.StringIO(answer.content.decode())))
    assert [row["step"] for row in rows] == [*(str(n + 1) for n in range(run.step)), "99"]
    assert rows[1]["client/reward"] == "0.5"
    assert rows[-1]["client/=1+1"] == "1.0"
    assert "attachment" in answer["Content-Disposition"]
    lines = console.get(page(run, "export"), {"format": "jsonl"}).content.decode().splitlines()
    steps = [json.loads(line) for line in lines]
    assert steps[1]["metrics"] == {"reward": 0.5}
    assert float(rows[1]["grad_norm"]) == steps[1]["grad_norm"]


def test_rollouts_show_their_words_and_their_advantages(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=1, prompt="what is 2+2?")
    html = console.get(page(run), {"tab": "rollouts"}).content.decode()
    assert "what is 2+2?" in html
    rollouts = console.get(page(run), {"tab": "rollouts"}).context["rows"]
    assert sorted(row["rollout"].advantage for row in rollouts) == [-1.0, 1.0]
    for words, number in (("WHAT 2+2", 2), ("what is not there", 0), ("", 2)):
        found = console.get(page(run), {"tab": "rollouts", "q": words}).context["rows"]
        assert len(found) == number, words
    assert not console.get(page(run), {"tab": "rollouts", "step": 77}).context["rows"]


def test_a_group_has_the_completions_of_one_prompt_the_best_first(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=1)
    url = console.get(page(run), {"tab": "rollouts"}).context["rows"][0]["group_url"]
    answer = console.get(url)
    assert [row["rollout"].advantage for row in answer.context["rows"]] == [1.0, -1.0]
    assert "2+2=" in answer.content.decode()


def test_a_rollout_is_shown_token_by_token(console: Client, policy: Callable[..., Run]) -> None:
    run = policy(steps=1, prompt="Zürich")
    row = console.get(page(run), {"tab": "rollouts"}).context["rows"][0]
    answer = console.get(row["tokens_url"])
    tokens = answer.context["tokens"]
    assert "".join(tokens["texts"]).startswith("Zürich")
    assert tokens["prompt_length"] == len("Zürich".encode())
    sampled = tokens["columns"]["sampled"]
    assert sampled[: tokens["prompt_length"]] == [None] * tokens["prompt_length"]
    assert all(value <= 0 for value in sampled[tokens["prompt_length"] :])
    assert 'id="token-data"' in answer.content.decode()


def test_a_datum_is_shown_token_by_token_with_all_its_numbers(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=1, prompt="2+2=")
    answer = console.get(page(run), {"tab": "data", "datum": 1})
    shown, tokens = answer.context["shown"], answer.context["tokens"]
    assert (shown.number, shown.num_datums, shown.loss_fn) == (1, 2, "ppo")
    assert "".join(tokens["texts"]).startswith("2+2=")
    columns = tokens["columns"]
    assert columns["advantage"][:5] == [None, 0.0, 0.0, 0.0, -1.0]
    assert columns["sampled"][4] == -1.0
    for trained, sampled, ratio in zip(
        columns["trained"][1:], columns["sampled"][1:], columns["ratio"][1:], strict=True
    ):
        assert ratio == pytest.approx(np.exp(trained - sampled), rel=1e-2)
    assert tokens["prompt_length"] == 4
    earlier = answer.context["steps"]["before"]
    assert console.get(earlier).context["shown"].num_datums == 1
    assert console.get(answer.context["datums"]["before"]).context["shown"].number == 0


def test_a_conversation_is_shown_in_the_tokens_that_the_worker_made(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User, work: InProcessWorker
) -> None:
    vocabulary_store(base_model_get(None).queue, "bytes", work.engine.renderer.token_bytes)
    run = trained(superuser, text="what is a lane?").run
    tokens = console.get(page(run), {"tab": "data"}).context["tokens"]
    text = "".join(tokens["texts"])
    assert "what is a lane?" in text
    trained_text = "".join(
        piece
        for piece, weight in zip(tokens["texts"], tokens["columns"]["weight"], strict=True)
        if weight
    )
    assert trained_text.startswith("yes")
    assert all(value <= 0 for value in tokens["columns"]["trained"][1:])


def test_a_conversation_without_tokens_is_shown_as_messages(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    run = trained(superuser, text=SCRIPT).run
    RenderedData.objects.all().delete()
    html = console.get(page(run), {"tab": "data"}).content.decode()
    assert SCRIPT not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "chat template" in html


def test_texts_from_clients_do_not_end_the_script_that_holds_them(
    console: Client, policy: Callable[..., Run]
) -> None:
    run = policy(steps=1, prompt="</script><script>alert(1)</script>")
    row = console.get(page(run), {"tab": "rollouts"}).context["rows"][0]
    for url in (row["tokens_url"], f"{page(run)}?tab=data", row["group_url"]):
        assert "<script>alert(1)" not in console.get(url).content.decode()


def test_what_the_address_names_must_belong_to_the_run(
    console: Client, policy: Callable[..., Run], user_factory: Callable[..., User]
) -> None:
    mine, other = policy(steps=1), policy(user_factory(), steps=1, prompt="their secret")
    theirs = Rollout.objects.filter(run=other).first()
    assert theirs is not None
    for query in (
        {"tab": "rollouts", "sample": theirs.request_id, "number": 0},
        {"tab": "rollouts", "group": bytes(theirs.prompt_digest).hex(), "step": theirs.step},
        {"tab": "data", "request": theirs.trained_by},
    ):
        answer = console.get(page(mine), query)
        assert answer.status_code == 200
        assert "their secret" not in answer.content.decode()


def test_another_users_run_has_no_curves_and_no_download(
    staff: User, browser: Callable[[User], Client], policy: Callable[..., Run]
) -> None:
    run = policy(steps=1)
    for verb in ("change", "curves", "export"):
        answer = browser(staff).get(page(run, verb))
        assert answer.status_code in (302, 404)
        assert "policy" not in answer.content.decode()


def test_the_owner_sees_the_whole_page_without_being_a_superuser(
    staff: User, browser: Callable[[User], Client], policy: Callable[..., Run]
) -> None:
    run = policy(staff, steps=1)
    for name in TABS:
        assert browser(staff).get(page(run), {"tab": name}).status_code == 200
    assert curves(browser(staff), run)["own"]["steps"]
