"""Checkpoints over HTTP: save, load, make a model from one, borrow and copy another's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.utils import timezone
from tinker import TrainingClient
from tinker.types import LoadWeightsResponse

from futures.models import Future, Lane
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tinkerapi.services import api_key_create
from training.base_models import base_model_get
from training.models import Checkpoint, Run, SamplingSession, Session
from training.services import checkpoints_expire


def other_client(api: ApiClient) -> tuple[SdkClient, str]:
    """Another user's client, and the key it uses."""
    _, key = api_key_create(user=get_user_model().objects.create_user("colleague"), name="k")
    return SdkClient(api, key), key


def trained(sdk: SdkClient, work: InProcessWorker) -> str:
    """A model after one step."""
    model_id = sdk.model()
    sdk.forward_backward(model_id, 1)
    sdk.optim_step(model_id, 2)
    work()
    return model_id


def save(sdk: SdkClient, work: InProcessWorker, model_id: str, seq_id: int, name: str) -> str:
    answer = sdk.post("save_weights", model_id=model_id, seq_id=seq_id, path=name)
    work()
    return str(sdk.result(answer)["path"])


def test_each_kind_of_checkpoint_has_its_path(sdk: SdkClient, work: InProcessWorker) -> None:
    model_id = trained(sdk, work)
    answers = [
        sdk.post("save_weights", model_id=model_id, seq_id=3, path="a", overwrite=False),
        sdk.post("save_weights_for_sampler", model_id=model_id, seq_id=4, path="a"),
        sdk.post("save_weights_external", model_id=model_id, seq_id=5, path="a"),
    ]
    work()

    paths = [sdk.result(answer)["path"] for answer in answers]
    assert paths == [
        f"tinker://{model_id}/{segment}/a"
        for segment in ("weights", "sampler_weights", "external_weights")
    ]
    assert sdk.result(answers[2])["size_bytes"] > 0


def test_a_name_is_used_again_only_with_overwrite(sdk: SdkClient, work: InProcessWorker) -> None:
    model_id = trained(sdk, work)
    fields = {"model_id": model_id, "path": "a"}
    sdk.post("save_weights", **fields, seq_id=3, user_metadata={"a": "old"}, ttl_seconds=4000)
    refused = sdk.post("save_weights", **fields, seq_id=4)
    replaced = sdk.post("save_weights", **fields, seq_id=5, overwrite=True)
    work()

    assert "overwrite" in sdk.result(refused)["error"]
    assert sdk.result(refused)["category"] == "user"
    assert sdk.result(replaced)["path"] == f"tinker://{model_id}/weights/a"
    row = Checkpoint.objects.get(run_id=model_id)
    assert (row.seq_id, row.user_metadata, row.expires_at) == (5, {}, None)


@pytest.mark.parametrize(
    ("call", "fields", "named"),
    [
        ("save_weights", {"path": "a/b"}, "path"),
        ("save_weights", {"path": ".."}, "path"),
        ("save_weights_for_sampler", {}, "sampling_session_seq_id"),
        ("save_weights_for_sampler", {"path": "a", "sampling_session_seq_id": 1}, "path"),
        ("save_weights_for_sampler", {"path": "a", "kind": "live"}, "kind"),
        ("save_weights_external", {"path": "a", "age_encryption_recipients": ["x"]}, "age"),
        ("load_weights", {"path": "tinker://x/weights/none", "optimizer": True}, "none"),
        ("load_weights", {"path": "tinker://x/external_weights/a", "optimizer": False}, "path"),
        (
            "load_weights",
            {"path": "tinker://x/weights/a", "weights_access_token": "tml-wrong"},
            "weights_access_token",
        ),
    ],
)
def test_an_invalid_request_uses_up_its_number_and_fails_by_name(
    sdk: SdkClient, work: InProcessWorker, call: str, fields: dict[str, object], named: str
) -> None:
    model_id = sdk.model()
    refused = sdk.post(call, model_id=model_id, seq_id=1, **fields)
    good = sdk.forward_backward(model_id, 2)
    work()

    assert named in sdk.result(refused)["error"]
    assert sdk.result(refused)["category"] == "user"
    assert sdk.result(good).metrics["loss:sum"] != 0


def test_a_loaded_model_is_what_was_saved_and_goes_on_in_order(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk, work)
    path = save(sdk, work, model_id, 3, "a")
    before = work.engine.trainer.adapter_state(model_id)
    sdk.forward_backward(model_id, 4)
    sdk.optim_step(model_id, 5)
    loaded = sdk.post("load_weights", model_id=model_id, seq_id=6, path=path, optimizer=True)
    work()

    assert sdk.result(loaded)["path"] == path
    after = work.engine.trainer.adapter_state(model_id)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert Run.objects.get(pk=model_id).step == 1


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_model_is_made_from_a_checkpoint_at_number_0_with_its_shape(
    sdk: SdkClient, work: InProcessWorker, optimizer: bool
) -> None:
    model_id = trained(sdk, work)
    path = save(sdk, work, model_id, 3, "a")
    session_id = sdk.session()
    fields = {
        "session_id": session_id,
        "model_seq_id": 7,
        "path": path,
        "optimizer": optimizer,
        "user_metadata": {"u": "v"},
        "optimizer_config": {"type": "adamw"},
        "type": "load_weights",
    }
    made = sdk.post("load_weights", **fields)
    again = sdk.post("load_weights", **fields)
    step = sdk.forward_backward(f"{session_id}:train:7", 1)
    work()

    copy_id = f"{session_id}:train:7"
    assert made.json() == again.json()
    assert made.json()["model_id"] == sdk.result(made)["model_id"] == copy_id
    assert LoadWeightsResponse.model_validate(sdk.result(made)).path == path
    assert sdk.result(step).metrics["loss:sum"] != 0
    assert sdk.post("get_info", model_id=copy_id).json()["lora_rank"] == 4
    original, copy = (work.engine.trainer.adapter_state(name) for name in (model_id, copy_id))
    assert np.array_equal(original["weights"], copy["weights"])
    assert np.array_equal(original["exp_avg"], copy["exp_avg"]) == optimizer
    assert (copy["step"] == original["step"]) == optimizer


def test_a_model_made_from_a_checkpoint_outlives_the_checkpoint_and_its_worker(
    sdk: SdkClient, start_worker, settings
) -> None:
    work = start_worker()
    path = save(sdk, work, trained(sdk, work), 3, "a")
    made = sdk.post(
        "load_weights", session_id=sdk.session(), model_seq_id=0, path=path, optimizer=True
    )
    work()
    copy_id = made.json()["model_id"]
    state = work.engine.trainer.adapter_state(copy_id)
    Checkpoint.objects.all().delete()

    work = start_worker()
    sdk.post("save_weights_for_sampler", model_id=copy_id, seq_id=1, path="b")
    work()

    rebuilt = work.engine.trainer.adapter_state(copy_id)
    assert all(np.array_equal(state[name], rebuilt[name]) for name in state)


def test_a_creation_that_cannot_load_fails_by_name_and_makes_no_model_of_it(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk, work)
    path = save(sdk, work, model_id, 3, "a")
    session_id = sdk.session()
    made = sdk.post("load_weights", session_id=session_id, model_seq_id=0, path=path)
    Checkpoint.objects.all().delete()
    step = sdk.forward_backward(f"{session_id}:train:0", 1)
    work()

    assert "was deleted" in sdk.result(made)["error"]
    assert "could not be created" in sdk.result(step)["error"]
    missing = sdk.post("load_weights", session_id=session_id, model_seq_id=1, path=path)
    assert missing.status_code == 404
    assert not Run.objects.filter(model_seq_id=1).exists()


def test_a_sampling_session_is_made_of_the_weights_of_its_moment(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk, work)
    session_id = model_id.partition(":")[0]
    fields = {"model_id": model_id, "sampling_session_seq_id": 5}
    made = sdk.post("save_weights_for_sampler", **fields, kind="snapshot", seq_id=3)
    taken = sdk.post("save_weights_for_sampler", **fields, kind="inflight", seq_id=4)
    work()

    sampler_id = f"{session_id}:sample:5"
    assert sdk.result(made)["sampling_session_id"] == sampler_id
    assert "has a sampling session 5 already" in sdk.result(taken)["error"]
    sampler = SamplingSession.objects.get(pk=sampler_id)
    assert sampler.checkpoint is not None
    assert (sampler.checkpoint.seq_id, sampler.checkpoint.ephemeral) == (3, True)
    assert not Lane.objects.get(pk=sampler_id).ordered


def test_a_sampling_session_made_before_a_crash_is_found_after_it(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk, work)
    made = sdk.post(
        "save_weights_for_sampler", model_id=model_id, sampling_session_seq_id=0, seq_id=3
    )
    work()
    first = sdk.result(made)
    # As if the worker had died after the session's rows and before the future's result.
    Future.objects.filter(lane_id=model_id, seq_id=3).update(
        state="pending", result=None, worker=None, batch=None, started_at=None, finished_at=None
    )
    Lane.objects.filter(pk=model_id).update(next_seq_id=3)
    work()

    assert sdk.result(made) == first
    assert Checkpoint.objects.filter(run_id=model_id).count() == 1


def test_weights_of_a_sampling_session_go_some_time_after_their_session(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk, work)
    sdk.post("save_weights_for_sampler", model_id=model_id, sampling_session_seq_id=0, seq_id=3)
    save(sdk, work, model_id, 4, "kept")
    ephemeral = Checkpoint.objects.get(ephemeral=True)
    assert checkpoints_expire() == 0

    Session.objects.update(heartbeat_at=timezone.now() - timedelta(hours=2))
    assert checkpoints_expire() == 1
    assert not (settings.DATA_DIR / ephemeral.directory).exists()
    assert [row.name for row in Checkpoint.objects.all()] == ["kept"]


def test_weights_that_a_loop_left_behind_go_before_their_session(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk, work)
    for number in range(4):
        sdk.post(
            "save_weights_for_sampler",
            model_id=model_id,
            sampling_session_seq_id=number,
            seq_id=3 + number,
        )
    work()
    session_id = model_id.partition(":")[0]

    def sample(number: int) -> None:
        answer = sdk.post(
            "asample",
            sampling_session_id=f"{session_id}:sample:{number}",
            seq_id=0,
            prompt={"chunks": [{"type": "encoded_text", "tokens": [1]}]},
            sampling_params={"max_tokens": 1},
        )
        assert answer.status_code == 200, answer.content

    sample(0)
    work()
    sample(1)  # waits
    long_ago = timezone.now() - timedelta(hours=2)
    Future.objects.update(created_at=long_ago)
    sample(2)
    for place, row in enumerate(Checkpoint.objects.order_by("seq_id")):
        row.created_at = long_ago + timedelta(seconds=place)
        row.save(update_fields=["created_at"])

    # Sampled from long ago; with a sample that waits; sampled from just now; and the newest.
    assert checkpoints_expire() == 1
    left = SamplingSession.objects.filter(checkpoint__isnull=False).order_by("seq_id")
    assert [sampler.seq_id for sampler in left] == [1, 2, 3]


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("save_weights", TrainingClient.save_state),
        ("save_weights_for_sampler", TrainingClient.save_weights_for_sampler),
        ("save_weights_external", TrainingClient.save_weights_external),
    ],
)
def test_a_taken_name_is_answered_with_what_the_official_client_can_do(
    sdk: SdkClient, work: InProcessWorker, path: str, method: Callable[..., object]
) -> None:
    model_id = sdk.model()
    answers = [sdk.post(path, model_id=model_id, seq_id=n, path="a") for n in (1, 2)]
    work()

    error = sdk.result(answers[1])["error"]
    assert "exists already" in error
    assert ("overwrite" in error) == ("overwrite" in inspect.signature(method).parameters)


def test_weights_info_tells_base_model_and_shape(sdk: SdkClient, work: InProcessWorker) -> None:
    path = save(sdk, work, trained(sdk, work), 3, "a")

    info = sdk.post("weights_info", tinker_path=path).json()
    assert (info["base_model"], info["lora_rank"]) == (base_model_get(None).name, 4)
    assert info["train_mlp"] is info["train_attn"] is info["train_unembed"] is True


def test_anothers_checkpoint_is_read_with_their_key_or_when_public_and_not_else(
    api: ApiClient, sdk: SdkClient, work: InProcessWorker
) -> None:
    path = save(sdk, work, trained(sdk, work), 3, "a")
    key = sdk.headers["X-API-Key"]
    other, _ = other_client(api)
    fields = {"session_id": other.session(), "path": path, "optimizer": True}

    assert other.post("weights_info", tinker_path=path).status_code == 404
    assert other.post("load_weights", **fields, model_seq_id=0).status_code == 404
    borrowed = other.post("load_weights", **fields, model_seq_id=1, weights_access_token=key)
    Checkpoint.objects.update(public=True)
    public = other.post("load_weights", **fields, model_seq_id=2)
    assert other.post("weights_info", tinker_path=path).status_code == 200
    work()

    for answer, number in ((borrowed, 1), (public, 2)):
        assert other.result(answer)["model_id"] == f"{fields['session_id']}:train:{number}"
    assert key.encode() not in b"".join(
        bytes(future.payload or b"") for future in Future.objects.all()
    )


def test_a_copy_is_ones_own_and_lives_without_its_source(
    api: ApiClient, sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk, work)
    path = save(sdk, work, model_id, 3, "a")
    other, _ = other_client(api)
    headers = {
        **other.headers,
        "X-Idempotency-Key": "k1",
        "X-Tinker-Weights-Access-Token": sdk.headers["X-API-Key"],
    }

    def copy(**body: object) -> object:
        return api.post("/api/v1/copy_weights", headers=headers, source_path=path, **body)

    answers = [copy(destination_project_id="p", ttl_seconds=4000) for _ in range(2)]
    assert len({answer.content for answer in answers}) == 1
    copied = answers[0].json()["tinker_path"]
    assert copied != path
    Checkpoint.objects.get(run_id=model_id).delete()
    made = other.post(
        "load_weights", session_id=other.session(), model_seq_id=0, path=copied, optimizer=True
    )
    work()
    copy_id = other.result(made)["model_id"]
    original, loaded = (work.engine.trainer.adapter_state(name) for name in (model_id, copy_id))
    assert all(np.array_equal(original[name], loaded[name]) for name in original)
    assert sdk.post("weights_info", tinker_path=copied).status_code == 404
