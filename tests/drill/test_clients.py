"""A client keeps what every answer says, whichever address says it."""

from __future__ import annotations

from typing import Any

from tinkerapi.drill.clients import WaitingClient
from tinkerapi.drill.job import Request, make_job
from tinkerapi.drill.transport import Json, Progress

FAILURE = {"detail": "Job failed: data[0]", "error_code": "InvalidDatum", "request_id": "future_0"}
LATE = {"status": "pending", "request_id": "future_0"}


class Scripted:
    """A connection whose answers are known."""

    def __init__(self, *answers: tuple[int, Json]) -> None:
        self.answers = list(answers)

    def post(self, path: str, body: Json, **headers: str) -> Any:
        status, answer = self.answers.pop(0)
        return status, dict(answer)


def answers_kept(*answers: tuple[int, Json]) -> dict[str, str]:
    [trainee, *_] = make_job(seed=1, steps=1, trainees=1)
    client = WaitingClient(trainee, "model", Scripted(*answers), Progress())
    client.take([Request(name="one", kind="optim_step", fields={"learning_rate": 1.0})])
    return client.answers


def test_a_failure_is_the_same_whether_it_was_waited_for_or_fetched() -> None:
    waited = answers_kept((400, FAILURE))
    fetched = answers_kept((202, LATE), (500, FAILURE))

    assert waited == fetched
    assert "InvalidDatum" in waited["one"]


def test_a_failure_is_not_the_same_as_a_result() -> None:
    assert answers_kept((200, FAILURE)) != answers_kept((400, FAILURE))
