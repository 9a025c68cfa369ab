"""One model's processor: an image to its tokens, and to the inputs of the vision tower."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.renderer.images.decoding import decode
from training.errors import InvalidRequest
from training.images import Image

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""The processor's outputs about text. All others are about the image."""

OFFSETS = "text_replacement_offsets"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadImage:
    """An image as the model's processor sees it."""

    written: str
    """The text that stands for it in a conversation, in place of the template's mark."""
    tokens: NDArray[np.int32]
    """(n,) the image's own tokens, without the marks around it."""
    inputs: Mapping[str, NDArray[Any]]
    """The inputs of the vision tower: ``pixel_values`` and what describes them."""


class ImageReader:
    """Reads images for one model. Holds no state between calls, and can be pickled."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        """
        Args:
            processor: transformers' processor of the model.
            image_token_id: The token whose embedding an image feature replaces.
        """
        self._processor = processor
        self.image_token_id = image_token_id
        self.mark: str = processor.image_token
        """What a chat template writes for an image."""
        others = ("image_break_token_id", "image_end_token_id")
        self._own = [image_token_id, *(getattr(processor, name, -1) for name in others)]

    def __getstate__(self) -> dict[str, Any]:
        """The processor's class comes first: another process may have to be told how to import
        it."""
        processor = (type(self._processor).__name__, pickle.dumps(self._processor))
        return {**vars(self), "_processor": processor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from training.engine.renderer.images.processor_files import processor_class

        name, processor = state["_processor"]
        processor_class(name)
        vars(self).update({**state, "_processor": pickle.loads(processor)})  # noqa: S301 - ours

    def read(self, image: Image) -> ReadImage:
        """Decode an image and process it.

        Raises:
            InvalidRequest: It cannot be decoded or processed, or is not as many tokens as
                its sender expects.
        """
        picture = decode(image)
        try:
            batch = self._processor(
                images=[picture],
                text=[self.mark],
                add_special_tokens=False,
                return_text_replacement_offsets=True,
                return_tensors="np",
            )
        except Exception as error:  # such as an aspect ratio that it does not take
            what = " ".join(str(error).split())[:200]
            raise InvalidRequest(
                f"the model's processor refuses an image of {picture.width} x {picture.height} "
                f"pixels: {what}"
            ) from error
        tokens = np.asarray(batch["input_ids"][0], np.int32)
        own = np.flatnonzero(np.isin(tokens, self._own))
        if not len(own):
            raise InvalidRequest("the model's processor makes no token of it")
        tokens = tokens[own[0] : own[-1] + 1]
        expected = image.expected_tokens
        if expected is not None and expected != len(tokens):
            raise InvalidRequest(
                f"expected_tokens is {expected}, and the model's processor makes {len(tokens)} "
                f"tokens of this image of {picture.width} x {picture.height} pixels"
            )
        (written,) = (place["replacement"] for place in batch[OFFSETS][0])
        unused = (*TEXT_INPUTS, OFFSETS)
        inputs = {name: np.asarray(v) for name, v in batch.items() if name not in unused}
        return ReadImage(written=written, tokens=tokens, inputs=inputs)
