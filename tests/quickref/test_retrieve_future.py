"""POST /retrieve_future and /cancel_future: every state a future can be in."""

from __future__ import annotations

from django.utils import timezone

from futures.models import Future
from tests.conftest import ApiClient, local_client
from tests.waiting import LONG_SECONDS

HI = [[{"role": "user", "content": "hi"}]]


def submit(api, **body) -> str:
    return api.post("/fwdbwd", **{"model_id": "m", "data": HI, **body}).json()["request_id"]


def test_a_pending_future_answers_202_with_its_place_in_the_queue(api):
    submit(api)
    request_id = submit(api)

    answer = api.post("/retrieve_future", request_id=request_id)

    assert answer.status_code == 202
    assert answer["Retry-After"] == "1"
    body = answer.json()
    assert body["status"] == "pending"
    assert body["queue_position"] == 2  # the model's creation and the first request
    assert body["queue_state"] == "paused_capacity"
    assert body["queue_state_reason"] == "No worker serves this queue at the moment."


def test_a_done_future_answers_the_bare_result_as_often_as_it_is_asked(api, work):
    request_id = submit(api)
    work()

    answers = [api.post("/retrieve_future", request_id=request_id) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert isinstance(answers[0].json()["loss"], float)


def test_a_waiting_retrieve_answers_as_soon_as_the_future_is_final(served_api):
    request_id = submit(served_api)

    answer = served_api.post("/retrieve_future", request_id=request_id, wait=LONG_SECONDS)

    assert answer.status_code == 200, answer.content
    assert answer.json()["model_id"] == "m"


def test_a_failed_future_answers_500_with_its_message_as_often_as_it_is_asked(api, work):
    submit(api)
    for _ in range(2):
        request_id = api.post("/save_weights", model_id="m", name="taken").json()["request_id"]
    work()

    answers = [api.post("/retrieve_future", request_id=request_id) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [500, 500]
    body = answers[0].json()
    assert body == answers[1].json()
    assert set(body) == {"detail", "request_id", "error_code", "category"}
    assert body["detail"].startswith("Job failed: ")
    assert body["error_code"] == "CheckpointExists"
    assert body["category"] == "user"
    assert body["request_id"] == request_id


def test_a_cancelled_future_answers_409_and_the_next_in_its_lane_runs(api, work):
    cancelled, kept = submit(api), submit(api)

    answer = api.post("/cancel_future", request_id=cancelled)
    work()

    assert answer.json() == {"status": "cancelled", "request_id": cancelled}
    asked = api.post("/retrieve_future", request_id=cancelled)
    assert asked.status_code == 409
    assert asked.json()["error_code"] == "FutureCancelled"
    assert api.post("/retrieve_future", request_id=kept).status_code == 200


def test_a_done_future_cannot_be_cancelled(api, work):
    request_id = submit(api)
    work()

    answer = api.post("/cancel_future", request_id=request_id)

    assert answer.status_code == 409
    assert answer.json()["error_code"] == "FutureNotCancellable"


def test_an_unknown_future_is_a_404(api):
    for path in ("/retrieve_future", "/cancel_future"):
        answer = api.post(path, request_id="future_abc123")
        assert answer.status_code == 404
        assert answer.json()["detail"] == "request_id: you have no future 'future_abc123'"


def test_a_pruned_future_is_a_410(api, work):
    request_id = submit(api)
    work()
    Future.objects.filter(pk=request_id).update(payload=None, result=None, pruned_at=timezone.now())

    answer = api.post("/retrieve_future", request_id=request_id)

    assert answer.status_code == 410
    assert answer.json()["error_code"] == "FuturePurged"


def test_a_wait_is_cut_to_the_servers_limit(transactional_db, settings):
    settings.MAX_WAIT_SECONDS = 0.01
    client = ApiClient(local_client())
    request_id = submit(client)

    answer = client.post("/retrieve_future", request_id=request_id, wait=1e9)

    assert answer.status_code == 202


def test_another_lane_does_not_wait_for_a_cancelled_one(api, work):
    first = submit(api, model_id="a")
    api.post("/cancel_future", request_id=first)
    second = submit(api, model_id="b")
    work()

    assert api.post("/retrieve_future", request_id=second).status_code == 200
