"""Decides which jobs may be sampled at all, and which one starts, or continues, next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from training.engine.interface import BaseModelInfo, SampleJob
from training.engine.sampler.model_runner import ModelRunner
from training.engine.sampler.sequence import ActiveRequest
from training.errors import InvalidRequest, LimitExceeded


class Admission:
    """Waiting jobs; each starts when the runner and the decode pass have room for it.

    Groups share the room; within a group the order is that of submission, and sequences that were
    preempted come before jobs that have not started.
    """

    def __init__(
        self,
        info: BaseModelInfo,
        runner: ModelRunner,
        *,
        max_sequences: int,
        max_tokens_limit: int | None,
    ) -> None:
        """
        Args:
            max_sequences: Sequences decoded at one time.
            max_tokens_limit: Most tokens of a job without ``max_tokens``.
        """
        self._info = info
        self._runner = runner
        self._max_sequences = max_sequences
        self._max_tokens_limit = max_tokens_limit
        self._waiting: deque[ActiveRequest] = deque()
        self._num_started = 0
        self._last_started: dict[str, int] = {}
        """Group to the number, among all jobs, of its last started job."""

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(self._waiting)

    def max_tokens(self, job: SampleJob) -> int:
        """Tokens that each sequence may sample: never more than fit into the context.

        Raises:
            InvalidRequest: ``max_tokens`` is less than 0, or ``num_samples`` less than 1.
            LimitExceeded: The job needs more than can ever run at one time.
        """
        if job.num_samples < 1:
            raise InvalidRequest(f"num_samples: {job.num_samples} is less than 1")
        if job.num_samples > self._max_sequences:
            raise LimitExceeded(
                f"num_samples: {job.num_samples} is more than the {self._max_sequences} sequences "
                "that this server samples at one time"
            )
        asked = job.sampling_params.max_tokens
        if asked is not None and asked < 0:
            raise InvalidRequest(f"max_tokens: {asked} is less than 0")
        room = self._info.max_context_tokens - len(job.prompt)
        most = self._runner.most_tokens(job.num_samples)
        cached = most - len(job.prompt) + 1  # the last token of a sequence is never read
        if asked is None:
            asked = max(min(room, cached, self._max_tokens_limit or room), 1)
        max_tokens = min(room, asked)
        if max(max_tokens, 1) > cached:
            raise LimitExceeded(
                f"{job.num_samples} sequences of {len(job.prompt)} prompt and {max_tokens} sampled "
                f"tokens can never be held: this server's key-value cache has room for {most} "
                "tokens of each"
                + (
                    f", so max_tokens can be at most {cached} after this prompt"
                    if cached > 0
                    else ", fewer than the prompt has"
                )
            )
        return max_tokens

    def add(self, request: ActiveRequest) -> None:
        """Add a request to the waiting ones."""
        self._waiting.append(request)

    def remove(self, key: str) -> None:
        """Remove the request of this key, if it waits."""
        self._waiting = deque(request for request in self._waiting if request.key != key)

    def start(self, running: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """Start the requests that may start now, and resume the sequences that may continue.

        The next is the oldest of the group with the fewest running sequences and, among such
        groups, of the one that has waited longest. If it does not fit, no other starts before it,
        so that a large one also gets its turn.
        """
        preempted = [(request, sequence) for request in running for sequence in request.preempted]
        if not preempted and not self._waiting:
            return []
        count = Counter[str]()
        for request in running:
            num_unfinished = sum(1 for _ in request.unfinished())
            count[request.job.group] += num_unfinished - len(request.preempted)
        starting: list[ActiveRequest] = []
        while count.total() < self._max_sequences:
            candidates = [*preempted, *((request, None) for request in self._waiting)]
            if not candidates:
                break
            request, sequence = min(
                candidates,
                key=lambda each: (
                    count[each[0].job.group],
                    self._last_started.get(each[0].job.group, 0),
                ),
            )
            group, number = request.job.group, self._num_started + 1
            size = request.job.num_samples if sequence is None else 1
            if count.total() + size > self._max_sequences:
                break
            if sequence is None:
                if not self._runner.start(request):
                    break
                request.number = number
                self._waiting.remove(request)
                starting.append(request)
            else:
                if not self._runner.resume(request, sequence):
                    break
                preempted.remove((request, sequence))
            count[group] += size
            self._num_started = self._last_started[group] = number
        return starting
