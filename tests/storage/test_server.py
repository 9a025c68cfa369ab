"""A bucket behind downloads, copies, imports, sweeping, backups and the checks of a machine."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.test import AsyncClient
from pytest_django import Settings

from futures.models import Worker
from tests.conftest import ApiClient, InProcessWorker
from tests.peft_folder import make_peft_folder
from tests.sdk.conftest import SdkClient
from tests.storage.faulty_proxy import FaultyProxy
from tests.storage.test_folders import empty_the_cache, folder_of, read_all
from tinkerapi.server import doctor
from tinkerapi.server.backup import BackupError, _download_new
from tinkerapi.server.doctor import Verdict
from tinkerapi.server.joining import (
    moved_storage_problem,
    storage_claim_problem,
    storage_problem,
)
from training.errors import StorageFailed
from training.models import Checkpoint, Installation
from training.services import upkeep
from training.services.installation import installation_id
from training.storage.chosen import storage
from training.storage.interface import AREAS, CHECKPOINTS, new_name
from training.storage.remote import RemoteFolders
from training.storage_quota import storage_use
from training.worker.agreement import FIGURE, storage_facts
from training.worker.crash_log import crashed


@pytest.fixture
def sdk(place: RemoteFolders, api: ApiClient) -> SdkClient:
    return SdkClient.with_new_key(api)


@pytest.fixture
def model_id(sdk: SdkClient, work: InProcessWorker) -> str:
    """A model with ``weights/a`` and ``external_weights/a``."""
    model_id = sdk.model()
    sdk.post("save_weights", model_id=model_id, seq_id=1, path="a")
    sdk.post("save_weights_external", model_id=model_id, seq_id=2, path="a")
    work()
    return model_id


def fetch(url: str, **headers: str) -> tuple[Any, bytes]:
    async def send() -> tuple[Any, bytes]:
        response = await AsyncClient().get(urlsplit(url).path, headers=headers)
        if not response.streaming:
            return response, response.content
        return response, b"".join([piece async for piece in response])

    return async_to_sync(send)()


def archive_of(sdk: SdkClient, model_id: str, path: str) -> str:
    route = f"/api/v1/training_runs/{model_id}/checkpoints/{path}/archive"
    return str(sdk.api.get(route, **sdk.headers).json()["url"])


def test_files_and_archives_are_streamed_from_the_bucket(
    sdk: SdkClient, model_id: str, place: RemoteFolders, settings: Settings
) -> None:
    empty_the_cache(settings)
    expected = read_all(place, Checkpoint.objects.get(kind="external").directory)
    path = f"training_runs/{model_id}/checkpoints/external_weights/a/external_weights_urls"
    urls = sdk.api.get(f"/api/v1/{path}", **sdk.headers).json()["urls"]
    assert {name: fetch(url)[1] for name, url in urls.items()} == expected
    response, part = fetch(urls["adapter_model.safetensors"], Range="bytes=3-7")
    assert (response.status_code, part) == (206, expected["adapter_model.safetensors"][3:8])

    response, content = fetch(archive_of(sdk, model_id, "external_weights/a"))
    assert response["Content-Length"] == str(len(content))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == expected  # type: ignore[union-attr]


def test_a_download_that_breaks_is_an_error_and_no_shorter_file(
    sdk: SdkClient, model_id: str, line: FaultyProxy, hasty: None
) -> None:
    url = archive_of(sdk, model_id, "weights/a")
    line.cut("down", after_bytes=4000)
    with pytest.raises(StorageFailed):
        fetch(url)
    line.recover()
    assert fetch(url)[0].status_code == 200
    line.refuse()
    assert fetch(url)[0].status_code == 500


def test_a_deleted_checkpoint_is_not_found(
    sdk: SdkClient, model_id: str, place: RemoteFolders
) -> None:
    url = archive_of(sdk, model_id, "weights/a")
    place.purge(Checkpoint.objects.get(kind="training").directory)
    assert fetch(url)[0].status_code == 404


def test_a_copy_and_an_import_are_in_the_bucket(
    sdk: SdkClient,
    model_id: str,
    work: InProcessWorker,
    place: RemoteFolders,
    tmp_path: Path,
    settings: Settings,
) -> None:
    original = Checkpoint.objects.get(kind="training")
    copied = sdk.post("copy_weights", source_path=f"tinker://{model_id}/weights/a")
    assert copied.status_code == 200, copied.content
    copy = Checkpoint.objects.exclude(pk=original.pk).get(kind="training")
    assert read_all(place, copy.directory) == read_all(place, original.directory)

    folder = make_peft_folder(tmp_path / "adapter")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(folder, "adapter")
    answer = sdk.api.client.post(
        "/api/v1/import_adapter_async?model_id=elsewhere",
        packed.getvalue(),
        content_type="application/gzip",
        headers={"X-API-Key": sdk.headers["X-API-Key"]},
    )
    assert answer.status_code == 200, answer.content
    empty_the_cache(settings)
    work()
    imported = Checkpoint.objects.get(path_run="elsewhere", name="imported")
    assert "weights.npy" in place.files(imported.directory)
    assert storage_use(original.owner_id).checkpoints > 3 * 256
    assert not (Path(settings.DATA_DIR) / CHECKPOINTS).exists()


def test_what_a_crash_left_is_found_and_deleted_by_age(
    sdk: SdkClient, model_id: str, place: RemoteFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(*arguments: str) -> str:
        output = StringIO()
        call_command("sweepfiles", *arguments, stdout=output)
        return output.getvalue()

    half = new_name(CHECKPOINTS)
    place._bucket.write(f"{half}/weights.npy", b"1234")
    whole = new_name(CHECKPOINTS)
    place.write(whole, folder_of({"a": b"b"}))
    assert "0 folders found" in sweep()
    monkeypatch.setattr(upkeep, "UNNAMED", timedelta(0))
    assert f"4 bytes  {place.location}/{half}" in sweep()
    assert "2 folders deleted" in sweep("--delete")
    named = set(Checkpoint.objects.values_list("directory", flat=True))
    assert {folder.directory for folder in place.folders(CHECKPOINTS)} == named


def test_a_backup_has_the_files_that_the_database_names(
    sdk: SdkClient,
    model_id: str,
    place: RemoteFolders,
    line: FaultyProxy,
    hasty: None,
    tmp_path: Path,
    settings: Settings,
) -> None:
    for area in AREAS:
        (tmp_path / "stage" / area).mkdir(parents=True)
    gone, *others = Checkpoint.objects.all()
    place.purge(gone.directory)
    empty_the_cache(settings)
    _download_new(tmp_path / "stage")
    [there] = (tmp_path / "stage" / CHECKPOINTS).iterdir()
    assert f"{CHECKPOINTS}/{there.name}" == others[0].directory
    found = {path.name: path.read_bytes() for path in there.iterdir()}
    assert found == read_all(place, others[0].directory)

    line.refuse()
    empty_the_cache(settings)
    there.rename(there.with_name("other"))
    with pytest.raises(BackupError, match="does not answer"):
        _download_new(tmp_path / "stage")


@pytest.mark.django_db
def test_the_doctor_and_joining_machines_compare_the_bucket(
    place: RemoteFolders,
    line: FaultyProxy,
    hasty: None,
    settings: Settings,
    server: Any,
    another_machine: Callable[[], None],
) -> None:
    from training.base_models import base_model_get

    assert doctor.check_storage().verdict is Verdict.OFF
    assert "no server has used" in (storage_problem() or "")
    facts = storage_facts()
    assert facts == {
        "storage": settings.STORAGE,
        "storage's installation": place.installation_id(),
    }
    queue = base_model_get(None).queue
    worker = Worker.objects.create(
        queue=queue, state="live", hostname="h", pid=1, figures={FIGURE: facts}
    )
    another_machine()
    assert storage_problem() is None
    assert doctor.check_storage().detail == f"{settings.STORAGE}, that of the workers"

    Worker.objects.filter(pk=worker.pk).update(
        figures={FIGURE: {**facts, "storage's installation": "another"}}
    )
    assert "is another installation's" in doctor.check_storage().detail
    Worker.objects.filter(pk=worker.pk).update(figures={FIGURE: facts})
    line.refuse()
    another_machine()
    assert "does not answer" in doctor.check_storage().detail
    assert storage_facts() == {"storage": settings.STORAGE}
    line.recover()
    settings.STORAGE += "/more"
    assert storage_problem() == (
        f"storage: {settings.STORAGE} here, {facts['storage']} at the workers in this database; "
        "set TINKERAPI_STORAGE as the server does"
    )


def test_a_server_does_not_start_with_a_storage_that_lacks_its_files(
    sdk: SdkClient, model_id: str, work: InProcessWorker, place: RemoteFolders, settings: Settings
) -> None:
    work.worker.figures[FIGURE] = storage_facts()
    Worker.objects.filter(pk=work.worker.pk).update(figures={FIGURE: storage_facts()})
    assert moved_storage_problem() is None
    before, settings.STORAGE = settings.STORAGE, ""
    newest = Checkpoint.objects.order_by("-pk")[0].directory
    problem = moved_storage_problem() or ""
    assert f"are in {before}, and the data folder has none of them (such as {newest})" in problem
    with place.local(newest) as folder:
        storage().write(newest, lambda target: folder_of(read_folder(folder))(target))
    assert moved_storage_problem() is None

    settings.STORAGE = before
    another = Worker.objects.create(
        queue=work.worker.queue,
        state="lost",
        hostname="h",
        pid=1,
        figures={FIGURE: {**storage_facts(), "storage's installation": "another"}},
    )
    assert moved_storage_problem() is None, "a restore into a bucket of the same name"
    for checkpoint in Checkpoint.objects.all():
        place.purge(checkpoint.directory)
    assert "has none of them" in (moved_storage_problem() or "")

    Worker.objects.filter(pk__gte=min(another.pk, work.worker.pk)).update(figures={})
    Checkpoint.objects.all().delete()
    assert moved_storage_problem() is None
    place.write(new_name(CHECKPOINTS), folder_of({"a": b"b"}))
    assert "give each server a prefix of its own" in (moved_storage_problem() or "")


@pytest.mark.django_db
def test_the_second_server_that_names_an_empty_prefix_is_refused(
    place: RemoteFolders, settings: Settings
) -> None:
    from training.base_models import base_model_get

    assert storage_claim_problem() is None
    assert storage_claim_problem() is None
    first = place.installation_id()
    assert first == installation_id()
    Installation.objects.all().delete()  # another database
    assert moved_storage_problem() is None
    problem = storage_claim_problem()
    assert problem == (
        f"TINKERAPI_STORAGE: {settings.STORAGE} is another server's: its object 'installation' has "
        f"the id {first}, and this database {installation_id()}; give each server a prefix of its "
        "own, or delete that object if its server is no more"
    )
    place._bucket.remove("installation")
    assert storage_claim_problem() is None
    assert place.installation_id() == installation_id() != first

    # A server of an earlier version, whose database has no id yet.
    Installation.objects.all().delete()
    Worker.objects.create(
        queue=base_model_get(None).queue,
        state="stopped",
        hostname="h",
        pid=1,
        figures={FIGURE: {"storage": settings.STORAGE, "storage's installation": "other"}},
    )
    assert "is another server's" in (storage_claim_problem() or "")
    Worker.objects.update(figures={FIGURE: storage_facts()})
    assert storage_claim_problem() is None
    assert place.installation_id() == installation_id()


@pytest.mark.django_db
def test_a_database_without_an_id_recognises_its_bucket_by_its_files(
    sdk: SdkClient, model_id: str, place: RemoteFolders
) -> None:
    place.installation_id(make="of an earlier version")
    assert storage_claim_problem() is None
    assert installation_id() == "of an earlier version"


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.django_db
def test_a_lost_machine_with_its_crash_log_counts_as_ended_from_outside(
    place: RemoteFolders, settings: Settings
) -> None:
    worker = Worker(queue="q", hostname="elsewhere", pid=1)
    assert not crashed(worker)
    settings.STORAGE = ""
    assert crashed(worker)
