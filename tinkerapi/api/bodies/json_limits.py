"""Limits of JSON's nesting and number of values, checked before it is decoded.

A decoder makes an object of every value. An empty list is three bytes of text and 64 of memory, so
a body within the byte limit can take a gigabyte, and so can a compressed one of a few
kilobytes. The scan reads brackets, quotes and commas only, in parts and with numpy, which
costs a few hundredths of the decoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.errors import LimitExceeded

MAX_DEPTH = 32
"""Lists and objects inside each other; no dialect needs ten."""
MAX_CONTAINERS = 2**20
"""Lists and objects in one body; a full request of 1,024 datums has about 15,000."""
MAX_VALUES = 2**23
"""Values in one body, those of lists and objects together."""

_PIECE_BYTES = 256 * 1024  # its temporary arrays stay in the processor's cache

_OTHER_THAN_BACKSLASH = re.compile(rb"[^\\]")
_OPEN, _CLOSE, _QUOTE, _COMMA, _BACKSLASH = b'[]",\\'
_FOLD = 0xDF
"""Maps { to [ and } to ], and no other byte to either."""


class _Place(NamedTuple):
    """The state of the scan."""

    depth: int = 0
    in_string: bool = False
    containers: int = 0
    commas: int = 0


def check_json_size(body: bytes) -> None:
    """Refuse JSON that would take far more memory than its bytes, or that nests too deep.

    The decoder checks whether it is JSON at all; this may accept text that is not.

    Raises:
        LimitExceeded: (400)
    """
    has_few_values = len(body) <= MAX_VALUES  # each has at least a comma or a bracket
    if has_few_values and body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    commas = _scan(body, exactly=False).commas
    if commas > MAX_VALUES:  # or that many commas in texts
        commas = _scan(body, exactly=True).commas
    if commas > MAX_VALUES:
        raise LimitExceeded(
            f"The body holds more than {MAX_VALUES} values, which is this server's limit; send the "
            "data in several requests."
        )


def outermost(body: bytes, quotes: Iterable[int]) -> list[int]:
    """The quotation marks, in ascending order, that open a text of the outermost object.

    If the body is not JSON, its brackets and quotation marks are interpreted as far as possible.
    """
    found = []
    place, begin = _Place(), 0
    for at in quotes:
        while begin < at:
            end = _end_of_piece(body, begin, at)
            place = _scan_piece(body[begin:end], place, exactly=False, max_depth=len(body))
            begin = end
        if place.depth == 1 and not place.in_string:
            found.append(at)
    return found


def _scan(body: bytes, *, exactly: bool) -> _Place:
    """The state at the end; ``exactly`` does not count the commas in texts."""
    place, begin = _Place(), 0
    while begin < len(body):
        end = _end_of_piece(body, begin, len(body))
        place = _scan_piece(body[begin:end], place, exactly=exactly)
        if place.containers > MAX_CONTAINERS:
            raise LimitExceeded(
                f"The body holds more than {MAX_CONTAINERS} lists and objects, which is this "
                "server's limit; send the data in several requests."
            )
        begin = end
    return place


def _end_of_piece(body: bytes, begin: int, stop: int) -> int:
    """An end after a byte that is no backslash, so that no escape sequence is cut, or ``stop`` if
    there is none before it."""
    end = min(begin + _PIECE_BYTES, stop)
    if body[end - 1] != _BACKSLASH:
        return end
    found = _OTHER_THAN_BACKSLASH.search(body, end, stop)
    return stop if found is None else found.end()


def _scan_piece(
    piece: bytes, place: _Place, *, exactly: bool, max_depth: int | None = None
) -> _Place:
    data = np.frombuffer(piece, np.uint8)
    is_quote = data == _QUOTE
    quoted = np.flatnonzero(is_quote)
    # Index -1 is the part's last byte; neither it nor the byte before it is a backslash.
    is_escaped = data[quoted - 1] == _BACKSLASH
    if is_escaped.any():
        if (data[quoted[is_escaped] - 2] == _BACKSLASH).any():
            # Backslashes come in pairs, except one that escapes another character.
            plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
            return _scan_piece(plain, place, exactly=exactly, max_depth=max_depth)
        is_quote[quoted[is_escaped]] = False
    folded = data & _FOLD
    is_comma = data == _COMMA
    if exactly:
        is_comma &= ~_inside(is_quote, place.in_string)
    commas = place.commas + int(np.count_nonzero(is_comma))
    marks = np.flatnonzero((folded == _OPEN) | (folded == _CLOSE) | is_quote)
    if not marks.size:
        return place._replace(commas=commas)
    quotes, kinds = is_quote[marks], folded[marks]
    outside = ~_inside(quotes, place.in_string)
    opens = (kinds == _OPEN) & outside
    closes = (kinds == _CLOSE) & outside
    depths = np.cumsum(opens.astype(np.int32) - closes) + place.depth
    if int(depths.max()) > (MAX_DEPTH if max_depth is None else max_depth):
        raise LimitExceeded(
            f"The body nests lists and objects more than {MAX_DEPTH} deep, which is this server's "
            "limit."
        )
    return _Place(
        depth=int(depths[-1]),
        in_string=place.in_string ^ bool(np.count_nonzero(quotes) % 2),
        containers=place.containers + int(np.count_nonzero(opens)),
        commas=commas,
    )


def _inside(is_quote: NDArray[np.bool_], in_string: bool) -> NDArray[np.bool_]:
    """(n,) whether each byte is in a text, its opening quote included, its closing quote not."""
    inside: NDArray[np.bool_] = np.logical_xor.accumulate(is_quote)
    return ~inside if in_string else inside
