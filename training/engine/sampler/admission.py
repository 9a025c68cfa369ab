"""Decides which jobs may be sampled at all, and which waiting job starts next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from training.engine.interface import BaseModelInfo, SampleJob
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.sequence import ActiveRequest
from training.errors import InvalidRequest, LimitExceeded


class Admission:
    """Waiting jobs; each starts when the cache and the decode pass have room for all of it.

    Groups share the room; within a group the order is that of submission.
    """

    def __init__(
        self,
        info: BaseModelInfo,
        cache: KvCache,
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
        self._cache = cache
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
        # The room for each sequence in an empty cache.
        cached = self._cache.tokens_each(job.num_samples) - len(job.prompt) + 1
        if asked is None:
            asked = max(min(room, cached, self._max_tokens_limit or room), 1)
        max_tokens = min(room, asked)
        if max(max_tokens, 1) > cached:
            raise LimitExceeded(
                f"{job.num_samples} sequences of {len(job.prompt)} prompt and {max_tokens} sampled "
                f"tokens are more than the {self._cache.capacity_tokens} tokens that this server "
                "holds for sampling: ask for fewer samples or a smaller max_tokens"
            )
        return max_tokens

    def add(self, request: ActiveRequest) -> None:
        """Add a request to the waiting ones."""
        self._waiting.append(request)

    def remove(self, key: str) -> None:
        """Remove the request of this key, if it waits."""
        self._waiting = deque(request for request in self._waiting if request.key != key)

    def start(self, under_way: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """Take the requests that may start now; each has its region of the cache.

        The next is the oldest of the group with the fewest running sequences and, among such
        groups, of the one that has waited longest. If it does not fit, no other starts before it,
        so that a large one also gets its turn.
        """
        started = Counter[str]()
        for request in under_way:
            started[request.job.group] += request.job.num_samples
        starting: list[ActiveRequest] = []
        while self._waiting and started.total() < self._max_sequences:
            request = min(
                self._waiting,
                key=lambda r: (started[r.job.group], self._last_started.get(r.job.group, 0)),
            )
            num_samples = request.job.num_samples
            if started.total() + num_samples > self._max_sequences:
                break
            request.region = self._cache.reserve(num_samples, request.rows_each)
            if request.region is None:
                break
            started[request.job.group] += num_samples
            self._num_started += 1
            self._last_started[request.job.group] = self._num_started
            self._waiting.remove(request)
            starting.append(request)
        return starting
