"""Adapters of peft as uploads: checkpoints of their owner, or refused by name."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth import get_user_model
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import CommandError, call_command

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.peft_folder import make_peft_folder
from tests.sdk.conftest import SdkClient
from tinkerapi.management.commands import importpeft
from training.models import AuditEvent, Checkpoint, Run
from training.services import checkpoints_expire

ROUTE = "/api/v1/import_adapter"
PATH = "tinker://elsewhere/weights/imported"


def form_of(folder: Path) -> dict[str, Any]:
    names = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
    return {
        field: SimpleUploadedFile(name, (folder / name).read_bytes())
        for field, name in names.items()
        if (folder / name).exists()
    }


def archive_of(folder: Path) -> dict[str, Any]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(folder, "adapter")
    return {"archive": SimpleUploadedFile("adapter.tar.gz", file.getvalue())}


def upload(sdk: SdkClient, form: dict[str, Any], *, waits: bool = False, **more: Any) -> Any:
    """Send the form, with the key of the client's user."""
    headers = {"X-API-Key": sdk.headers["X-API-Key"], **more.pop("headers", {})}
    route = ROUTE if waits else f"{ROUTE}_async"
    return sdk.api.client.post(route, form | more, headers=headers)


def result(sdk: SdkClient, answer: Any) -> Any:
    assert answer.status_code == 200, answer.content
    key = {"X-API-Key": sdk.headers["X-API-Key"]}
    request_id = answer.json()["request_id"]
    return sdk.api.post("/retrieve_future", headers=key, request_id=request_id)


@pytest.fixture
def sdk(api: ApiClient) -> SdkClient:
    """A user's key; its own headers are the SDK's."""
    return SdkClient.with_new_key(api)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_peft_folder(tmp_path / "adapter")


def kept_folders() -> set[str]:
    parent = django_settings.DATA_DIR / "checkpoints"
    return {path.name for path in parent.iterdir()} if parent.is_dir() else set()


@pytest.mark.parametrize("form", [form_of, archive_of])
def test_an_adapter_becomes_a_checkpoint_that_can_be_loaded_and_sampled_from(
    served_api, folder, form
):
    sdk = SdkClient.with_new_key(served_api)
    key = {"X-API-Key": sdk.headers["X-API-Key"]}

    def post(path: str, /, **body: Any) -> Any:
        answer = served_api.post(path, headers=key, **body)
        assert answer.status_code == 200, answer.content
        return answer.json()

    answer = upload(sdk, form(folder), waits=True, model_id="elsewhere", wait="60")
    assert answer.status_code == 200, answer.content
    assert answer.json()["path"] == PATH
    assert answer.json()["model_id"] == "elsewhere"
    post("/api/v1/add_lora", model_id="mine", rank=2, alpha=8.0, target_modules=["q_proj"])
    post("/api/v1/load_weights", model_id="mine", path=PATH)
    post("/api/v1/sample", model_path=PATH, prompt=[1, 2])
    adapters = served_api.get("/api/v1/adapters", **key).json()["adapters"]
    assert [row["model_id"] for row in adapters] == ["mine"]


@pytest.mark.parametrize("content_type", ["application/gzip", "application/zip"])
def test_a_program_on_this_machine_sends_an_archive_without_a_key(served_api, folder, content_type):
    (archive,) = archive_of(folder).values()
    query = "model_id=elsewhere&name=first&overwrite=true"
    answer = served_api.client.post(f"{ROUTE}?{query}", archive.read(), content_type=content_type)
    assert answer.status_code == 200, answer.content
    assert answer.json()["path"] == "tinker://elsewhere/weights/first"


def test_a_web_page_cannot_send_a_form_without_a_key(api, folder):
    answer = api.client.post(ROUTE, form_of(folder))
    assert answer.status_code == 415
    assert "need an X-API-Key header" in answer.json()["detail"]


def test_the_sdk_makes_a_model_of_an_import_with_its_shape(
    sdk: SdkClient, work: InProcessWorker, folder: Path
) -> None:
    answer = upload(sdk, form_of(folder), model_id="elsewhere")
    work()
    assert sdk.result(answer)["path"] == PATH
    info = sdk.post("weights_info", tinker_path=PATH).json()
    assert info["lora_rank"] == 2
    for number, optimizer in enumerate((True, False)):
        made = sdk.post(
            "load_weights",
            session_id=sdk.session(),
            model_seq_id=number,
            path=PATH,
            optimizer=optimizer,
        )
        work()
        model_id = sdk.result(made)["model_id"]
        step = sdk.forward_backward(model_id, 1)
        work()
        assert sdk.result(step).metrics["loss:sum"] != 0
        run = Run.objects.get(pk=model_id)
        assert (run.rank, run.alpha, run.target_modules) == (2, 8.0, ["q_proj"])
    listed = sdk.api.get("/api/v1/checkpoints", **sdk.headers).json()["checkpoints"]
    assert [row["tinker_path"] for row in listed] == [PATH]


def test_the_files_go_when_the_import_is_finished_and_not_before(sdk, work, folder):
    upload(sdk, form_of(folder))
    (directory,) = Checkpoint.objects.values_list("directory", flat=True)
    checkpoints_expire()
    assert (django_settings.DATA_DIR / directory).exists()
    work()
    checkpoints_expire()
    assert not (django_settings.DATA_DIR / directory).exists()
    (kept,) = Checkpoint.objects.all()
    assert (kept.kind, kept.ephemeral, kept.step) == ("training", False, 0)


def test_a_worker_that_died_before_the_save_imports_again(sdk, start_worker, folder):
    answer = upload(sdk, form_of(folder))
    work = start_worker()
    work()
    first = work.engine.trainer
    # As if the worker had died between the creation's commit and the save's.
    Checkpoint.objects.filter(kind="training").delete()
    saving = Future.objects.get(pk=answer.json()["request_id"])
    Future.objects.filter(lane_id=saving.lane_id, seq_id__gte=saving.seq_id).update(
        state="pending", result=None, worker=None, batch=None, started_at=None, finished_at=None
    )
    saving.lane.next_seq_id = saving.seq_id
    saving.lane.save(update_fields=["next_seq_id"])
    work = start_worker()
    work()
    assert work.engine.trainer is not first
    assert result(sdk, answer).json()["path"].endswith("/weights/imported")


def test_an_import_that_fails_in_the_worker_says_why_and_leaves_nothing(sdk, work, folder):
    before = kept_folders()
    answer = upload(sdk, form_of(folder))
    for path in (django_settings.DATA_DIR / Checkpoint.objects.get().directory).iterdir():
        path.unlink()
    work()
    failed = result(sdk, answer)
    assert failed.status_code == 500
    assert "adapter_config.json: is missing" in failed.json()["detail"]
    checkpoints_expire()
    assert not Checkpoint.objects.exists()
    assert kept_folders() == before


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "adapter_config.json: use_dora"),
        ({"peft_type": "LOHA"}, "adapter_config.json: peft_type"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.json: modules_to_save"),
        ({"r": "x"}, "adapter_config.json: r:"),
    ],
)
def test_an_unsuitable_adapter_is_refused_before_a_worker_sees_it(sdk, tmp_path, fields, named):
    before = kept_folders()
    answer = upload(sdk, form_of(make_peft_folder(tmp_path / "other", **fields)))
    assert answer.status_code == 400
    assert named in answer.json()["detail"]
    assert kept_folders() == before
    assert not Future.objects.exists()
    assert not Run.objects.exists()


def test_a_pickle_is_refused_and_not_read(sdk, folder):
    form = form_of(folder)
    form["adapter_model"] = SimpleUploadedFile("adapter_model.bin", b"PK\x03\x04" + bytes(100))
    answer = upload(sdk, form)
    assert answer.status_code == 400
    assert "is a pickle, which may hold code and is not read" in answer.json()["detail"]
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    answer = upload(sdk, archive_of(folder))
    assert answer.status_code == 400
    assert "adapter_model.bin is a pickle" in answer.json()["detail"]


def test_any_change_of_the_file_is_refused_or_imported(sdk, folder):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    cuts = [whole[:end] for end in (0, 4, 8, 40, 8 + length, len(whole) - 1)]
    flips = []
    for at in range(0, 8 + length, 7):
        changed = bytearray(whole)
        changed[at] ^= 0x11
        flips.append(bytes(changed))
    huge = (2**62).to_bytes(8, "little") + whole[8:]
    for content in [*cuts, *flips, huge, whole + b"x"]:
        form = form_of(folder) | {"adapter_model": SimpleUploadedFile("x", content)}
        answer = upload(sdk, form)
        assert answer.status_code in (200, 400), answer.content
        if answer.status_code == 400:
            assert answer.json()["detail"].startswith("adapter_model.safetensors: ")


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        (lambda form: form.pop("adapter_model"), 400, "send the first two files"),
        (lambda form: form.update(archive=SimpleUploadedFile("a", b"x")), 400, "send the first"),
        (lambda form: form.update(weights=SimpleUploadedFile("a", b"x")), 400, "weights: unknown"),
        (lambda form: form.update(adapter_model="text"), 400, "adapter_model: expected a file"),
        (lambda form: form.update(base_model="nobody/none"), 404, "base_model"),
        (lambda form: form.update(name="a/b"), 400, "name"),
        (lambda form: form.update(model_id="../x"), 400, "model_id"),
        (lambda form: form.update(overwrite="perhaps"), 400, "overwrite"),
        (lambda form: form.update(rank="4"), 400, "rank: unknown field"),
    ],
)
def test_a_wrong_form_is_refused_by_name(sdk, folder, change, status, named):
    form = form_of(folder)
    change(form)
    answer = upload(sdk, form)
    assert answer.status_code == status, answer.content
    assert named in answer.json()["detail"]
    assert not Run.objects.exists()


def test_another_content_type_is_refused(sdk):
    key = {"X-API-Key": sdk.headers["X-API-Key"]}
    answer = sdk.api.post(ROUTE, headers=key, base_model="x")
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.json()["detail"]
    for junk in ("multipart/form-data", "multipart/form-data; boundary=x", "application/zip"):
        answer = sdk.api.client.post(ROUTE, b"junk", content_type=junk, headers=key)
        assert answer.status_code == 400, answer.content


def test_limits_of_size_rank_and_storage_are_kept(sdk, folder, settings):
    settings.MAX_LORA_RANK = 1
    assert "this server takes up to 1" in upload(sdk, form_of(folder)).json()["detail"]
    settings.MAX_LORA_RANK = 512
    settings.USER_STORAGE_BYTES = 100
    assert upload(sdk, form_of(folder)).status_code == 413
    settings.USER_STORAGE_BYTES = 0
    settings.MAX_IMPORT_BYTES = 300
    answer = upload(sdk, archive_of(folder))
    assert answer.status_code in (400, 413)
    assert not Run.objects.exists()


def test_a_taken_path_is_replaced_only_when_that_is_asked_for(sdk, work, folder):
    answers = [
        upload(sdk, form_of(folder), model_id="elsewhere", overwrite=overwrite)
        for overwrite in ("false", "false", "true")
    ]
    work()
    statuses = [result(sdk, answer).status_code for answer in answers]
    assert statuses == [200, 500, 200]
    assert Checkpoint.objects.filter(kind="training").count() == 1


def test_a_repeated_upload_is_one_import(sdk, work, folder, tmp_path):
    key = {"Idempotency-Key": "once"}
    first = upload(sdk, form_of(folder), model_id="elsewhere", headers=key)
    assert upload(sdk, form_of(folder), model_id="elsewhere", headers=key).json() == first.json()
    work()
    assert upload(sdk, form_of(folder), model_id="elsewhere", headers=key).json() == first.json()
    assert Run.objects.count() == 1
    other = form_of(make_peft_folder(tmp_path / "other", seed=1))
    assert upload(sdk, other, model_id="elsewhere", headers=key).status_code == 409
    assert upload(sdk, form_of(folder), model_id="another", headers=key).status_code == 409


def test_an_import_is_audited_and_keeps_where_it_came_from(sdk, work, folder):
    upload(sdk, form_of(folder), model_id="elsewhere")
    work()
    event = AuditEvent.objects.get(event="checkpoint_import")
    assert event.details["tinker_path"] == PATH
    checkpoint = Checkpoint.objects.get(kind="training")
    assert checkpoint.user_metadata["imported_from"] == "somebody/a-model"
    assert len(checkpoint.user_metadata["sha256"]) == 64


@pytest.fixture
def command(work: InProcessWorker, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``importpeft``; the worker works whenever the command waits."""
    monkeypatch.setattr(importpeft.time, "sleep", lambda seconds: work())
    get_user_model().objects.create_user("zelda")

    def run(*arguments: str) -> str:
        output = io.StringIO()
        call_command("importpeft", *arguments, "--owner", "zelda", stdout=output)
        return output.getvalue()

    return run


def test_the_command_prints_the_path_of_the_owners_checkpoint(command, folder):
    printed = command(str(folder), "--model-id", "elsewhere", "--name", "first")
    assert printed == "tinker://elsewhere/weights/first\n"
    checkpoint = Checkpoint.objects.get(kind="training")
    assert checkpoint.owner.username == "zelda"
    assert AuditEvent.objects.get(event="checkpoint_import").actor is None


@pytest.mark.parametrize(
    ("fields", "arguments", "named"),
    [
        ({"use_dora": True}, (), "use_dora"),
        ({}, ("--base-model", "nobody/none"), "nobody/none"),
        ({}, ("--name", "a/b"), "name"),
    ],
)
def test_the_command_refuses_by_name(command, tmp_path, fields, arguments, named):
    with pytest.raises(CommandError, match=named):
        command(str(make_peft_folder(tmp_path / "other", **fields)), *arguments)


def test_the_command_names_a_missing_folder_or_owner(command, folder, tmp_path):
    with pytest.raises(CommandError, match="there is no folder"):
        command(str(tmp_path / "nowhere"))
    with pytest.raises(CommandError, match="--owner: there is no user 'link'"):
        call_command("importpeft", str(folder), "--owner", "link")


def test_the_description_names_the_form(api):
    schema = json.loads(api.get("/api/schema?format=json").content)
    content = schema["paths"][ROUTE]["post"]["requestBody"]["content"]["multipart/form-data"]
    properties = content["schema"]["properties"]
    assert properties["adapter_model"]["format"] == "binary"
    assert {"base_model", "model_id", "name", "overwrite"} <= set(properties)
