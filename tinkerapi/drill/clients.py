"""Typical clients: they give each request a key, and repeat it until it is answered.

The server makes that safe: an Idempotency-Key (quick reference) or a place in the
model's order (``seq_id``, the tinker SDK) identifies one request, even if a process was killed
between its commit and its answer. A client stores every answer, word for word.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from http import HTTPStatus

from tinkerapi.drill.dialects import PATHS, quick_reference_body, sdk_body
from tinkerapi.drill.job import Request, Trainee
from tinkerapi.drill.transport import Connection, GivenUp, Json, Progress

WAIT_SECONDS = 20.0  # how long the server may hold a request


@dataclass
class Client(ABC):
    """One trainee's training loop."""

    trainee: Trainee
    base_model: str
    connection: Connection
    progress: Progress
    answers: dict[str, str] = field(default_factory=dict)
    """Request name -> status and body of its final answer, as one text."""
    error: str = ""
    """Why it gave up; empty if it did not."""
    _began: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Run all steps of the trainee; never raises."""
        try:
            self.prepare()
            for step in self.trainee.steps:
                self.take(step)
        except Exception as error:  # a thread must report its failure
            self.error = f"{self.trainee.name}: {type(error).__name__}: {error}"
        finally:
            self.connection.close()

    @property
    def model_id(self) -> str:
        """The server's id of the trainee."""
        return self.trainee.name

    def prepare(self) -> None:
        """Do the work before the first request, if any."""
        return

    @abstractmethod
    def take(self, step: list[Request]) -> None:
        """Send one step's requests and keep their answers."""

    def begins(self, request: Request) -> None:
        """Record that the request is sent for the first time."""
        self._began[request.name] = time.monotonic()
        self.progress.submits()

    def keeps(self, request: Request, status: int, answer: Json) -> None:
        """Record a final answer.

        Raises:
            GivenUp: The server failed, not the request.
        """
        if status >= HTTPStatus.BAD_REQUEST and "request_id" not in answer:
            raise GivenUp(f"{request.name}: {status} {answer}")
        answer.pop("request_id", None)
        # The HTTP status of a failure differs between a waiting call and /retrieve_future.
        outcome = status if status < HTTPStatus.BAD_REQUEST else "failed"
        text = json.dumps({"status": outcome, **answer}, sort_keys=True)
        self.answers[request.name] = text.replace(self.model_id, self.trainee.name)
        self.progress.answers(time.monotonic() - self._began.pop(request.name))

    def fetch(self, request_id: str) -> tuple[int, Json]:
        """A future's final answer."""
        while True:
            status, answer = self.connection.post(
                "/retrieve_future", {"request_id": request_id, "wait": WAIT_SECONDS}
            )
            if status != HTTPStatus.ACCEPTED:
                return status, answer


class WaitingClient(Client):
    """Waits for each result before it sends the next request."""

    def take(self, step: list[Request]) -> None:
        for request in step:
            self.begins(request)
            status, answer = self.connection.post(
                f"/api/v1/{PATHS[request.kind]}",
                {**quick_reference_body(request, self.model_id), "wait": WAIT_SECONDS},
                **{"Idempotency-Key": request.name},
            )
            if status == HTTPStatus.ACCEPTED:
                status, answer = self.fetch(answer["request_id"])
            self.keeps(request, status, answer)


class FuturesClient(Client):
    """Submits a whole step, then fetches its results."""

    def take(self, step: list[Request]) -> None:
        futures: list[tuple[Request, str]] = []
        for request in step:
            if request.kind == "sample_kept":  # the path must exist first
                self._fetch_all(futures)
                futures = []
            self.begins(request)
            futures.append((request, self.submit(request)))
        self._fetch_all(futures)

    def submit(self, request: Request) -> str:
        """Send the request and return its future's id."""
        path = "asample" if request.kind.startswith("sample") else f"{PATHS[request.kind]}_async"
        body = quick_reference_body(request, self.model_id)
        return self._request_id(
            request,
            self.connection.post(f"/api/v1/{path}", body, **{"Idempotency-Key": request.name}),
        )

    def _fetch_all(self, futures: list[tuple[Request, str]]) -> None:
        for request, request_id in futures:
            self.keeps(request, *self.fetch(request_id))

    @staticmethod
    def _request_id(request: Request, answer: tuple[int, Json]) -> str:
        status, body = answer
        if status != HTTPStatus.OK:
            raise GivenUp(f"{request.name}: {status} {body}")
        return str(body["request_id"])


class NumberedClient(FuturesClient):
    """Numbers its requests within its model, as the tinker SDK does.

    It uses the JSON of the SDK's first versions; newer ones send the same in protobuf.
    """

    session_id = ""
    _seq_id = 0
    _sampling_sessions = 0

    @property
    def model_id(self) -> str:
        return f"{self.session_id}:train:0"

    def prepare(self) -> None:
        status, answer = self.connection.post(
            "/api/v1/create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.20.0"}
        )
        if status != HTTPStatus.OK:
            raise GivenUp(f"create_session: {status} {answer}")
        self.session_id = str(answer["session_id"])

    def submit(self, request: Request) -> str:
        if request.kind == "create":
            place: Json = {
                "session_id": self.session_id,
                "model_seq_id": 0,
                "base_model": self.base_model,
            }
        elif request.kind == "sample_kept":
            sampler = f"{self.session_id}:sample:{self._sampling_sessions}"
            place = {"sampling_session_id": sampler, "seq_id": 1}
        else:
            self._seq_id += 1
            place = {"model_id": self.model_id, "seq_id": self._seq_id}
            if request.kind == "keep":
                self._sampling_sessions += 1
                place["sampling_session_seq_id"] = self._sampling_sessions
        path, body = sdk_body(request, self.model_id)
        return self._request_id(request, self.connection.post(path, {**place, **body}))

    def fetch(self, request_id: str) -> tuple[int, Json]:
        while True:
            status, answer = self.connection.post(
                "/api/v1/retrieve_future", {"request_id": request_id}
            )
            if status != HTTPStatus.REQUEST_TIMEOUT:  # the SDK's "try again"
                return status, answer

    def keeps(self, request: Request, status: int, answer: Json) -> None:
        # This name differs from session to session.
        if "sampling_session_id" in answer:
            answer["sampling_session_id"] = answer["sampling_session_id"].rpartition(":")[2]
        super().keeps(request, status, answer)


CLIENTS: dict[str, type[Client]] = {
    "waiting": WaitingClient,
    "futures": FuturesClient,
    "numbered": NumberedClient,
}
