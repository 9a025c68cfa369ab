"""Imports of adapters that were trained elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, ClassVar, cast

from django.conf import settings
from django.http import QueryDict
from django.http.multipartparser import MultiPartParserError
from rest_framework.exceptions import ParseError, UnsupportedMediaType
from rest_framework.request import Request

from tinkerapi.api.bodies.archives import ARCHIVE_TYPES, take_files
from tinkerapi.api.bodies.bounded import copy_bounded
from tinkerapi.api.fields.field import Field, Flag, Number, Text, check_object
from tinkerapi.api.quickref.views.base import OperationView
from tinkerapi.api.quickref.views.steps import MODEL_ID
from tinkerapi.api.quickref.views.weights import SaveWeightsView
from training.errors import InvalidRequest
from training.peft_import.config import CONFIG_NAME
from training.peft_import.files import MAX_CONFIG_BYTES, PICKLE_NAME, WEIGHTS_NAME
from training.services import Submission
from training.services.imports import IMPORTED, adapter_import_submit

MULTIPART = "multipart/form-data"

FILE_NAMES = {"adapter_config": CONFIG_NAME, "adapter_model": WEIGHTS_NAME}
ARCHIVE = "archive"


class ImportAdapterView(OperationView):
    """Make a checkpoint of a LoRA adapter that peft has trained elsewhere.

    Send a form with the two files of its folder, or with a .zip, .tar or .tar.gz of the
    folder. Such an archive may also be the whole body (`application/zip`, `application/gzip`,
    `application/x-tar`), with the fields in the query. The checkpoint has no optimizer state yet:
    load it to train on, or sample from it. No model is made.
    """

    uses_storage = True
    group = SaveWeightsView.group
    fields: ClassVar[Mapping[str, Field]] = {
        "base_model": Text(
            description="The base model that it was trained on; the default is the first.",
            max_length=255,
        ),
        "model_id": replace(
            MODEL_ID,
            required=False,
            description="The first part of the checkpoint's path; without one, the server chooses.",
        ),
        "name": Text(
            description="The checkpoint's name.", max_length=128, default=IMPORTED, example="first"
        ),
        "overwrite": Flag(description="Replace one of this name.", default=False),
    }
    files: ClassVar[Mapping[str, str]] = {
        "adapter_config": f"The adapter's {CONFIG_NAME}.",
        "adapter_model": f"The adapter's {WEIGHTS_NAME}; a {PICKLE_NAME} is not read.",
        ARCHIVE: "Both of them in one archive, instead.",
    }
    answer = SaveWeightsView.answer
    answer_example: ClassVar[Any] = {
        "path": "tinker://my_model/weights/imported",
        "model_id": "my_model",
    }
    errors: ClassVar[Mapping[int, str]] = {
        404: "The base model is not served here.",
        409: "There is a checkpoint of this path when it runs, or the Idempotency-Key names "
        "another request.",
    }

    def max_body_bytes(self) -> int:
        limit: int = settings.MAX_IMPORT_BYTES
        return limit

    def checked_body(self, request: Request) -> dict[str, Any]:
        """The fields of the form, or of an archive's address; and the files under ``files``."""
        django_request = request._request
        content_type = django_request.content_type or ""
        if encoding := request.headers.get("Content-Encoding"):
            raise UnsupportedMediaType(
                encoding, detail=f"Content-Encoding: {encoding[:40]!r} is not supported here"
            )
        if content_type in ARCHIVE_TYPES:
            given, uploads = request.query_params, None
        elif content_type == MULTIPART:
            try:
                given, uploads = django_request.POST, django_request.FILES
            except MultiPartParserError as error:
                raise ParseError(f"The body is not valid {MULTIPART}: {error}") from None
        else:
            raise UnsupportedMediaType(
                content_type,
                detail=f"Content-Type: expected {MULTIPART} or one of {', '.join(ARCHIVE_TYPES)}; "
                f"got {content_type[:100]!r}",
            )
        body = check_object(self.body_fields(), _form_values(self.body_fields(), given, self.files))
        if uploads is None:
            return {**body, "files": {ARCHIVE: cast(IO[bytes], django_request)}}
        return {**body, "files": _checked_files(self.files, uploads)}

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        files: dict[str, IO[bytes]] = body["files"]
        try:
            return adapter_import_submit(
                owner_id=owner_id,
                actor_id=owner_id,
                write_files=partial(_write_files, files),
                base_model=body["base_model"],
                model_id=body["model_id"],
                name=body["name"],
                overwrite=body["overwrite"],
                idempotency_key=idempotency_key,
            )
        finally:
            for file in files.values():  # their temporary files; the wait for the result is long
                file.close()


def _form_values(
    fields: Mapping[str, Field], form: QueryDict, files: Mapping[str, str]
) -> dict[str, Any]:
    """The form's texts as the values that the fields expect."""
    values: dict[str, Any] = {}
    for name, given in form.lists():
        if name in files:
            raise InvalidRequest(f"{name}: expected a file; got text")
        if len(given) != 1:
            raise InvalidRequest(f"{name[:60]}: expected one value; got {len(given)}")
        values[name] = _form_value(fields.get(name), str(given[0]))
    return values


def _form_value(field: Field | None, text: str) -> Any:
    if isinstance(field, Flag):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(field, Number):
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _checked_files(known: Mapping[str, str], files: Any) -> dict[str, IO[bytes]]:
    """The files by field: both of the adapter's, or an archive.

    Raises:
        InvalidRequest: One is missing, unknown or given twice. (400)
    """
    given: dict[str, IO[bytes]] = {}
    for name, uploads in files.lists():
        if name not in known:
            raise InvalidRequest(f"{name[:60]}: unknown file; expected {', '.join(known)}")
        if len(uploads) != 1:
            raise InvalidRequest(f"{name}: expected one file; got {len(uploads)}")
        given[name] = uploads[0]
    if set(given) not in ({ARCHIVE}, set(FILE_NAMES)):
        got = f"got {', '.join(given)}" if given else "got none"
        raise InvalidRequest(
            f"adapter_config, adapter_model, archive: send the first two files, or the third; {got}"
        )
    return given


def _write_files(files: Mapping[str, IO[bytes]], directory: Path) -> None:
    if archive := files.get(ARCHIVE):
        with TemporaryFile(dir=directory) as copy:  # it must be seekable, and a body is not
            _copy(archive, copy, max_bytes=settings.MAX_IMPORT_BYTES, field=ARCHIVE)
            copy.seek(0)
            take_files(
                copy,
                (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME),
                directory,
                max_bytes=settings.MAX_IMPORT_BYTES,
                field=ARCHIVE,
            )
        return
    limits = {"adapter_config": MAX_CONFIG_BYTES, "adapter_model": settings.MAX_IMPORT_BYTES}
    for field, name in FILE_NAMES.items():
        with (directory / name).open("wb") as file:
            _copy(files[field], file, max_bytes=limits[field], field=field)


def _copy(source: IO[bytes], target: IO[bytes], *, max_bytes: int, field: str) -> None:
    def too_large() -> InvalidRequest:
        return InvalidRequest(f"{field}: is larger than {max_bytes} bytes")

    copy_bounded(source, target, max_bytes=max_bytes, too_large=too_large)
