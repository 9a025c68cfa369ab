"""POST /retrieve_future: pending, done, failed, cancelled, unknown, purged."""

from __future__ import annotations

HI = [[{"role": "user", "content": "hi"}]]


def test_a_pending_future_answers_202_with_its_place_in_the_queue(api):
    first = api.post("/fwdbwd", model_id="m", data=HI).json()
    second = api.post("/fwdbwd", model_id="m", data=HI).json()

    answer = api.post("/retrieve_future", request_id=second["request_id"])

    assert answer.status_code == 202
    assert answer["Retry-After"] == "1"
    body = answer.json()
    assert body["status"] == "pending"
    assert body["queue_position"] == 2  # the model's creation and the first request
    assert body["queue_state"] == "paused_capacity"
    assert first["request_id"] != second["request_id"]


def test_a_done_future_answers_the_bare_result_as_often_as_it_is_asked(api, work):
    request_id = api.post("/fwdbwd", model_id="m", data=HI).json()["request_id"]
    work()

    answers = [api.post("/retrieve_future", request_id=request_id) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert isinstance(answers[0].json()["loss"], float)


def test_a_waiting_retrieve_answers_as_soon_as_the_future_is_final(served_api):
    request_id = served_api.post("/fwdbwd", model_id="m", data=HI).json()["request_id"]

    answer = served_api.post("/retrieve_future", request_id=request_id, wait=30)

    assert answer.status_code == 200, answer.content
    assert answer.json()["model_id"] == "m"
