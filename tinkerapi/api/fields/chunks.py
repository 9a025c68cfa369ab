"""A prompt or datum in chunks: token ids and images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinkerapi.api.fields.tokens import check_num_tokens
from training.errors import InvalidDatum
from training.images import Chunks, Image
from training.types import Datum, ImageDatum, LossFnInputs, TokenIds


def join_chunks(chunks: Sequence[NDArray[np.int32] | Image], where: str) -> TokenIds | Chunks:
    """The token ids of all chunks together; or the chunks, if one is an image.

    Raises:
        InvalidDatum: They hold nothing. (400)
        LimitExceeded: More tokens than one sequence may have, as far as they are known. (400)
    """
    arrays = [chunk for chunk in chunks if not isinstance(chunk, Image)]
    if len(arrays) < len(chunks):
        images = [chunk for chunk in chunks if isinstance(chunk, Image)]
        expected = sum(image.expected_tokens or 1 for image in images)
        check_num_tokens(sum(map(len, arrays)) + expected, where)
        return Chunks(chunks=tuple(chunks))
    tokens = arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, np.int32), *arrays])
    if not len(tokens):
        raise InvalidDatum(f"{where}: is empty")
    check_num_tokens(len(tokens), where)
    return tokens


def num_tokens_of(model_input: TokenIds | Chunks) -> int | None:
    """The number of tokens; None if only the model's processor knows that of an image."""
    return model_input.num_tokens if isinstance(model_input, Chunks) else len(model_input)


def datum_of(model_input: TokenIds | Chunks, inputs: LossFnInputs) -> Datum | ImageDatum:
    """A datum of either kind."""
    if isinstance(model_input, Chunks):
        return ImageDatum(model_input=model_input, loss_fn_inputs=inputs)
    return Datum(model_input=model_input, loss_fn_inputs=inputs)
