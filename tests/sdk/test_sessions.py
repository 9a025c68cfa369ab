"""Sessions, flags and models over HTTP: begin, live, end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.conf import LazySettings, settings
from django.utils import timezone
from tinker import types

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from training.errors import OutOfMemory
from training.models import Run, Session
from training.selectors import futures_prunable
from training.services.sessions import sessions_expire


def test_a_session_lives_and_ends_with_the_first_reason(sdk: SdkClient) -> None:
    answer = sdk.post(
        "create_session",
        tags=["b", "a"],
        user_metadata={"k": 1},
        sdk_version="0.38.0",
        project_id="p",
        type="create_session",
    )
    session_id = answer.json()["session_id"]
    assert not set(session_id) & set(":/")
    beat = sdk.post("session_heartbeat", session_id=session_id)
    assert (beat.status_code, beat.json()) == (200, {"type": "session_heartbeat"})

    for reason, detail in (("success", None), ("errored", "late")):
        ended = sdk.post(f"sessions/{session_id}/finish", reason={"type": reason}, detail=detail)
        assert ended.status_code == 204

    session = Session.objects.get()
    assert (session.tags, session.project_id) == (["a", "b"], "p")
    assert (session.finish_reason, session.finish_detail) == ("success", "")
    assert sdk.post("session_heartbeat", session_id=session_id).status_code == 410


def test_a_finished_session_does_what_it_was_asked_and_takes_no_more(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    session_id = sdk.session()
    model_id = sdk.model(session_id)
    before = sdk.forward_backward(model_id, 1)
    sdk.post(f"sessions/{session_id}/finish", reason={"type": "success"})
    after = sdk.forward_backward(model_id, 2)
    work()

    assert sdk.result(before).metrics["loss:sum"] != 0
    assert (after.status_code, after.json()["error_code"]) == (400, "SessionFinished")
    another = sdk.post("create_model", session_id=session_id, model_seq_id=1, base_model="x")
    assert (another.status_code, another.json()["error_code"]) == (400, "SessionFinished")
    assert sdk.post("get_info", model_id=model_id).status_code == 200


def test_a_finished_sessions_models_are_shown_as_finished(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    session_id = sdk.session()
    model_id = sdk.model(session_id)
    work()
    key = {"X-API-Key": sdk.headers["X-API-Key"]}

    def shown() -> set[str]:
        listed = sdk.api.get("/api/v1/adapters", **key).json()["adapters"]
        info = sdk.api.post("/get_info", model_id=model_id, headers=key).json()
        return {info["state"], *(adapter["state"] for adapter in listed)}

    assert shown() == {"ready"}
    sdk.post(f"sessions/{session_id}/finish", reason={"type": "success"})
    assert shown() == {"finished"}


def test_a_finished_sessions_models_leave_memory_and_disk_but_not_the_lists(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    session_id = sdk.session()
    model_id = sdk.model(session_id)
    sdk.forward_backward(model_id, 1)
    work()
    run = Run.objects.get()
    work.loop.adapter_cache.snapshot_all()
    files = [settings.DATA_DIR / item.directory for item in run.snapshots.all()]
    assert [path.exists() for path in files] == [True]
    assert model_id in work.engine.trainer.adapter_names()

    sdk.post(f"sessions/{session_id}/finish", reason={"type": "success"})
    work()

    assert model_id not in work.engine.trainer.adapter_names()
    assert [path.exists() for path in files] == [False]
    assert not run.snapshots.exists()
    assert Run.objects.live().get() == run
    assert futures_prunable(Future.objects.all()).count() == Future.objects.count()


def test_a_session_that_is_silent_for_a_week_is_over(sdk: SdkClient) -> None:
    silent, heard_of = sdk.session(), sdk.session()
    Session.objects.filter(pk=silent).update(heartbeat_at=timezone.now() - timedelta(days=8))

    assert sessions_expire() == 1
    assert sessions_expire() == 0

    assert Session.objects.get(pk=silent).finish_reason == "interrupted"
    assert sdk.post("session_heartbeat", session_id=silent).status_code == 410
    assert sdk.post("session_heartbeat", session_id=heard_of).status_code == 200


@pytest.mark.parametrize("path", ["session_heartbeat", "create_model"])
def test_anothers_session_is_404(sdk: SdkClient, path: str, django_user_model: type) -> None:
    session_id = sdk.session()
    Session.objects.update(owner=django_user_model.objects.create_user("somebody else"))
    body: dict[str, Any] = {"session_id": session_id}
    if path == "create_model":
        body |= {"model_seq_id": 0, "base_model": "x"}

    answer = sdk.post(path, **body)
    finish = sdk.post(f"sessions/{session_id}/finish", reason={"type": "success"})

    assert answer.status_code == finish.status_code == 404
    assert Session.objects.get().finished_at is None


def test_a_model_is_made_once_by_the_number_that_its_client_computes_its_id_from(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    session_id = sdk.session()
    config = {
        "rank": 4,
        "seed": 7,
        "train_mlp": False,
        "train_attn": True,
        "train_unembed": False,
    }
    ids = {sdk.model(session_id, 3, lora_config=config) for _ in range(2)}
    work()
    changed = {
        "session_id": session_id,
        "model_seq_id": 3,
        "base_model": Run.objects.get().base_model,
        "lora_config": {**config, "rank": 8},
    }

    assert ids == {f"{session_id}:train:3"}
    assert sdk.post("create_model", **changed).status_code == 422
    run = Run.objects.get()
    assert (run.name, run.state, run.seed, run.rank, run.alpha) == (run.id, "ready", 7, 4, 32.0)
    assert (run.train_mlp, run.train_attn, run.train_unembed) == (False, True, False)
    assert Future.objects.get().seq_id == 0


def test_without_a_seed_each_model_has_its_own_and_a_repeat_the_same(sdk: SdkClient) -> None:
    session_id = sdk.session()
    for number in (0, 1, 1):
        sdk.model(session_id, number)

    assert len(set(Run.objects.values_list("seed", flat=True))) == 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "optimizer_config.type: "),
        ({"lora_config": {"rank": 0}}, "lora_config.rank: "),
        ({"lora_config": {"rank": 10**6}}, "lora_config.rank: "),
        (
            {"lora_config": {"train_mlp": False, "train_attn": False, "train_unembed": False}},
            "lora_config.train_mlp, train_attn, train_unembed: ",
        ),
        ({"lora_config": {"alpha": 16}}, "lora_config.alpha: unknown field"),
        ({"quantization": "int4"}, "quantization: unknown field"),
    ],
)
def test_what_a_model_cannot_have_is_refused_by_name(
    sdk: SdkClient, more: dict[str, Any], sentence: str
) -> None:
    answer = sdk.post(
        "create_model", session_id=sdk.session(), model_seq_id=0, base_model="x", **more
    )

    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(sentence)
    assert not Run.objects.exists()


def test_an_unknown_base_model_is_404(sdk: SdkClient) -> None:
    answer = sdk.post("create_model", session_id=sdk.session(), model_seq_id=0, base_model="gpt-17")

    assert (answer.status_code, answer.json()["error_code"]) == (404, "BaseModelNotFound")


def test_models_whose_client_is_gone_do_not_count_against_the_limit(
    sdk: SdkClient, settings: LazySettings
) -> None:
    settings.MAX_ADAPTERS = 1
    session_id = sdk.session()
    sdk.model(session_id)
    full = {"session_id": session_id, "model_seq_id": 1, "base_model": Run.objects.get().base_model}
    assert sdk.post("create_model", **full).json()["error_code"] == "LimitExceeded"

    sdk.post(f"sessions/{session_id}/finish", reason={"type": "success"})
    assert sdk.model()
    Session.objects.update(heartbeat_at=timezone.now() - timedelta(minutes=6))
    assert sdk.model()


def test_get_info_says_what_the_client_samples_from_and_tokenizes_with(sdk: SdkClient) -> None:
    model_id = sdk.model()
    answer = sdk.post("get_info", model_id=model_id, type="get_info")

    info = types.GetInfoResponse(**answer.json())
    assert info.model_id == model_id
    assert info.model_data.model_name == Run.objects.get().base_model
    assert (info.is_lora, info.lora_rank) == (True, 4)
    assert info.optimizer_config.type == "adamw"


def test_an_unloaded_model_is_gone(sdk: SdkClient, work: InProcessWorker) -> None:
    model_id = sdk.model()
    sdk.forward_backward(model_id, 1)
    unloaded = sdk.post("unload_model", model_id=model_id, type="unload_model")
    work()

    assert sdk.result(unloaded)["model_id"] == model_id
    assert sdk.post("get_info", model_id=model_id).status_code == 404
    assert sdk.optim_step(model_id, 2).status_code == 404


def test_the_flags_are_the_sdks_own_and_none_is_null(sdk: SdkClient) -> None:
    flags = sdk.post("client/config", sdk_version="0.38.0").json()
    dynamic = sdk.post("client/dynamic_config", sdk_version="0.38.0").json()

    known = types.client_config_response.ClientConfigResponse
    known_dynamic = types.client_dynamic_config_response.ClientDynamicConfigResponse
    assert set(flags) <= set(known.model_fields)
    assert set(dynamic) <= set(known_dynamic.model_fields)
    assert None not in [*flags.values(), *dynamic.values()]
    assert known(**flags).parallel_fwdbwd_chunks
    assert known(**flags).proto_compress_fwdbwd


def test_the_chunk_limits_never_pass_the_servers(sdk: SdkClient, settings: LazySettings) -> None:
    settings.MAX_DATUMS = 7
    settings.MAX_BODY_BYTES = 1000

    flags = sdk.post("client/config", sdk_version="0.38.0").json()

    assert flags["fwdbwd_max_chunk_len"] == 7
    assert flags["fwdbwd_max_chunk_bytes_count"] == 500


def test_telemetry_is_taken_and_forgotten(sdk: SdkClient) -> None:
    answer = sdk.post("telemetry", events=[{"event_data": {"X-API-Key": "tml-secret"}}])

    assert answer.json() == {"status": "accepted"}


def test_health_and_capabilities_are_at_the_sdks_addresses(sdk: SdkClient) -> None:
    capabilities = sdk.api.get("/api/v1/get_server_capabilities", **sdk.headers).json()

    assert sdk.api.get("/api/v1/healthz").json() == {"status": "ok"}
    assert types.GetServerCapabilitiesResponse(**capabilities).supported_models[0].trainable


def test_a_failed_model_of_the_sdk_stays_listed_and_holds_no_place(
    sdk: SdkClient, work: InProcessWorker, monkeypatch: pytest.MonkeyPatch, settings: LazySettings
) -> None:
    settings.MAX_ADAPTERS = 1

    def fail(*args: object) -> None:
        raise OutOfMemory("no room")

    session_id = sdk.session()
    with monkeypatch.context() as patched:
        patched.setattr(work.engine.trainer, "create_adapter", fail)
        model_id = sdk.model(session_id)
        work()
    assert sdk.model(session_id) == model_id  # the same request again
    listed = sdk.api.get("/api/v1/training_runs", **sdk.headers).json()["training_runs"]
    assert [(run["training_run_id"], run["corrupted"]) for run in listed] == [(model_id, True)]
    late = sdk.forward_backward(model_id, 1)
    assert late.status_code == 404
    assert "could not be created: no room" in late.json()["detail"]
    sdk.model(session_id, 1)
