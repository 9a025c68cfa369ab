"""Lists and single things by address: runs, checkpoints, sessions; and what may be done to them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.utils import timezone
from tinker import types

from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tinkerapi.services import api_key_create
from training.models import Checkpoint, Session


@pytest.fixture
def rest(sdk: SdkClient) -> Callable[..., Any]:
    """``rest("GET", "training_runs?limit=1")``: a call with the SDK's headers."""

    def call(method: str, path: str, body: object = "", client: SdkClient = sdk) -> Any:
        send = getattr(client.api.client, method.lower())
        more = {} if method == "GET" else {"data": body, "content_type": "application/json"}
        return send(f"/api/v1/{path}", headers=client.headers, **more)

    return call


@pytest.fixture
def other(api: ApiClient, sdk: SdkClient) -> SdkClient:
    """Another user."""
    _, key = api_key_create(user=get_user_model().objects.create_user("colleague"), name="k")
    return SdkClient(api, key)


@pytest.fixture
def model_id(sdk: SdkClient, work: InProcessWorker) -> str:
    """A model with checkpoints ``weights/a``, ``weights/b``, ``sampler_weights/a``,
    ``external_weights/a`` and a sampling session."""
    model_id = sdk.model(user_metadata={"purpose": "test", "layers": 3})
    fields = {"model_id": model_id}
    sdk.post("save_weights", **fields, seq_id=1, path="a", user_metadata={"k": "v"})
    sdk.post("save_weights", **fields, seq_id=2, path="b")
    sdk.post("save_weights_for_sampler", **fields, seq_id=3, path="a")
    sdk.post("save_weights_external", **fields, seq_id=4, path="a")
    sdk.post("save_weights_for_sampler", **fields, seq_id=5, sampling_session_seq_id=0)
    work()
    return model_id


def test_runs_are_listed_newest_first_a_page_at_a_time(
    sdk: SdkClient, rest: Callable[..., Any], model_id: str, other: SdkClient
) -> None:
    other.model()
    newest = sdk.model()

    body = rest("GET", "training_runs?limit=1&offset=1&access_scope=owned").json()
    assert body["cursor"] == {"offset": 1, "limit": 1, "total_count": 2}
    [run] = [types.TrainingRun.model_validate(item) for item in body["training_runs"]]
    assert (run.training_run_id, run.model_owner, run.lora_rank) == (model_id, "researcher", 4)
    assert run.last_checkpoint is not None
    assert run.last_sampler_checkpoint is not None
    assert run.last_checkpoint.tinker_path == f"tinker://{model_id}/weights/b"
    assert run.last_sampler_checkpoint.checkpoint_id == "sampler_weights/a"
    assert run.user_metadata == {"purpose": "test", "layers": "3"}
    assert not run.corrupted
    assert run.last_request_time.tzinfo is not None
    everything = rest("GET", "training_runs").json()["training_runs"]
    assert [item["training_run_id"] for item in everything] == [newest, model_id]


def test_a_page_of_runs_costs_as_many_queries_as_a_longer_one(
    sdk: SdkClient, rest: Callable[..., Any], model_id: str, django_assert_num_queries: Any
) -> None:
    sdk.model()
    rest("GET", "training_runs")
    with django_assert_num_queries(3):  # runs, how many, their checkpoints
        rest("GET", "training_runs?limit=1")
    with django_assert_num_queries(3):
        rest("GET", "training_runs?limit=2")


def test_checkpoints_are_listed_by_run_and_in_all_without_those_of_sampling_sessions(
    rest: Callable[..., Any], model_id: str, other: SdkClient
) -> None:
    ids = ["external_weights/a", "sampler_weights/a", "weights/b", "weights/a"]

    of_run = rest("GET", f"training_runs/{model_id}/checkpoints").json()["checkpoints"]
    assert [item["checkpoint_id"] for item in of_run] == ids
    first = types.Checkpoint.model_validate(of_run[-1])
    assert (first.checkpoint_type, first.user_metadata, first.public) == (
        "training",
        {"k": "v"},
        False,
    )
    page = rest("GET", "checkpoints?limit=2&offset=1").json()
    assert [item["checkpoint_id"] for item in page["checkpoints"]] == ids[1:3]
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": 4}
    assert rest("GET", "checkpoints", client=other).json()["checkpoints"] == []


def test_a_removed_models_run_stays_with_its_checkpoints(
    sdk: SdkClient, work: InProcessWorker, rest: Callable[..., Any], model_id: str
) -> None:
    sdk.post("unload_model", model_id=model_id)
    work()

    assert rest("GET", f"training_runs/{model_id}").json()["training_run_id"] == model_id
    assert rest("GET", "training_runs").json()["cursor"]["total_count"] == 1
    assert len(rest("GET", f"training_runs/{model_id}/checkpoints").json()["checkpoints"]) == 4


@pytest.mark.parametrize(
    "query",
    ["limit=-1", "limit=x", "offset=1e3", "access_scope=all", "offset=99999999999999999999"],
)
def test_a_query_that_makes_no_sense_is_refused_by_name(
    rest: Callable[..., Any], query: str
) -> None:
    answer = rest("GET", f"training_runs?{query}")

    assert answer.status_code == 400
    assert query.partition("=")[0] in answer.json()["detail"]


def test_publishing_twice_is_like_once_and_so_is_the_opposite(
    rest: Callable[..., Any], model_id: str
) -> None:
    path = f"training_runs/{model_id}/checkpoints/weights/a/publish"
    for method, public in (("POST", True), ("POST", True), ("DELETE", False), ("DELETE", False)):
        answer = rest(method, path)
        assert (answer.status_code, answer.content) == (204, b"")
        assert Checkpoint.objects.get(kind="training", name="a").public is public


def test_a_ttl_is_set_and_cleared_and_an_expired_checkpoint_is_absent(
    sdk: SdkClient, rest: Callable[..., Any], model_id: str
) -> None:
    path = f"training_runs/{model_id}/checkpoints/weights/a"
    assert rest("PUT", f"{path}/ttl", {"ttl_seconds": 3600}).status_code == 204
    listed = rest("GET", f"training_runs/{model_id}/checkpoints").json()["checkpoints"][-1]
    left = datetime.fromisoformat(listed["expires_at"]) - timezone.now()
    assert timedelta(minutes=59) < left <= timedelta(hours=1)

    assert rest("PUT", f"{path}/ttl", {"ttl_seconds": None}).status_code == 204
    row = Checkpoint.objects.get(kind="training", name="a")
    assert row.expires_at is None

    long_ago = timezone.now() - timedelta(hours=2)
    Checkpoint.objects.filter(pk=row.pk).update(
        created_at=long_ago, expires_at=long_ago + timedelta(hours=1)
    )
    assert rest("POST", f"{path}/publish").status_code == 404
    assert rest("GET", "checkpoints").json()["cursor"]["total_count"] == 3
    info = sdk.post("weights_info", tinker_path=f"tinker://{model_id}/weights/a")
    assert info.status_code == 404


@pytest.mark.parametrize("body", [{"ttl_seconds": 3599}, {"ttl_seconds": 315360001}, {}, [], "x"])
def test_a_ttl_out_of_range_is_refused(
    rest: Callable[..., Any], model_id: str, body: object
) -> None:
    answer = rest("PUT", f"training_runs/{model_id}/checkpoints/weights/a/ttl", body)

    assert answer.status_code == 400


def test_a_deleted_checkpoint_is_gone_with_its_files(
    rest: Callable[..., Any], model_id: str, settings: Any
) -> None:
    directory = settings.DATA_DIR / Checkpoint.objects.get(kind="training", name="a").directory
    assert directory.exists()
    path = f"training_runs/{model_id}/checkpoints/weights/a"

    assert rest("DELETE", path).status_code == 204
    assert not directory.exists()
    assert rest("DELETE", path).status_code == 404


def test_anothers_things_answer_as_those_that_do_not_exist(
    rest: Callable[..., Any], model_id: str, other: SdkClient
) -> None:
    Checkpoint.objects.update(public=True)  # may be read and downloaded, but not changed
    session_id = model_id.partition(":")[0]
    a_run = f"training_runs/{model_id}"
    for method, path, body in (
        ("GET", a_run, ""),
        ("GET", f"{a_run}/checkpoints", ""),
        ("DELETE", f"{a_run}/checkpoints/weights/a", ""),
        ("POST", f"{a_run}/checkpoints/weights/a/publish", ""),
        ("PUT", f"{a_run}/checkpoints/weights/a/ttl", {"ttl_seconds": 4000}),
        ("GET", f"sessions/{session_id}", ""),
        ("GET", f"sessions/{session_id}/trace_export", ""),
        ("PUT", f"sessions/{session_id}/project", {"project_id": "p"}),
    ):
        theirs = rest(method, path, body, client=other)
        missing = rest(method, path.replace(session_id, "0" * len(session_id)), body, client=other)
        assert theirs.status_code == missing.status_code == 404, path
        assert theirs.json()["error_code"] == missing.json()["error_code"]


def test_a_session_lists_its_models_and_samplers(
    sdk: SdkClient, rest: Callable[..., Any], model_id: str
) -> None:
    session_id = model_id.partition(":")[0]
    newer = sdk.session()

    assert rest("GET", "sessions?limit=5").json() == {"sessions": [newer, session_id]}
    assert rest("GET", "sessions?limit=1&offset=1").json() == {"sessions": [session_id]}
    session = rest("GET", f"sessions/{session_id}?access_scope=accessible").json()
    assert types.GetSessionResponse.model_validate(session).training_run_ids == [model_id]
    assert session["sampler_ids"] == [f"{session_id}:sample:0"]


def test_a_session_moves_to_a_project_and_its_runs_with_it(
    rest: Callable[..., Any], model_id: str
) -> None:
    session_id = model_id.partition(":")[0]
    assert rest("PUT", f"sessions/{session_id}/project", {"project_id": "p1"}).status_code == 204

    runs = rest("GET", "training_runs?project_id=p1").json()["training_runs"]
    assert [run["training_run_id"] for run in runs] == [model_id]
    assert rest("GET", "training_runs?project_id=p2").json()["training_runs"] == []


def found(answer: Any) -> list[str]:
    parsed = types.SessionSearchResponse.model_validate(answer.json())
    return [session.session_id for session in parsed.sessions]


def test_sessions_are_found_by_name_project_metadata_and_state(
    sdk: SdkClient, model_id: str
) -> None:
    of_model = model_id.partition(":")[0]
    named = sdk.post(
        "create_session",
        sdk_version="0.38.0",
        display_name="Blue Whale run",
        project_id="sea",
        user_metadata={"k": "v"},
    ).json()["session_id"]
    sdk.post(f"sessions/{named}/finish", reason={"type": "errored"}, detail="out of krill")

    def search(**query: object) -> list[str]:
        return found(sdk.post("sessions/search", **query))

    assert search() == [named, of_model]
    assert search(display_name="whale BLUE") == [named]
    assert search(display_name="whale", session_id=of_model) == [named, of_model]
    assert search(project_ids=["sea", "land"]) == [named]
    assert search(user_metadata={"k": "v"}) == [named]
    assert search(user_metadata={"k": "w"}) == []
    assert search(statuses=[{"type": "active"}]) == [of_model]
    assert search(statuses=[{"type": "client_finished", "reasons": ["errored"]}]) == [named]
    assert search(statuses=[{"type": "client_finished", "reasons": ["success"]}]) == []
    assert search(statuses=[{"type": "failed"}]) == []
    assert search(owner={"type": "user", "owner_urns": ["tml:user:researcher"]}) == [
        named,
        of_model,
    ]
    assert search(owner={"type": "user", "owner_urns": ["tml:user:colleague"]}) == []


def test_a_search_goes_on_where_the_last_page_ended(sdk: SdkClient, model_id: str) -> None:
    moment = timezone.now()
    for _ in range(3):
        sdk.session()
    Session.objects.update(created_at=moment)  # the id decides
    pages, cursor = [], None
    while True:
        answer = sdk.post("sessions/search", limit=3, **({"cursor": cursor} if cursor else {}))
        pages.append(found(answer))
        cursor = answer.json()["next_cursor"]
        if cursor is None:
            break

    ids = list(Session.objects.order_by("-id").values_list("id", flat=True))
    assert pages == [ids[:3], ids[3:]]


def test_a_search_counts_the_checkpoints_that_lists_show(sdk: SdkClient, model_id: str) -> None:
    [session] = sdk.post("sessions/search").json()["sessions"]

    listed = Checkpoint.objects.filter(ephemeral=False)
    assert session["checkpoints_count"] == 4
    assert session["checkpoint_storage_bytes"] == sum(row.size_bytes for row in listed)
    assert session["status"] == {"type": "active"}
