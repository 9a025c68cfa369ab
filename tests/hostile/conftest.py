"""A hostile tenant, and the properties that must hold afterwards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import transaction

from futures.models import Future
from futures.workers import worker_live
from tests.conftest import ApiClient, InProcessWorker
from tests.hostile.examples import Example
from tests.isolation.conftest import Ids, Tenant, furnished, nobody_waits, tenant
from tinkerapi.api.bodies.limit import HEAD_BYTES
from tinkerapi.api.sdk.views import sampling
from training.base_models import base_model_get
from training.storage.data_folder import DataFolder

__all__ = ["nobody_waits", "tenant"]

WHOLE = os.environ.get("HOSTILE") == "all"
"""Whether every case is run instead of some."""

NUMBERED = re.compile(
    r"/api/v1/(forward|forward_backward|optim_step|save_weights|save_weights_for_sampler"
    r"|save_weights_external|load_weights)$"
)
"""Addresses at which the SDK's requests have a place in a model's order."""

DESTRUCTIVE = re.compile(
    r"remove_lora|unload_model|/finish$|/project$|cancel|auth/apikey|adapters/"
)
"""Requests that would leave the next ones nothing to ask about; they are undone."""

NUMBERS = ("model_seq_id", "custom_loss_seq_id", "sampling_session_seq_id")

READS = (
    "/api/v1/sessions",
    "/api/v1/sessions/{session}",
    "/api/v1/training_runs?limit=1000",
    "/api/v1/training_runs/{sdk_model}",
    "/api/v1/training_runs/{sdk_model}/checkpoints",
    "/api/v1/training_runs/{plain_model}/checkpoints",
    "/api/v1/checkpoints?limit=1000",
    "/api/v1/samplers/{sampler}",
    "/api/v1/adapters",
    "/api/v1/audit",
    "/api/v1/billing/usage/checkpoints/current",
    "/api/v1/billing/usage/events?{hours}",
    "/api/v1/auth/apikey/me",
    "/v1/models",
)


@dataclass
class Attacker:
    """A tenant with one object of every kind, who counts the numbers of one model."""

    tenant: Tenant
    ids: Ids
    work: InProcessWorker
    base_model: str
    seq_id: int
    """The last number that was sent to the model."""
    faults: list[str] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    requests: int = 0
    read: set[str] = field(default_factory=set)
    """Futures whose results were asked for."""

    def send(
        self, method: str, path: str, body: bytes | str = b"", *, sdk: bool = False, **more: Any
    ) -> Any:
        """The answer; one of 5xx is a fault, unless it says that a job waits or failed."""
        if self.requests % 100 == 0:
            worker_live(self.work.worker, {})  # else /readyz says rightly that it is silent
        headers = {"X-API-Key": self.tenant.key, **more.pop("headers", {})}
        if sdk:
            headers["X-Stainless-Package-Version"] = "0.38.0"
        data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        more = {"content_type": "application/json", **more}
        with transaction.atomic() if DESTRUCTIVE.search(path) else nullcontext():
            answer = self.tenant.api.client.generic(method, path, data, headers=headers, **more)
            if DESTRUCTIVE.search(path):
                transaction.set_rollback(True)
        self.requests += 1
        self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
        if answer.status_code >= 500 and not is_told(answer):
            self.fault(f"{answer.status_code} {method} {path[:200]}", data, answer)
        return answer

    def fault(self, what: str, body: bytes, answer: Any = None) -> None:
        said = answer.content[:200] if answer is not None else ""
        self.faults.append(f"{what} {body[:600]!r} -> {said!r}")

    def numbered(self, example: Example, body: bytes | str) -> None:
        """Send a body that holds the model's next number, unless it was spoilt too."""
        answer = self.send(example.method, example.path, body, sdk=example.sdk)
        data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        self.check_number(ids_read(data), data, answer)

    def check_number(self, ids: tuple[Any, Any] | None, body: bytes, answer: Any) -> None:
        """A number that could be read is used up; one that could not is sent again, and well.

        Of a body that is too large only the beginning is read.
        """
        is_cut_off = answer.status_code == 413 and not ids_are_at_the_beginning(body)
        model, number = (None if is_cut_off else ids) or (None, None)
        is_ours = model == self.ids["sdk_model"] and type(number) is int
        is_used_up = answer.status_code == 200 or b'"SeqIdReused"' in answer.content
        if is_ours and 0 < number < 2**31 and not is_used_up:
            self.fault(f"number {number} is not used up: {answer.status_code}", body, answer)
        if not (is_ours and number == self.seq_id and answer.status_code == 200):
            self.step(self.seq_id)

    def step(self, number: int) -> Any:
        return self.tenant.sdk.optim_step(self.ids["sdk_model"], number)

    def next_body(self, body: Any) -> Any:
        """The body with numbers that were not used yet."""
        self.seq_id += 1
        if not isinstance(body, dict):
            return body
        fresh = {name: self.seq_id + 1000 for name in NUMBERS if name in body}
        return {**body, **fresh, **({"seq_id": self.seq_id} if "seq_id" in body else {})}

    def settle(self, since: str) -> None:
        """Everything is computed, every result is read, and every list answers."""
        self.work()
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0, tzinfo=None)
        hours = f"starting_on={hour - timedelta(hours=1):%FT%TZ}&ending_before={hour:%FT%TZ}"
        for path in READS:
            answer = self.send("GET", path.format(**self.ids, hours=hours), sdk=True)
            if answer.status_code != 200:
                self.fault(f"after {since}: {path}", b"", answer)
        answer = self.send("POST", "/api/v1/sessions/search", "{}", sdk=True)
        if answer.status_code != 200:
            self.fault(f"after {since}: search", b"", answer)
        mine = Future.objects.filter(owner_id=self.tenant.user_id).values_list("pk", flat=True)
        for request_id in set(mine) - self.read:
            self.read.add(request_id)
            body = json.dumps({"request_id": request_id})
            for path, sdk in (("/api/v1/retrieve_future", True), ("/retrieve_future", False)):
                self.send("POST", path, body, sdk=sdk)

    def check(self) -> None:
        """No fault, and the model continues at its next number."""
        last = self.step(self.seq_id + 1)
        self.settle("the end")
        metrics = self.tenant.sdk.result(last).get("metrics")
        waiting = Future.objects.filter(
            lane_id=self.ids["sdk_model"], seq_id__lte=self.seq_id, state__in=["pending", "running"]
        )
        assert not self.faults, f"{len(self.faults)} faults\n" + "\n".join(self.faults[:20])
        assert metrics, self.tenant.sdk.retrieve(last).content
        assert not waiting.exists()


def is_told(answer: Any) -> bool:
    """Whether a 5xx is the documented answer of the address for a failed or late future."""
    try:
        body = answer.json()
    except ValueError:
        return False
    error = body.get("error", body)
    code = error.get("error_code") or error.get("code")
    return code == "Timeout" or ("request_id" in body and code != "ServerError")


def ids_read(body: bytes) -> tuple[Any, Any] | None:
    """Model id and number as another JSON reader finds them, which takes NaN and half a pair."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return (value.get("model_id"), value.get("seq_id")) if isinstance(value, dict) else None


def ids_are_at_the_beginning(body: bytes) -> bool:
    """Whether a JSON body has both ids in the part that is read even if it is too large."""
    places = [body.rfind(name) for name in (b'"model_id":', b'"seq_id":')]
    return max(places) < HEAD_BYTES - 1000


@pytest.fixture
def attacker(
    transactional_db: None,
    tenant: Callable[[str], Tenant],
    work: InProcessWorker,
    api: ApiClient,
    nobody_waits: None,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
) -> Attacker:
    """Statements commit one by one, as in a server."""
    worker_live(work.worker, {})
    settings.SYNC_TIMEOUT_SECONDS = 0
    settings.MAX_ADAPTERS = 10**6
    monkeypatch.setattr(sampling, "POLL_SECONDS", 0)
    monkeypatch.setattr(DataFolder, "delete", lambda *args: None)
    mallory = tenant("mallory")
    ids = furnished(mallory, work)
    ids["pending"] = ids["done"]
    return Attacker(mallory, ids, work, base_model_get(None).name, seq_id=5)
