"""Two tenants of one server: Zelda, who has one object of every kind, and Bob, who is curious."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db.models import Model

from futures.models import Future, Lane
from futures.waiters import future_wait
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.test_custom_loss_steps import uploaded
from tinkerapi.api.openai import views as openai_views
from tinkerapi.api.quickref import render as answers
from tinkerapi.api.sdk.views import futures as sdk_futures
from tinkerapi.models import ApiKey
from tinkerapi.services import api_key_create
from training.base_models import base_model_get
from training.models import (
    Checkpoint,
    ClientMetrics,
    CustomLoss,
    DailyUsage,
    RecordedSample,
    RenderedData,
    Rollout,
    Run,
    SampledStep,
    SamplingSession,
    Session,
    Snapshot,
)

HI = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]

OWNED: Mapping[type[Model], str] = {
    Future: "owner",
    Lane: "owner",
    Run: "owner",
    Session: "owner",
    Checkpoint: "run__owner",
    Snapshot: "run__owner",
    SamplingSession: "session__owner",
    CustomLoss: "session__owner",
    RecordedSample: "session__owner",
    ClientMetrics: "run__owner",
    SampledStep: "run__owner",
    Rollout: "run__owner",
    RenderedData: "run__owner",
    DailyUsage: "owner",
    ApiKey: "user",
}
"""Every model whose rows have an owner, and the field of the owner."""

Ids = dict[str, str]


@dataclass(frozen=True)
class Tenant:
    """A user with a key, in both dialects."""

    name: str
    user_id: int
    key: str
    api: ApiClient

    @property
    def sdk(self) -> SdkClient:
        return SdkClient(self.api, self.key)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        sdk: bool = False,
        headers: Ids | None = None,
    ) -> Any:
        """Send a request as the quick reference or the SDK would."""
        headers = {"X-API-Key": self.key, **(headers or {})}
        if sdk:
            headers["X-Stainless-Package-Version"] = "0.38.0"
        data = b"" if body is None else json.dumps(body).encode()
        return self.api.client.generic(
            method, path, data, content_type="application/json", headers=headers
        )

    def rows(self) -> dict[str, Any]:
        """All of a tenant's rows in the database, for comparison."""
        return {
            model.__name__: list(
                model._default_manager.filter(**{owner: self.user_id}).order_by("pk").values()
            )
            for model, owner in OWNED.items()
        }


@pytest.fixture
def tenant(api: ApiClient) -> Callable[[str], Tenant]:
    """``tenant("zelda")``: a new user with a key."""

    def make(name: str) -> Tenant:
        user = get_user_model().objects.create_user(name)
        _, key = api_key_create(user=user, name=f"{name}-key")
        return Tenant(name, user.pk, key, api)

    return make


@pytest.fixture
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that wait look once, and answer that their time is up."""

    async def look(
        request_id: str, *, owner_id: int, timeout_seconds: float, **more: object
    ) -> Future | None:
        return await future_wait(request_id, owner_id=owner_id, timeout_seconds=0)

    for module in (answers, sdk_futures, openai_views):
        monkeypatch.setattr(module, "future_wait", look)


def furnished(tenant: Tenant, work: InProcessWorker) -> Ids:
    """One of everything for a tenant; the ids by which a request could name it.

    Names hold the tenant's own name, so that they can be found wherever they should not be.
    """
    sdk, name = tenant.sdk, tenant.name
    session = str(
        sdk.post(
            "create_session",
            tags=[f"{name}-tag"],
            user_metadata={"note": f"{name}-note"},
            project_id=f"{name}-project",
            display_name=f"{name} display",
            sdk_version="0.38.0",
        ).json()["session_id"]
    )
    model = sdk.model(session, user_metadata={"note": f"{name}-metadata"})
    sdk.forward_backward(model, 1)
    sdk.optim_step(model, 2, learning_rate=0.1)
    checkpoint = f"{name}-checkpoint"
    sdk.post("save_weights", model_id=model, seq_id=3, path=checkpoint)
    sdk.post("save_weights_for_sampler", model_id=model, seq_id=4, path=checkpoint)
    sdk.post("save_weights_external", model_id=model, seq_id=5, path=checkpoint)
    plain = f"{name}-model"
    done = tenant.ask("POST", "/fwdbwd", {"model_id": plain, "data": HI}).json()["request_id"]
    tenant.ask("POST", "/save_weights", {"model_id": plain, "name": checkpoint})
    tenant.ask("POST", "/save_weights_for_sampler", {"model_id": plain, "name": checkpoint})
    work()
    work.loop.adapter_cache.snapshot_all()
    sampler = sdk.post(
        "create_sampling_session",
        session_id=session,
        sampling_session_seq_id=1,
        model_path=f"tinker://{model}/sampler_weights/{checkpoint}",
    ).json()["sampling_session_id"]
    loss = uploaded(sdk, session)["loss_id"]
    work()
    return {
        "session": session,
        "sdk_model": model,
        "plain_model": plain,
        "checkpoint": checkpoint,
        "sampler": str(sampler),
        "loss": str(loss),
        "done": str(done),
        "key": tenant.key,
        "name": name,
    }


def waiting(tenant: Tenant) -> str:
    """A request of the tenant's that no worker has begun; its id."""
    body = {"model_id": f"{tenant.name}-model", "data": HI}
    return str(tenant.ask("POST", "/fwdbwd", body).json()["request_id"])


def of_nobody(ids: Ids) -> Ids:
    """Ids of the same form that name nothing."""
    session = "0" * len(ids["session"])
    other = {
        "session": session,
        "plain_model": re.sub(r"^[a-z]+", lambda name: "x" * len(name[0]), ids["plain_model"]),
        "done": "future_" + "0" * 32,
        "pending": "future_" + "1" * 32,
        "key": ids["key"][:-4] + "0000",
        "name": "x" * len(ids["name"]),
        "checkpoint": ids["checkpoint"],  # below a run that does not exist
    }
    for name in ("sdk_model", "sampler", "loss"):
        other[name] = ids[name].replace(ids["session"], session)
    return other


@pytest.fixture
def base_model() -> str:
    return base_model_get(None).name
