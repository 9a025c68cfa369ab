"""Checks of ``loss_fn_inputs``, after a dialect has made arrays of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinkerapi.api.fields.tokens import MAX_TOKEN_ID
from training.errors import InvalidDatum
from training.loss_fns import FLOAT_INPUTS, TARGET_TOKENS
from training.types import wrong_length

Array = NDArray[Any]

NO_INPUTS = "is empty; send the loss's inputs, such as target_tokens and weights"


def check_input(name: str, array: Array, where: str, *, num_tokens: int | None) -> Array:
    """A loss fn input in the dtype that ``training.types`` requires.

    Inputs that losses read as float32 may be sent as integers. Inputs that no built-in loss reads
    are
    unchanged: a custom loss may read them, or the engine refuses them.

    Args:
        num_tokens: The datum's tokens; None if the engine has to compare the lengths.

    Raises:
        InvalidDatum: Wrong dtype or length, invalid token ids, or not finite. (400)
    """
    if name == TARGET_TOKENS:
        if array.dtype.kind != "i":
            raise InvalidDatum(f"{where}: {array.dtype} values instead of token ids")
        check_token_ids(array, where)
        array = array.astype(np.int64, copy=False)
    elif array.dtype.kind == "f" or name in FLOAT_INPUTS:
        array = array.astype(np.float32, copy=False)
        finite = np.isfinite(array)
        if not finite.all():
            index = _first(~finite)
            raise InvalidDatum(f"{where}{_subscript(index)}: {array[index]} is not finite")
    is_per_token = name == TARGET_TOKENS or name in FLOAT_INPUTS
    if is_per_token and num_tokens is not None and len(array) != num_tokens:
        raise InvalidDatum(f"{where}: {wrong_length(array, num_tokens)}")
    return array


def check_token_ids(array: Array, where: str) -> None:
    """Refuse ids that no vocabulary has; the engine checks the actual vocabulary."""
    if array.size and (array.min() < 0 or array.max() > MAX_TOKEN_ID):
        index = _first((array < 0) | (array > MAX_TOKEN_ID))
        raise InvalidDatum(f"{where}{_subscript(index)}: {array[index]} is not a token id")


def _first(is_wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(is_wrong.argmax()), is_wrong.shape))


def _subscript(index: tuple[int, ...]) -> str:
    return "".join(f"[{i}]" for i in index)
