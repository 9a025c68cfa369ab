"""What all workers of a base model must have in common, so that a run may go from one to another.

A run that moves is rebuilt from files of the storage, and its log is computed again. So another
worker needs the same storage, the same weights and the same versions of the packages that compute;
with them the bits are the same (on machines of one kind). Each worker reports these facts about
itself, and one that starts compares its own with those of the workers that are live.

Plain Python and one query; torch is not loaded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from django.conf import settings
from django.utils import timezone

from futures.models import Worker
from futures.selectors import HEARTBEAT_TIMEOUT
from training.base_model_config import BaseModelConfig
from training.base_models import ServedBaseModel
from training.errors import StorageFailed, WorkerDisagrees
from training.services.installation import storage_id_ensure
from training.storage.chosen import storage
from training.worker.crash_log import crash_file

PACKAGES = ("tinkerapi", "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
"""Those whose version may change a result or a file."""

WHOLE_BYTES = 32 * 2**20
"""Larger files of a base model are read in samples."""

SAMPLES, SAMPLE_BYTES = 64, 4096

SIZES = ("tp_size", "fsdp_size", "ep_size")
"""Of a worker over several devices."""
SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
"""Files of a base model's folder that count."""

STORAGE, DATA_FOLDER = "storage", "the data folder"
"""The name of the fact where checkpoints and snapshots are, and its value without a bucket."""

FIGURE = "agreement"
"""The name under which a worker reports its facts."""


def base_model_digest(folder: Path) -> str:
    """A digest of a base model's folder that costs little.

    Of each file that counts: name, size and content; of one larger than WHOLE_BYTES, 64 samples of
    4 KiB at equal distances, of which the first begins a safetensors file's header. Training
    changes all values of a weights file, so samples tell two of them apart; a changed byte they may
    miss.

    Raises:
        OSError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(SAMPLES):
                file.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def worker_facts(base_model: ServedBaseModel) -> dict[str, str]:
    """The facts about a worker of this base model in this environment, by their names.

    Raises:
        OSError: The base model's folder cannot be read.
    """
    config = base_model.config
    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        **{name: _version(name) for name in PACKAGES},
        "base model's files": base_model_digest(base_model.folder),
        **storage_facts(),
        "secret key": _digest(settings.SECRET_KEY),
        "dtype": config.dtype,
        "layout": config.layout,
        "sampler": config.sampler,
        **{name: str(getattr(config, name)) for name in SIZES},
        **_threads(config),
        "TINKERAPI_BATCH_TOKENS": str(settings.BATCH_TOKENS),
    }


def _threads(config: BaseModelConfig) -> dict[str, str]:
    """The number of threads, if it affects results: that of a worker of one rank does not."""
    return {"TINKERAPI_NUM_THREADS": str(settings.NUM_THREADS)} if config.num_ranks > 1 else {}


def storage_facts() -> dict[str, str]:
    """The storage's place and its id; a storage that does not answer has no id now."""
    where = storage_place()
    try:
        return {STORAGE: where, storage_id_name(): storage_id_ensure()}
    except StorageFailed:
        return {STORAGE: where}


def storage_place() -> str:
    """Where checkpoints and snapshots are, equal on all machines."""
    return storage().location if storage().is_remote else DATA_FOLDER


def storage_id_name() -> str:
    """The name of the fact that is the storage's id."""
    return "storage's installation" if storage().is_remote else "data folder's installation"


def differences(base_model: ServedBaseModel, facts: Mapping[str, str]) -> list[str]:
    """Why a worker with these facts cannot work beside the base model's live workers, one sentence
    for each reason; empty if it can."""
    found: dict[str, str] = {}
    living = Worker.objects.filter(
        queue=base_model.queue,
        state=Worker.WorkerState.LIVE,
        heartbeat_at__gte=timezone.now() - HEARTBEAT_TIMEOUT,
    )
    for other in living.order_by("id"):
        where = f"worker {other.pk} on {other.hostname}"
        theirs = other.figures.get(FIGURE)
        if not isinstance(theirs, dict):
            continue
        for name, value in theirs.items():
            if name not in facts and name.endswith("installation"):
                continue  # of another kind of storage, which is named, or one that does not answer
            if facts.get(name) != value:
                ours = facts.get(name, "unknown")
                found.setdefault(name, f"{name}: {ours} here, {value} at {where}")
        if not storage().is_remote and not crash_file(other).exists():
            found.setdefault(
                "data folder",
                f"data folder: {settings.DATA_DIR} here is not that of {where}, whose file "
                f"{crash_file(other).name} is missing in it; mount the same folder",
            )
    return list(found.values())


def check_agreement(base_model: ServedBaseModel, facts: Mapping[str, str]) -> None:
    """Refuse to work beside workers with other facts.

    Raises:
        WorkerDisagrees: The message names each difference.
    """
    if found := differences(base_model, facts):
        raise WorkerDisagrees(
            f"this worker cannot serve {base_model.name} beside those that are live: "
            + "; ".join(found)
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _digest(secret: Any) -> str:
    return hashlib.sha256(b"tinkerapi agreement " + str(secret).encode()).hexdigest()[:16]
