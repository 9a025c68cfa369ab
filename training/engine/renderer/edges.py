"""Tokens of a text that is sampled from its middle on: where a prompt ends, a token ends.

A conversation is tokenized whole, as the model's own template means it. Sampling however reads
the tokens of the prompt alone. Nearly always those are how the whole begins. Where they are not
(a reply that begins with white space, which melts into the header's newline), the text is cut
there, so that what is trained is what sampling can say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TextTokens:
    """T tokens of a text."""

    ids: list[int]
    offsets: NDArray[np.int64]
    """(T, 2): the characters that each token stands for, its first and the one after its last."""


@dataclass(frozen=True)
class EdgedTokens(TextTokens):
    """Tokens that begin anew wherever a prompt ends."""

    edges: list[int]
    """How many tokens there are before each edge: just those of the text up to it."""
    cuts: list[int]
    """The edges, in characters, at which the text had to be cut."""


def tokenize_with_edges(
    tokenize: Callable[[str], TextTokens],
    text: str,
    edges: Sequence[int],
    *,
    is_added: Callable[[int], bool],
) -> EdgedTokens:
    """The tokens of ``text``, of which those before each edge are the tokens of the text before it.

    Args:
        edges: Characters before each place where a prompt ends, in order.
        is_added: Whether a token stands by itself in any text. What comes after it is tokenized
            as if nothing were before, so only the text since the last such needs a second look.
    """
    ids: list[int] = []
    offsets: list[NDArray[np.int64]] = []
    counts: list[int] = []
    cuts: list[int] = []
    start, piece = 0, tokenize(text)
    for edge in edges:
        count = _tokens_before(tokenize, text, edge, start, piece, is_added)
        if count is None:
            head = tokenize(text[start:edge])
            ids += head.ids
            offsets.append(head.offsets + start)
            cuts.append(edge)
            start, piece, count = edge, tokenize(text[edge:]), 0
        counts.append(len(ids) + count)
    ids += piece.ids
    offsets.append(piece.offsets + start)
    return EdgedTokens(ids, np.concatenate(offsets), counts, cuts)


def _tokens_before(
    tokenize: Callable[[str], TextTokens],
    text: str,
    edge: int,
    start: int,
    piece: TextTokens,
    is_added: Callable[[int], bool],
) -> int | None:
    """How many of a piece's tokens are those of its text up to ``edge``; None if they differ."""
    num_begun = int(np.searchsorted(piece.offsets[:, 0], edge - start))
    anchor = num_begun - 1
    while anchor > 0 and not is_added(piece.ids[anchor]):
        anchor -= 1
    anchor = max(anchor, 0)
    first = int(piece.offsets[anchor, 0]) if anchor else 0
    head = tokenize(text[start + first : edge]).ids
    end = anchor + len(head)
    return end if piece.ids[anchor:end] == head else None
