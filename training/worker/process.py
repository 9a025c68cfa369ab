"""One worker process from start to end: take the queue, load the model, serve, stop cleanly."""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from django.conf import settings
from django.db import DatabaseError, InterfaceError, OperationalError, connection

from futures.broker import bell_rang, listen_as
from futures.consumer import Consumer
from futures.errors import Fenced
from futures.log_fields import log_fields_of_process
from futures.lost_workers import Colleagues
from futures.models import Worker
from futures.workers import worker_heartbeat, worker_live, worker_start, worker_stop
from training import tasks
from training.base_models import ServedBaseModel
from training.engine import factory
from training.engine.interface import Engine
from training.loaded_code import keep_what_is_loaded
from training.vocabulary import vocabulary_store
from training.worker.adapter_memory import GIBIBYTE
from training.worker.agreement import FIGURE, check_agreement, worker_facts
from training.worker.crash_log import CrashLog, crashed, oom_kills, remove_judged
from training.worker.idle_cores import IdleCores, UseIdleCores
from training.worker.loop import WorkLoop
from training.worker.maintenance import Maintenance
from training.worker.text_pool import TextPool
from training.worker.texts import TEXT_RULES
from training.worker.watchdog import EVERY_SECONDS, WatchdogSignal

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
RANK_SECONDS = 300.0  # for another rank to start, on a busy machine
LOOK_SECONDS = 1.0  # between two tries to reach Postgres at the start
OUTAGE_SECONDS = 120.0  # after this the failure is reported


def build_engine(base_model: ServedBaseModel, *, number: int = 0) -> Engine:
    """The engine of this base model on this machine's device, by the settings.

    Args:
        number: Of this worker, among the base model's on this machine.

    Raises:
        BaseModelNotFound: Its folder cannot be read.
        DeviceNotFound: It names a GPU that does not exist.
    """
    stages = Stages()
    engine = factory.build_engine(
        base_model.config,
        base_model.folder,
        number=number,
        among=settings.BASE_MODELS,
        num_threads=settings.NUM_THREADS,
        batch_tokens=settings.BATCH_TOKENS,
        cache_tokens=settings.CACHE_TOKENS,
        # Longer than the supervisor's: in a pass it is first, and records where the worker hangs.
        wait_seconds=max(settings.HANG_SECONDS * 1.25, RANK_SECONDS),
        on_stage=stages.begin,
        server_folder=base_model.server_folder,
    )
    logger.info("%s: %s", base_model.name, stages)
    return engine


class Stages:
    """The duration of each stage, as text for the log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: list[tuple[str, float]] = []

    def begin(self, name: str) -> None:
        """End the previous stage, and begin this one."""
        self._begun.append((name, self._clock()))

    def __str__(self) -> str:
        """``read in 0.8 s, prove in 0.5 s``; the last stage ends now."""
        ends = [*(time for _, time in self._begun[1:]), self._clock()]
        took = (
            f"{name} in {end - start:.1f} s"
            for (name, start), end in zip(self._begun, ends, strict=True)
        )
        return ", ".join(took)


def run_worker(base_model: ServedBaseModel, build: Callable[[ServedBaseModel], Engine]) -> None:
    """Serve a base model's queue until SIGTERM or SIGINT.

    Its life begins before the model is loaded, so that the web process can report that a worker is
    starting.

    Raises:
        QueueTaken: A worker of the former version serves this base model.
        WorkerDisagrees: Its environment differs from that of the workers that serve it.
        BaseModelNotFound, DeviceNotFound: The model cannot be loaded.
    """
    watchdog = WatchdogSignal(settings.WATCHDOG_FD)
    figures: dict[str, Any] = {
        "base_model": base_model.name,
        "oom_kills": oom_kills(),
        "text_rules": TEXT_RULES,
    }
    facts = _facts(base_model)
    start = partial(worker_start, queue=base_model.queue, figures=figures, crashed=crashed)
    worker = when_postgres_answers(start, meanwhile=watchdog)
    log_fields_of_process(worker=worker.pk, base_model=base_model.name)
    crash_log = CrashLog(
        worker
    )  # also for the stack traces that a supervisor requests from a hung worker
    over = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(worker, figures, over), name="heartbeat", daemon=True
    )
    beating.start()
    try:
        if facts is not None:
            check_agreement(base_model, facts)
            figures[FIGURE] = facts
        with _signalling(watchdog):
            engine = build(base_model)
            renderer = engine.renderer
            token_table = vocabulary_store(
                base_model.queue, renderer.vocabulary_key, renderer.token_bytes
            )
        on_turn: Callable[[], None] = watchdog
        if not settings.NUM_THREADS:
            on_turn = UseIdleCores(engine.trainer, IdleCores(), then=watchdog)
        engine.trainer.report_progress(on_turn)
        num_ranks = base_model.config.num_ranks
        device = engine.trainer.info.device + (f", {num_ranks} ranks" if num_ranks > 1 else "")
        info, conversation_fault = engine.trainer.info, engine.renderer.conversation_fault
        figures |= {
            "device": device,
            "dtype": info.dtype,
            "layout": info.layout,
            "rotary_switch": info.rotary_switch,
            "num_parameters": info.num_parameters,
            "max_context_tokens": info.max_context_tokens,
            "conversation_fault": conversation_fault,
        }
        if conversation_fault is not None:
            logger.warning(
                "%s: takes no conversations to train on: %s", base_model.name, conversation_fault
            )
        listen_as(worker)
        consumer = Consumer(base_model.queue)
        consumer.shares_queue = True
        pool = TextPool(engine.renderer)
        loop = WorkLoop(
            engine,
            worker,
            stopping=consumer.stopping.is_set,
            bell_rang=partial(bell_rang, base_model.queue),
            figures=figures,
            on_turn=on_turn,
            text_pool=pool,
            token_table=token_table,
        )
        consumer.on_turn = loop.idle_turn
        tasks.serve(base_model.queue, crash_log.noted()(loop.run_until_idle))
        worker_live(worker, figures)
        pool.warm_up(base_model.folder)
        keep_what_is_loaded()
        logger.info(
            "%s: ready on %s, %s layout; its adapters may take %.2f GiB of memory",
            base_model.name,
            device,
            info.layout,
            engine.adapter_bytes / GIBIBYTE,
        )
        consumer.run()
        loop.give_back()
        engine.sampler.close()
    finally:
        over.set()
        beating.join()
        worker_stop(worker)
    crash_log.close()


def _facts(base_model: ServedBaseModel) -> dict[str, str] | None:
    """What this worker reports for comparison; None if its folder cannot be read, which ``build``
    will report."""
    try:
        return worker_facts(base_model)
    except OSError:
        return None


def when_postgres_answers(
    start: Callable[[], Worker],
    *,
    meanwhile: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Worker:
    """Call ``start()`` as soon as Postgres answers: it may have gone down with the last worker.

    Otherwise the supervisor would restart this process with growing delays.

    Raises:
        OperationalError: Django's or psycopg's; it has not answered for OUTAGE_SECONDS.
    """
    deadline = clock() + OUTAGE_SECONDS
    told = False
    while True:
        try:
            return start()
        except (OperationalError, InterfaceError, psycopg.OperationalError) as error:
            connection.close()
            if clock() >= deadline:
                raise
            if not told:
                logger.warning("Postgres does not answer; trying again: %s", str(error).strip())
            told = True
        meanwhile()
        sleep(LOOK_SECONDS)


@contextmanager
def _signalling(watchdog: WatchdogSignal) -> Iterator[None]:
    """Signal the watchdog from a thread while the model is loaded, which has no turns of a loop."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(EVERY_SECONDS):
            watchdog()

    beating = threading.Thread(target=beat, name="watchdog", daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()


def _beat(worker: Worker, figures: dict[str, Any], over: threading.Event) -> None:
    """Send heartbeats every few seconds; leave the process if its life was ended.

    Also looks whether other workers of the queue live, and runs the queue's maintenance.
    """
    maintenance = Maintenance(worker.queue)
    colleagues = Colleagues(worker, crashed=crashed)
    has_tidied = False
    while not over.wait(HEARTBEAT_SECONDS):
        try:
            worker_heartbeat(worker, {**figures, **_memory()})
            for epoch in colleagues.look():
                logger.warning("worker %d was silent; others do its work now", epoch)
            _do(maintenance)
            if not has_tidied:
                remove_judged(worker.queue)
                has_tidied = True
        except Fenced:
            logger.error("others have ended this worker's life and do its work; leaving")
            logging.shutdown()
            os._exit(1)
        except (DatabaseError, InterfaceError) as error:
            logger.warning("heartbeat: %s", str(error).strip())
            connection.close()
    connection.close()


def _do(maintenance: Maintenance) -> None:
    """Run the maintenance; a failing task must not end the heartbeats."""
    try:
        maintenance.do()
    except (Fenced, DatabaseError, InterfaceError):
        raise
    except Exception:
        logger.exception("maintenance failed; it is tried again")


def _memory() -> dict[str, int]:
    """The process's current memory, if the system reports it, and its peak."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = most if sys.platform == "darwin" else most * 1024
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return {"memory_bytes": most, "peak_memory_bytes": most}
    return {"memory_bytes": pages * resource.getpagesize(), "peak_memory_bytes": most}
