"""Every value that is stored unchanged can be shown as long as it is stored."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from training.models import Checkpoint, CustomLoss, Run, Session

LISTS = (
    "sessions",
    "sessions/{session}",
    "training_runs",
    "training_runs/{model}",
    "training_runs/{model}/checkpoints",
    "checkpoints",
    "adapters",
    "audit",
    "billing/usage/events?starting_on=2026-01-01T00:00:00Z&ending_before=2026-01-01T01:00:00Z",
    "billing/usage/checkpoints/current",
)


def all_lists_answer(sdk: SdkClient, session: str, model: str) -> None:
    for path in LISTS:
        path = path.format(session=session, model=model)
        answer = sdk.api.get(f"/api/v1/{path}", **sdk.headers)
        assert answer.status_code == 200, (path, answer.content)
    assert len(sdk.post("sessions/search").json()["sessions"]) >= 1


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def created(sdk: SdkClient, metadata: str) -> Any:
    return sdk.api.client.post(
        "/api/v1/create_session",
        f'{{"user_metadata": {{"k": {metadata}}}}}',
        content_type="application/json",
        headers=sdk.headers,
    )


@pytest.mark.parametrize(
    "value", ["1e308", "18446744073709551616", "-9223372036854775809", "1e-320", "-0.0", nested(30)]
)
def test_metadata_that_is_accepted_is_in_every_list(
    sdk: SdkClient, work: InProcessWorker, value: str
) -> None:
    answer = created(sdk, value)
    assert answer.status_code == 200, answer.content
    session = answer.json()["session_id"]
    model = sdk.model(session, user_metadata={"k": json.loads(value)})
    work()

    all_lists_answer(sdk, session, model)
    shown = sdk.api.get(f"/api/v1/sessions/{session}", **sdk.headers).json()["user_metadata"]["k"]
    assert json.loads(shown) == json.loads(value, parse_int=float)


@pytest.mark.parametrize("value", [nested(32), nested(300), '"\\u0000"', '{"\\u0000": 1}', "1e400"])
def test_metadata_that_could_not_be_shown_is_refused(sdk: SdkClient, value: str) -> None:
    answer = created(sdk, value)

    assert answer.status_code == 400
    detail = answer.json()["detail"]
    is_deep = value.startswith('{"a"')  # which is seen before the body is decoded
    assert "e400" in value or detail.startswith("The body nests" if is_deep else "user_metadata")
    assert not Session.objects.exists()


def test_text_that_only_looks_like_an_escape_is_kept(sdk: SdkClient) -> None:
    session = created(sdk, '"\\\\u0000 \\\\x00"').json()["session_id"]

    assert Session.objects.get(pk=session).user_metadata == {"k": "\\u0000 \\x00"}


def test_rows_that_an_older_version_stored_close_no_list(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    poison = {"big": 1e308, "whole": 2**64, "deep": deep}
    session = sdk.session()
    model = sdk.model(session)
    sdk.post("save_weights", model_id=model, seq_id=1, path="first")
    work()
    for table in (Session, Run, Checkpoint):
        assert table._default_manager.update(user_metadata=poison) == 1  # type: ignore[attr-defined]

    all_lists_answer(sdk, session, model)


def test_a_loss_with_a_huge_constant_is_computed_as_it_was_sent(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    """jsonb writes 1e30 as a whole number, which as an argument would be refused."""
    session = sdk.session()
    model = sdk.model(session)
    graph = {
        "format": 1,
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
            {
                "op": "call_function",
                "name": "m",
                "target": "torch.clamp",
                "args": [{"ref": "logprobs"}, -1e30, 1e30],
            },
            {"op": "call_method", "name": "x", "target": "sum", "args": [{"ref": "m"}]},
            {
                "op": "output",
                "name": "output",
                "target": "output",
                "args": [{"tuple": [{"ref": "x"}, {"dict": {}}]}],
            },
        ],
    }
    uploaded = sdk.post(
        "create_custom_loss",
        session_id=session,
        custom_loss_seq_id=0,
        name="clamped",
        inputs=[{"name": "logprobs", "rank": 1}],
        graph=graph,
    )
    loss_id = sdk.result(uploaded)["loss_id"]
    answer = sdk.forward_backward(model, 1, loss_fn="custom", config={"loss_id": loss_id})
    work()

    assert sdk.result(answer).metrics
    assert CustomLoss.objects.count() == 1


@pytest.mark.parametrize(
    "path", ["sessions/%00", "samplers/%00", "training_runs/a%00b", "adapters/%00"]
)
def test_an_address_that_names_what_cannot_exist_is_a_400(sdk: SdkClient, path: str) -> None:
    method = sdk.api.delete if path.startswith("adapters") else sdk.api.get
    answer = method(f"/api/v1/{path}", **sdk.headers)

    assert answer.status_code == 400
    assert "U+0000" in answer.json()["detail"]


def test_a_query_that_names_what_cannot_exist_is_a_400(sdk: SdkClient, api: ApiClient) -> None:
    answer = api.get("/api/v1/training_runs?project_id=%00", **sdk.headers)

    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("project_id: ")


MOMENTS = [
    "0001-01-01T00:00:00+14:00",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:00:00-14:00",
    "9999-12-31T23:00:00Z",
    "2026-01-01T00:00:00+99:00",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_times_at_the_ends_of_the_calendar_are_refused_by_name(sdk: SdkClient, moment: str) -> None:
    query = urlencode({"starting_on": moment, "ending_before": moment})
    usage = sdk.api.get(f"/api/v1/billing/usage/events?{query}", **sdk.headers)
    cursor = {"last_created_at": moment, "last_session_id": "x"}
    search = sdk.post("sessions/search", cursor=cursor)

    assert (usage.status_code, search.status_code) == (400, 400)
    assert usage.json()["detail"].startswith("starting_on: expected a time")
    assert search.json()["detail"].startswith("cursor.last_created_at: expected a time")


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31", "1969-12-31"])
def test_days_at_the_ends_of_the_calendar_are_refused_by_name(sdk: SdkClient, day: str) -> None:
    answer = sdk.api.get(f"/api/v1/audit?day={day}", **sdk.headers)

    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("day: expected a date")


@pytest.mark.parametrize("version", ["%00", "%0d%0aX-Evil:%201", "%22", "%e2%80%ae"])
def test_no_version_of_the_schema_gets_into_a_header(api: ApiClient, version: str) -> None:
    answer = api.get(f"/api/schema?version={version}")

    assert answer.status_code == 200
    assert "X-Evil" not in answer
    assert answer["Content-Disposition"] == 'inline; filename="tinkerapi.yaml"'
