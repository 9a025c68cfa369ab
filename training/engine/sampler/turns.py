"""Which users' requests take part in the next pass, so that none waits for another's long contexts.

All sequences share a decode pass while that costs little. But a pass over 16 sequences of 4,000
tokens takes many times as long as one over a short sample, which would wait for them at every
token. So each user has an account of the keys that passes have read for them, and one whose
keys take longer than the base model's own work waits while the account is far above another's.

Prompts are read a chunk at a time, and users take turns in being the first of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.engine.sampler.sequence import ActiveRequest

SLACK_KEYS = 8192
"""How many more keys may have been read for one user than for another before that one waits."""


class Turns:
    """The accounts of the users who have something to read or to decode."""

    def __init__(self) -> None:
        self._accounts: dict[str, float] = {}
        self._num_reading = 0
        self._last_first: dict[str, int] = {}
        """User to the number of the last pass that read theirs first."""

    def decoding(
        self, requests: Sequence[ActiveRequest], *, pass_keys: float
    ) -> list[ActiveRequest]:
        """Those of the requests that take part in the next decode pass; their users pay for it.

        Args:
            pass_keys: The keys that could be read in the time that a pass over the base model takes
                by itself; the users pay for them together.
        """
        keys: dict[str, int] = {}
        for request in requests:
            size = sum(request.length(sequence) for sequence in request.decodable())
            keys[request.job.group] = keys.get(request.job.group, 0) + size
        if len(keys) < 2:
            self._accounts.clear()
            return list(requests)
        # Absence earns nothing: whoever comes begins with the least of those present.
        present = [self._accounts[group] for group in keys if group in self._accounts]
        start = min(present, default=0.0)
        self._accounts = {group: self._accounts.get(group, start) for group in keys}
        most = min(self._accounts.values()) + SLACK_KEYS
        taking = [
            group
            for group, account in self._accounts.items()
            if account <= most or keys[group] <= pass_keys
        ]
        for group in taking:
            self._accounts[group] += keys[group] + pass_keys / len(taking)
        return [request for request in requests if request.job.group in taking]

    def reading(self, requests: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """The requests in the order in which the next pass reads as much as fits: those of the user
        who has waited longest to be the first, prompts before sequences that are read again."""
        ordered = sorted(
            requests, key=lambda r: (self._last_first.get(r.job.group, 0), r.is_prefilled)
        )
        self._num_reading += 1
        groups = {request.job.group for request in requests}
        self._last_first = {g: n for g, n in self._last_first.items() if g in groups}
        self._last_first[ordered[0].job.group] = self._num_reading
        return ordered
