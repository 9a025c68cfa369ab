"""Which sequence gives up its blocks when the cache is full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from training.engine.sampler.block_pool import BlockPool
from training.engine.sampler.block_table import held_blocks
from training.engine.sampler.model_runner import Row
from training.engine.sampler.sequence import ActiveRequest


def choose_victim(
    requests: Iterable[ActiveRequest], pool: BlockPool, *, least_held: int = 0
) -> Row | None:
    """The youngest sequence of the group that holds the most blocks.

    Never the oldest of all: so at least one sequence can always continue, and ends some time.
    Sequences that are being read are left alone: soon they can be chosen, or have ended.

    Args:
        least_held: Only groups that hold more blocks than this.

    Returns:
        None if there is none.
    """
    rows = sorted(_placed(requests), key=_age)
    held = {group: held_by(group, (request for request, _ in rows)) for group in _groups(rows)}
    candidates = [
        (request, sequence)
        for request, sequence in rows[1:]
        if held[request.job.group] > least_held and sequence in list(request.decodable())
    ]
    if not candidates:
        return None
    return max(
        candidates,
        key=lambda row: (_frees_something(row, pool), held[row[0].job.group], _age(row)),
    )


def held_by(group: str, requests: Iterable[ActiveRequest]) -> int:
    """The blocks that a group's sequences hold."""
    return held_blocks(
        sequence.table
        for request, sequence in _placed(r for r in requests if r.job.group == group)
        if sequence.table is not None
    )


def _placed(requests: Iterable[ActiveRequest]) -> Iterator[Row]:
    for request in dict.fromkeys(requests):
        for sequence in request.sequences:
            if sequence.table is not None:
                yield request, sequence


def _groups(rows: Iterable[Row]) -> set[str]:
    return {request.job.group for request, _ in rows}


def _age(row: Row) -> tuple[int, int]:
    return row[0].number, row[1].number


def _frees_something(row: Row, pool: BlockPool) -> bool:
    table = row[1].table
    return table is not None and any(pool.num_users(block) == 1 for block in table.blocks)
