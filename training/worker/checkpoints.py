"""Saving and loading, when their turn in the lane comes.

Files are written before the commit and named by it: a crash in between leaves a folder that
no row names, never a row without its folder.
"""

from __future__ import annotations

import shutil
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone

from futures.finishing import Outcome
from futures.models import Future
from futures.services import lane_create
from training.age import SUFFIX, encrypt_file
from training.atomic_directory import new_directory
from training.engine.interface import Trainer
from training.errors import CheckpointExists, InvalidRequest, StorageQuotaExceeded
from training.models import Checkpoint, Run, SamplingSession
from training.paths import TinkerPath
from training.payloads import Payload
from training.services.checkpoints import checkpoint_check_free, checkpoint_place
from training.storage_quota import storage_check
from training.worker import outcomes
from training.worker.adapter_cache import AdapterCache, load_checkpoint

if TYPE_CHECKING:
    from training.worker.operations import Effects

FOLDER = Path("checkpoints")
"""Below the data folder."""


class CheckpointOperations:
    """The kinds of futures that write checkpoints and read them."""

    def __init__(self, trainer: Trainer, adapter_cache: AdapterCache) -> None:
        self._trainer = trainer
        self._adapter_cache = adapter_cache

    def save(self, future: Future, run: Run, payload: Payload, effects: Effects) -> Outcome:
        """Keep the run as it is under a name, or for one sampling session."""
        if "sampling_session_seq_id" in payload:
            return self._save_for_sampling_session(future, run, payload)
        kind, name = payload["kind"], payload["name"]
        path, overwrite = TinkerPath(run.name, kind, name), payload["overwrite"]
        checkpoint_check_free(owner_id=run.owner_id, path=path, overwrite=overwrite)
        row = self._written(future, run, kind, name, payload.get("recipients", ()))
        row.user_metadata = payload["user_metadata"]
        if payload["ttl_seconds"] is not None:
            row.expires_at = row.created_at + timedelta(seconds=payload["ttl_seconds"])

        def place() -> None:
            try:
                checkpoint_place(row, overwrite=overwrite)
            except (CheckpointExists, StorageQuotaExceeded):  # of what was saved meanwhile
                shutil.rmtree(settings.DATA_DIR / row.directory, ignore_errors=True)
                raise

        effects.writes.append((future, place))
        result = {"path": str(path), "model_id": run.name, "size_bytes": row.size_bytes}
        return outcomes.ready(future, result, path=str(path), bytes=row.size_bytes)

    def load(self, future: Future, run: Run, payload: Payload, effects: Effects) -> Outcome:
        """Make the run what a checkpoint holds."""
        self.restore(self._adapter_cache.bring_run(run), run, payload, effects)
        return outcomes.ready(
            future, {"path": payload["path"], "model_id": run.name}, path=payload["path"]
        )

    def restore(self, adapter_name: str, run: Run, payload: Payload, effects: Effects) -> None:
        """Load a checkpoint into the trainer, and see to it that it need not be read again."""
        load_checkpoint(self._trainer, adapter_name, payload)
        run.step = int(self._trainer.adapter_state(adapter_name)["step"])
        # The checkpoint may be deleted tomorrow, and the log could not be replayed past it.
        effects.seconds[run.id] = float("inf")

    def _save_for_sampling_session(self, future: Future, run: Run, payload: Payload) -> Outcome:
        """A frozen sampling session of these very weights.

        Its rows are committed here, before the future's result: another request may take the
        session's number until then, and only the database can say who was first. When a crash
        comes in between, the repeat finds what the first one made.
        """
        number = payload["sampling_session_seq_id"]
        session_id = f"{run.session_id}:sample:{number}"
        made = SamplingSession.objects.filter(
            id=session_id, checkpoint__run=run, checkpoint__seq_id=future.seq_id or 0
        )
        result = {"sampling_session_id": session_id, "model_id": run.name}
        if made.exists():
            return outcomes.ready(future, result, sampling_session=session_id)
        # No client can ask for this name: a path may not hold it.
        row = self._written(future, run, Checkpoint.Kind.SAMPLER, f"~{future.seq_id}", ())
        row.ephemeral = True
        try:
            with transaction.atomic():
                storage_check(owner_id=run.owner_id, more_bytes=row.size_bytes)
                row.save(force_insert=True)
                SamplingSession.objects.create(
                    id=session_id,
                    session_id=run.session_id or "",
                    seq_id=number,
                    base_model=run.base_model,
                    checkpoint=row,
                    model_path=f"tinker://{run.name}/sampler_weights/{row.name}",
                )
                lane_create(
                    lane_id=session_id, owner_id=run.owner_id, queue=future.queue, ordered=False
                )
        except StorageQuotaExceeded:
            shutil.rmtree(settings.DATA_DIR / row.directory, ignore_errors=True)
            raise
        except IntegrityError:
            shutil.rmtree(settings.DATA_DIR / row.directory, ignore_errors=True)
            raise InvalidRequest(
                f"sampling_session_seq_id: this session has a sampling session {number} already"
            ) from None
        return outcomes.ready(future, result, sampling_session=session_id, bytes=row.size_bytes)

    def _written(
        self, future: Future, run: Run, kind: str, name: str, recipients: list[str] | tuple[()]
    ) -> Checkpoint:
        """The run's files, and the row that will name them."""
        directory = FOLDER / uuid.uuid4().hex
        target = settings.DATA_DIR / directory
        adapter_name = self._adapter_cache.bring_run(run)
        if kind != Checkpoint.Kind.EXTERNAL:
            size = self._trainer.save_adapter(
                adapter_name, target, with_optimizer=kind == Checkpoint.Kind.TRAINING
            )
        elif recipients:
            size = self._save_encrypted(adapter_name, target, recipients)
        else:
            size = self._trainer.save_peft(adapter_name, target)
        return Checkpoint(
            run=run,
            owner_id=run.owner_id,
            path_run=run.name,
            kind=kind,
            name=name,
            seq_id=future.seq_id or 0,
            step=run.step,
            directory=str(directory),
            size_bytes=size,
            created_at=timezone.now(),
        )

    def _save_encrypted(self, adapter_name: str, target: Path, recipients: list[str]) -> int:
        """peft's files, each as an age file; nothing else of them stays on the disk."""
        plain = target.with_name(f".plain-{target.name}")
        try:
            self._trainer.save_peft(adapter_name, plain)
            with new_directory(target) as temporary:
                for path in plain.iterdir():
                    encrypt_file(path, temporary / (path.name + SUFFIX), recipients)
                return sum(path.stat().st_size for path in temporary.iterdir())
        finally:
            shutil.rmtree(plain, ignore_errors=True)
