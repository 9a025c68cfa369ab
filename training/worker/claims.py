"""A worker's claims: where from, how many, and when to look again without a notification."""

from __future__ import annotations

import time

from django.conf import settings

from futures.claiming import PATIENCE_SECONDS, future_claim
from futures.models import Future, Worker
from futures.notify import Bell
from training.worker.scheduler import Scheduler
from training.worker.texts import Texts

CLAIM_FUTURES = 512  # at most, in one claim
CLAIM_BATCHES = 2  # claim ahead by this many batches' tokens
COMPANY_SECONDS = 0.02  # longest wait of a batch for text that was claimed with it


class Claims:
    """Takes futures from the queue to the scheduler, and their text to the renderer."""

    def __init__(self, worker: Worker, scheduler: Scheduler, texts: Texts) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._texts = texts
        self.company_until = 0.0
        """The time until which a batch waits for text that was claimed with it."""
        self._unclaimed = True
        """Whether a claim has left futures that may run, for which there is no new notification."""
        self._looks_anywhere = True
        """Whether the next claim looks beyond the lanes that are leased already."""
        self._look_at: float | None = None
        """When to look at what the last claim has left to other workers."""
        self._passed_over: set[int] = set()
        """Owners of whom the last claim took nothing, because too much of theirs waits for text or
        for files."""

    def look_everywhere(self) -> None:
        """Claim again, and not only from the lanes that are leased already."""
        self._unclaimed = self._looks_anywhere = True

    def hear(self, heard: Bell) -> None:
        """Take note of the queue's notifications."""
        self._looks_anywhere |= bool(heard & Bell.ANYWHERE)

    def left_some_to_look_at(self) -> bool:
        """Whether it is time to look at futures that were left to other workers."""
        return self._look_at is not None and time.monotonic() >= self._look_at

    def may_take_more(self) -> bool:
        """Whether remaining futures may be claimed now, without a new notification."""
        if self.left_some_to_look_at():
            self._looks_anywhere = True
            return True
        return self._unclaimed or not self._passed_over <= self._full_owners()

    def take(self) -> None:
        """Claim futures that may run, unless enough are held already."""
        if self._scheduler.held_cost > settings.BATCH_TOKENS:
            self._unclaimed = True
            return
        self._passed_over = self._full_owners()
        claimed = [] if self._looks_anywhere else self._claim(only_leased=True)
        if not claimed:
            # Perhaps the lane that the notification meant was released in the same moment.
            claimed = self._claim(only_leased=False)
            self._looks_anywhere = self._worker.more_waits
            left = self._worker.left_to_others
            self._look_at = time.monotonic() + PATIENCE_SECONDS if left else None
        if self._texts.begin(claimed):
            self.company_until = time.monotonic() + COMPANY_SECONDS
        self._scheduler.add(claimed)
        self._unclaimed = self._worker.more_waits

    def _full_owners(self) -> set[int]:
        """Owners of whom nothing more is claimed for now."""
        return self._texts.full_owners() | self._scheduler.full_owners()

    def _claim(self, *, only_leased: bool) -> list[Future]:
        return future_claim(
            worker=self._worker,
            max_futures=CLAIM_FUTURES,
            max_cost=CLAIM_BATCHES * settings.BATCH_TOKENS,
            passed_over=self._passed_over,
            only_leased=only_leased,
        )
