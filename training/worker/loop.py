"""The work loop: claim, run one batch, commit it, poll the sampler, again.

A lane is leased to this worker from its first claim until nothing of it is in memory any more.

Memory is never ahead of the database for longer than one batch: results, states and run
rows are committed together, fenced by the worker's epoch, and only then is the next batch
begun. If the commit is impossible, or the engine fails with an unexpected error, the
loop raises and the process must end: the next one rebuilds from snapshot and log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from django.conf import settings
from django.db import transaction

from futures.cancelled import futures_cancelled, futures_note_cancelled
from futures.database import execute, rows_get
from futures.errors import Fenced
from futures.finishing import futures_finish, futures_release
from futures.leases import lanes_release, leases_are_uneven
from futures.models import Future, Worker
from futures.notify import Bell
from training.engine.interface import Engine
from training.errors import TrainingError
from training.kinds import Kind, Sample
from training.models import Run
from training.server_figures import DEVICE_FIGURES
from training.storage.chosen import storage
from training.usage import usage_record
from training.vocabulary import TokenTable
from training.worker import outcomes
from training.worker.adapter_cache import AdapterCache, NoRoomYet
from training.worker.batching_delay import collect_batch_mates
from training.worker.claims import Claims
from training.worker.effects import Effects
from training.worker.fetches import Fetches
from training.worker.idle import IdleTime
from training.worker.operations import Operations
from training.worker.replay import Replay
from training.worker.rollouts import Rollouts
from training.worker.samples import Samples
from training.worker.scheduler import Batch, Scheduler, has_custom_loss
from training.worker.text_pool import TextPool
from training.worker.texts import Texts
from training.worker.throughput import Throughput
from training.worker.uploads import Uploads

SAMPLING_SLICE_SECONDS = 0.1  # sampling steps between two training batches
TEXT_SLICE_SECONDS = 0.02  # longest wait for tokenizing between two checks for notifications
START_SLICE_SECONDS = 0.02  # longest wait for the process of custom losses between two such checks
ELSEWHERE_SLICE_SECONDS = 0.02  # longest wait for a sampler elsewhere between two such checks
FILES_SLICE_SECONDS = 0.02  # longest wait for files to be stored or to arrive, in the same way
STOP_UPLOAD_SECONDS = 30.0  # longest wait, at a stop, for files to be stored
EVEN_OUT_SECONDS = 5.0  # between two runs that are given to another worker

# Fenced like the outcomes, because a batch that only begins samples has none: only the holder of
# the lane's lease changes its run.
_ADVANCE = """
UPDATE training_run AS r
SET step = o.step, applied_seq_id = o.applied, tokens = o.tokens,
    last_request_at = statement_timestamp()
FROM unnest(
    %(ids)s::text[], %(steps)s::int[], %(applied)s::bigint[], %(tokens)s::bigint[]
) AS o (id, step, applied, tokens)
JOIN futures_lane AS lane ON lane.id = o.id AND lane.worker_id = %(worker_id)s
WHERE r.id = o.id
    AND EXISTS (
        SELECT FROM futures_worker
        WHERE id = %(worker_id)s AND state IN ('starting', 'live')
    )
RETURNING r.id
"""


class WorkLoop:
    """One engine's work on one queue."""

    def __init__(
        self,
        engine: Engine,
        worker: Worker,
        *,
        stopping: Callable[[], bool],
        bell_rang: Callable[[float], Bell],
        figures: dict[str, Any] | None = None,
        on_turn: Callable[[], None] = lambda: None,
        text_pool: TextPool | None = None,
        token_table: TokenTable | None = None,
    ) -> None:
        """Start without futures.

        Args:
            stopping: Called between batches; True makes ``run_until_idle`` return.
            bell_rang: The queue's notifications since the last call, waiting for one
                up to this many seconds; 0 is a cheap check.
            figures: A dictionary for the loop's own figures.
            on_turn: Called whenever the loop makes progress; see ``training.worker.watchdog``.
            text_pool: Processes that tokenize text; None does it in this thread.
            token_table: For the texts of prompts that are shown to people; without it they are
                empty.
        """
        self._sampler = engine.sampler
        self._trainer = engine.trainer
        self._worker = worker
        self._stopping = stopping
        self._bell_rang = bell_rang
        self._texts = Texts(
            engine.renderer,
            text_pool,
            max_context_tokens=engine.trainer.info.max_context_tokens,
            seconds=settings.TEXT_SECONDS,
        )
        self._on_turn = on_turn
        engine.sampler.report_progress(on_turn)
        self.adapter_cache = AdapterCache(
            engine.trainer,
            engine.sampler,
            worker,
            budget_bytes=engine.adapter_bytes,
            replay=Replay(engine.trainer, self._texts.render, on_turn),
            on_turn=on_turn,
        )
        self._fetches = Fetches(self.adapter_cache.holds)
        self._scheduler = Scheduler(
            batch_cost=settings.BATCH_TOKENS,
            batch_bytes=engine.adapter_bytes,
            lane_bytes=self.adapter_cache.lane_bytes,
            is_ready=self._is_ready,
            needs_files=self._needs_files if storage().is_remote else None,
        )
        self._uploads = Uploads()
        self._prepare_custom_losses = engine.trainer.prepare_custom_losses
        self._custom_losses_start = False
        """Whether a future waits until the process for clients' own losses has started."""
        self._idle = IdleTime(
            let_go=self._let_go_of_one,
            release_memory=lambda: _release_memory(engine),
        )
        self._operations = Operations(engine.trainer, self.adapter_cache, self._texts)
        rollouts = Rollouts(token_table)
        self._samples = Samples(engine.sampler, engine.renderer, self._texts, rollouts)
        self._figures = figures if figures is not None else {}
        self._figures |= self.adapter_cache.figures()
        self._batch = 0
        self._claims = Claims(worker, self._scheduler, self._texts)
        self._next_even_out = time.monotonic() + EVEN_OUT_SECONDS
        self._throughput = Throughput()
        self._runs: dict[str, Run] = {}
        self._some_cancelled = False
        """Whether a cancellation was notified since the last check."""
        self._charged_until = time.monotonic()
        """Until when this worker's time was shared among requests, or was idle."""

    def run_until_idle(self) -> None:
        """Work until no future may run; called by the doorbell task.

        Raises:
            Fenced: This worker's life was ended by others.
            Exception: Memory may be corrupt or the commit is impossible; leave the process.
        """
        self._claims.look_everywhere()
        self._throughput.work_begins()
        self._charged_until = time.monotonic()
        while not self._stopping():
            self.turn()
            self._even_out()
            self._release_lanes()
            if self._listen(0) & Bell.SUBMITTED or self._claims.may_take_more():
                self._claims.take()
                collect_batch_mates(
                    may_wait=self._may_wait, bell_rang=self._listen, claim=self._claims.take
                )
            self._let_go_of_cancelled()
            self._look_at_texts()
            self._finish_uploads()
            self._custom_losses_start = False
            batch = self._scheduler.next_batch()
            begin = time.monotonic()
            if batch:
                self._run(batch)
            if self._samples_need_turn:
                # Samples get as much time as clients' own losses, even if those are slow.
                is_custom = any(map(has_custom_loss, batch.passes))
                took = time.monotonic() - begin if is_custom else 0.0
                self._sample(max(SAMPLING_SLICE_SECONDS, took))
            elif self._sampler.active:
                has_work = batch or self._texts.are_pending or self._claims.may_take_more()
                self._sample(0.0 if has_work else ELSEWHERE_SLICE_SECONDS)
            elif not batch and self._texts.are_pending:
                self._texts.look(wait_seconds=TEXT_SLICE_SECONDS)
            elif not batch and self._custom_losses_start:
                time.sleep(START_SLICE_SECONDS)
            elif not batch and (self._uploads or self._fetches.are_pending):
                self._wait_for_files()
            elif not batch and not self._claims.may_take_more():
                break
        self._idle.worked()

    def _is_ready(self, future: Future) -> bool:
        """Whether a request may run: its text is tokenized, and the process for its loss is
        ready."""
        if not self._texts.is_ready(future):
            return False
        if not has_custom_loss(future) or self._prepare_custom_losses():
            return True
        self._custom_losses_start = True
        return False

    def _needs_files(self, future: Future) -> bool:
        """Whether a request waits for files that it reads, or for room for those that it writes."""
        return self._saves_too_many(future) or self._fetches.are_needed(future)

    def _saves_too_many(self, future: Future) -> bool:
        return future.kind == Kind.SAVE_WEIGHTS and self._uploads.is_full(future.owner_id)

    def turn(self) -> None:
        """Work between batches and while idle."""
        self._on_turn()
        self._figures |= self._sampler.figures()
        self.adapter_cache.drop_borrowed()
        self.adapter_cache.keep_up()

    def idle_turn(self) -> bool:
        """Work while idle; return whether to look at futures that were left to other workers."""
        self.turn()
        self._idle.look()
        self._even_out()
        self._release_lanes()
        return self._claims.left_some_to_look_at()

    def _even_out(self) -> None:
        """Give a run to another worker that has fewer; call it between batches.

        Its futures that have not begun go with it. A run that is being sampled stays.
        """
        if time.monotonic() < self._next_even_out:
            return
        self._next_even_out = time.monotonic() + EVEN_OUT_SECONDS
        if not leases_are_uneven(self._worker):
            return
        begun = [*self._samples.futures, *self._uploads.futures]
        run_id = self.adapter_cache.hand_over(but={f.lane_id for f in begun if f.lane_id})
        if run_id is None:
            return
        held = [future.id for future in self._scheduler.held() if future.lane_id == run_id]
        self._scheduler.withdraw(set(held))
        self._texts.forget(held)
        futures_release(worker=self._worker, request_ids=held)
        lanes_release(worker=self._worker, lane_ids=[run_id])

    def _release_lanes(self) -> None:
        """Release the leases of lanes of which nothing is in memory and nothing waits here; call it
        between batches."""
        unneeded = self.adapter_cache.lanes_without_adapter()
        if unneeded:
            held = [*self._scheduler.held(), *self._samples.futures, *self._uploads.futures]
            lanes_release(
                worker=self._worker, lane_ids=unneeded - {future.lane_id for future in held}
            )

    def _let_go_of_one(self) -> bool:
        """Evict an adapter that nobody needs any more; return whether there was one."""
        has_left = self.adapter_cache.let_go()
        self._figures |= self.adapter_cache.figures()
        return has_left

    def _listen(self, timeout_seconds: float) -> Bell:
        """The queue's notifications; records cancellations for later."""
        heard = self._bell_rang(timeout_seconds)
        self._some_cancelled |= bool(heard & Bell.CANCELLED)
        self._claims.hear(heard)
        return heard

    def _look_at_texts(self) -> None:
        """Collect tokenized text.

        Short texts take a moment, and futures that were claimed together should share a pass, so
        this waits a little for newly claimed ones, unless that would delay running samples.
        """
        self._texts.look()
        while self._texts.are_pending and not self._samples_need_turn:
            left = self._claims.company_until - time.monotonic()
            if left <= 0:
                return
            self._texts.look(wait_seconds=left)

    def _may_wait(self) -> bool:
        """Whether the held futures may wait for batch-mates."""
        return self._scheduler.is_delayable and not self._samples_need_turn

    @property
    def _samples_need_turn(self) -> bool:
        """Whether sequences would stop while this thread does something else."""
        return self._sampler.needs_turns and self._sampler.active > 0

    def _run(self, batch: Batch) -> None:
        self._batch += 1
        self._load_runs(batch)
        effects = Effects(runs=list(self._runs.values()))
        self._operations.run_passes(batch.passes, self._runs, effects)
        for future in batch.samples:
            self._begin_sample(future, effects)
        for future in batch.barriers:
            if self._saves_too_many(future):  # those before it in this batch count too
                self._scheduler.barrier_put_back(future)
                continue
            later = self._operations.run_barrier(future, self._runs, effects)
            if later is not None:
                self._scheduler.barrier_waits(future)
                self._uploads.begin(future, later)
            self._on_turn()
        self._commit(effects)
        for run_id, seconds in effects.seconds.items():
            self.adapter_cache.worked(run_id, seconds)

    def _wait_for_files(self) -> None:
        """Wait a moment for the storage, because there is nothing else to do."""
        if self._uploads:
            self._uploads.wait(FILES_SLICE_SECONDS)
        else:
            time.sleep(FILES_SLICE_SECONDS)
        self._charged_until = time.monotonic()  # this worker was idle

    def _finish_uploads(self) -> None:
        """Commit the saves whose files are stored, or could not be."""
        for upload in self._uploads.finished():
            effects = Effects()
            try:
                outcome = upload.outcome(effects)
            except TrainingError as error:
                outcome = outcomes.failed(upload.future, error)
            effects.outcomes.append(outcome)
            self._batch += 1
            self._commit(effects)
            self._scheduler.barrier_finished(upload.future)

    def _load_runs(self, batch: Batch) -> None:
        lanes = {f.lane_id for f in [*batch.passes, *batch.samples, *batch.barriers] if f.lane_id}
        runs = rows_get(Run, "id = ANY (%(ids)s::text[])", {"ids": list(lanes)}) if lanes else []
        self._runs = {run.id: run for run in runs}
        self.adapter_cache.pin(self._runs)

    def _begin_sample(self, future: Future, effects: Effects) -> None:
        """Submit a sample's prompts to the sampler, or fail it by name."""
        request = cast(Sample, self._texts.request(future))
        run = self._runs.get(future.lane_id or "")
        try:
            version = None
            if run is not None:
                version = self._operations.publish(future, self._runs)
            elif request.checkpoint is not None:
                version = self.adapter_cache.publish_checkpoint(request.checkpoint, future)
            self._samples.submit(
                future,
                request,
                model_id=run.name if run else None,
                version=version,
                origin=self._samples.rollouts.origin(future, request, run),
            )
        except NoRoomYet:
            self._scheduler.put_back(future)
        except TrainingError as error:
            self._texts.forget([future.id])
            self._scheduler.sample_finished(future)
            effects.outcomes.append(outcomes.failed(future, error))

    def _sample(self, seconds: float) -> None:
        """Give the sampler a slice of time, or less if a sample finishes."""
        finished = self._samples.poll(seconds)
        if finished:
            for sampled in finished:
                self._scheduler.sample_finished(sampled.future)
            self._batch += 1
            records = [(item.future, record) for item in finished for record in item.records]
            done = [sampled.outcome for sampled in finished]
            self._commit(Effects(outcomes=done, writes=records))

    def _let_go_of_cancelled(self) -> None:
        """Drop cancelled samples; costs nothing without cancellations.

        Their rows are final already. The tokens sampled for them are recorded, because they count
        as used.
        """
        if not self._some_cancelled:
            return
        self._some_cancelled = False
        waiting = [future.id for future in self._scheduler.held() if future.interruptible]
        cancelled = futures_cancelled(
            worker=self._worker, request_ids=[*self._samples.request_ids, *waiting]
        )
        self._scheduler.withdraw(cancelled)
        self.adapter_cache.no_longer_wait(cancelled)
        self._texts.forget(cancelled)
        summaries: dict[str, dict[str, int]] = {}
        for request_id, (future, used) in self._samples.withdraw(cancelled).items():
            self._scheduler.sample_finished(future)
            if used:
                summaries[request_id] = used
        if summaries:
            self._batch += 1
            with transaction.atomic():
                futures_note_cancelled(worker=self._worker, summaries=summaries, batch=self._batch)
                self._charge(list(summaries))

    def _charge(self, request_ids: list[str]) -> None:
        """Add the time since the last completion to the usage of these; without any, it goes to
        the next ones."""
        if request_ids:
            now = time.monotonic()
            usage_record(request_ids, seconds=now - self._charged_until)
            self._charged_until = now

    def _commit(self, effects: Effects) -> None:
        """The commit point: results, states, run rows and waiters, all or nothing."""
        with transaction.atomic():
            effects.write()
            futures_finish(worker=self._worker, outcomes=effects.outcomes, batch=self._batch)
            self._advance(effects.runs)
            # Last, because other workers may add to the same rows and wait for this commit.
            self._charge([outcome.request_id for outcome in effects.outcomes])
        self.adapter_cache.moved_on(effects.runs)
        for act in effects.after_commit:
            act()
        self._throughput.finished(len(effects.outcomes))
        self._figures |= {
            "batches": self._batch,
            **self.adapter_cache.figures(),
            "sampling": len(self._samples),
            "futures_per_second": self._throughput.futures_per_second,
            **self._device_memory(),
        }

    def _advance(self, runs: Sequence[Run]) -> None:
        """Store where runs are now.

        Raises:
            Fenced: One of them is not this worker's any more.
        """
        if not runs:
            return
        advanced = execute(
            _ADVANCE,
            {
                "worker_id": self._worker.pk,
                "ids": [run.id for run in runs],
                "steps": [run.step for run in runs],
                "applied": [run.applied_seq_id for run in runs],
                "tokens": [run.tokens for run in runs],
            },
        )
        if len(advanced) != len(runs):
            raise Fenced

    def _device_memory(self) -> dict[str, int]:
        """The figures of a GPU's memory; none on a CPU."""
        found = self._trainer.device_memory()
        return {} if found is None else dict(zip(DEVICE_FIGURES, found, strict=True))

    def give_back(self) -> None:
        """The end: futures that have not begun or are being sampled wait for the next worker, and
        unsaved state is written to disk, so that it need not be repeated."""
        seconds = min(STOP_UPLOAD_SECONDS, settings.HANG_SECONDS / 2)
        self._uploads.wait(seconds, for_all=True)
        self._finish_uploads()
        futures = [*self._uploads.withdraw(), *self._scheduler.held()]
        futures += [
            future for future, _ in self._samples.withdraw(self._samples.request_ids).values()
        ]
        futures_release(worker=self._worker, request_ids=[future.id for future in futures])
        self._texts.close()
        self.adapter_cache.snapshot_all(
            then=lambda run: lanes_release(worker=self._worker, lane_ids=[run.id])
        )


def _release_memory(engine: Engine) -> None:
    """Free memory that neither role uses now; the trainer last, because it also frees the memory
    that the sampler has released."""
    engine.sampler.release_memory()
    engine.trainer.release_memory()
