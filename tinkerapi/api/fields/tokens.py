"""Token ids in a request body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from django.conf import settings
from numpy.typing import NDArray

from tinkerapi.api.fields.refusals import refuse
from training.errors import InvalidDatum, LimitExceeded

MAX_TOKEN_ID = 2**31 - 1


def check_token_list(value: Any, where: str) -> NDArray[np.int32]:
    """(N,) token ids from a list of at least one.

    Raises:
        InvalidDatum: It is not such a list; the message names the first wrong item. (400)
        LimitExceeded: More tokens than one sequence may have. (400)
    """
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of token ids", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty")
    check_num_tokens(len(value), where)
    return token_array(value, where, dtype=np.int32)


def check_num_tokens(number: int, where: str) -> None:
    """Refuse more tokens than one sequence may have. Raises LimitExceeded."""
    if number > settings.MAX_DATUM_TOKENS:
        raise LimitExceeded(
            f"{where}: {number} tokens; this server takes {settings.MAX_DATUM_TOKENS} in one"
            " sequence"
        )


def token_array(
    values: list[Any],
    where: str,
    width: int | None = None,
    *,
    dtype: type[np.signedinteger[Any]] = np.int64,
) -> NDArray[Any]:
    """(N,) token ids; booleans do not count as numbers here.

    Args:
        width: The width of the original rows, so that an error names row and column.
    """
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) > MAX_TOKEN_ID:
        refuse_first(
            values,
            lambda item: type(item) is int and 0 <= item <= MAX_TOKEN_ID,
            f"a token id (a whole number from 0 to {MAX_TOKEN_ID})",
            where,
            width,
        )
    return np.array(values, dtype)


def refuse_first(
    values: list[Any],
    is_good: Callable[[Any], bool],
    expected: str,
    where: str,
    width: int | None,
) -> NoReturn:
    """Raise InvalidDatum for the first invalid value; ``width`` as above."""
    index = next(index for index, item in enumerate(values) if not is_good(item))
    place = f"[{index}]" if width is None else f"[{index // width}][{index % width}]"
    raise refuse_datum(f"{where}{place}", expected, values[index])


def refuse_datum(where: str, expected: str, value: object) -> InvalidDatum:
    """The error for a value of the wrong kind in training data or a prompt."""
    return InvalidDatum(str(refuse(where, expected, value)))
