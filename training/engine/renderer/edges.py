"""Tokenizes a text so that a token ends wherever a prompt ends.

A conversation is tokenized as a whole, as the model's own template intends. Sampling, however,
reads only the prompt's tokens. Almost always the tokens of the whole begin with them. If they do
not (a reply that begins with white space, which the tokenizer joins with the header's newline), the
text is cut there, so that the trained tokens are tokens that sampling can produce.
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
    """(T, 2): each token's range of characters, its first and the one after its last."""


@dataclass(frozen=True)
class EdgedTokens(TextTokens):
    """Tokens of which one ends wherever a prompt ends."""

    edges: list[int]
    """The number of tokens before each edge, which are the tokens of the text up to it."""
    cuts: list[int]
    """The edges, in characters, at which the text was cut."""


def tokenize_with_edges(
    tokenize: Callable[[str], TextTokens],
    text: str,
    edges: Sequence[int],
    *,
    is_added: Callable[[int], bool],
) -> EdgedTokens:
    """The tokens of ``text``; those before each edge are the tokens of the text before it.

    Args:
        edges: The number of characters before each end of a prompt, in order.
        is_added: Whether a token is an added one. The text after it is tokenized
            independently, so only the text since the last one is tokenized again.
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
    """The number of a part's tokens that are the tokens of its text up to ``edge``; None if they
    differ."""
    num_begun = int(np.searchsorted(piece.offsets[:, 0], edge - start))
    anchor = num_begun - 1
    while anchor > 0 and not is_added(piece.ids[anchor]):
        anchor -= 1
    anchor = max(anchor, 0)
    first = int(piece.offsets[anchor, 0]) if anchor else 0
    head = tokenize(text[start + first : edge]).ids
    end = anchor + len(head)
    return end if piece.ids[anchor:end] == head else None
