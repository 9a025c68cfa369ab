"""Divides the datums of a pass among ranks that compute different ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np

from training.engine.torch.packing.plan import PlannedJob
from training.loss_fns import CUSTOM

Shares = Sequence[Mapping[PlannedJob, range]]
"""By rank, the indices of each job's datums."""


def divide(jobs: Sequence[PlannedJob], num_ranks: int) -> Shares:
    """Each rank's datums: consecutive ones, since neighbours often share a prefix, with about the
    same number of tokens.

    The ranks of an adapter's datums depend on its own jobs only, so other adapters do not change
    the order of its sums. The datums of a client's own loss stay together on the first rank,
    because its cost is limited for all of them together.
    """
    shares: list[dict[PlannedJob, range]] = [{} for _ in range(num_ranks)]
    # Jobs of one datum each would otherwise all go to the first rank.
    next_rank = {p.job.adapter_name: crc32(p.job.adapter_name.encode()) for p in jobs}
    for planned in jobs:
        name = planned.job.adapter_name
        for part, own in enumerate(_parts(planned, num_ranks)):
            is_custom = planned.job.loss_fn == CUSTOM
            shares[0 if is_custom else (next_rank[name] + part) % num_ranks][planned] = own
        next_rank[name] += 1
    return shares


def _parts(planned: PlannedJob, num_ranks: int) -> list[range]:
    """The indices of each part; of a client's own loss there is one."""
    lengths = [len(datum.model_input) for datum in planned.job.data]
    if planned.job.loss_fn == CUSTOM:
        return [range(len(lengths))]
    ends = np.cumsum(lengths)
    middles = ends - np.asarray(lengths) / 2
    targets = ends[-1] * np.arange(1, num_ranks) / num_ranks
    cuts = np.searchsorted(middles, targets).tolist()
    return [range(*bounds) for bounds in pairwise([0, *cuts, len(lengths)])]
