"""The vision tower of a base model: images to rows that replace token embeddings.

The tower is frozen, and its features depend on the image alone, so each distinct image is computed
once in a pass and the newest are kept. Images are computed one by one: on a CPU the bits of an
image's features then do not depend on other images.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from training.engine.renderer.images.reader import ImageReader, ReadImage
from training.engine.torch.to_device import to_device
from training.images import Image, PlacedImage

KEPT_BYTES = 256 * 1024**2
"""Features kept for later passes: a prompt's images are trained and sampled several times."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the tower makes of one image."""

    rows: Tensor
    """(n, C) the embeddings of its n feature tokens, in the model's dtype."""
    later: tuple[Tensor, ...]
    """(n, C) each: added to the hidden states after the first layers (DeepStack)."""
    grid: Mapping[str, Tensor]
    """The inputs, without pixels, from which the model computes positions."""

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.rows, *self.later))


class VisionTower:
    """One base model's vision tower, with its projection to the language model."""

    def __init__(
        self, model: PreTrainedModel, reader: ImageReader, *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.reader = reader
        inner: Any = model.base_model
        self._model = inner
        head: Any = model.get_output_embeddings()
        self._device = head.weight.device
        self._dtype = head.weight.dtype
        self._accepted = inspect.signature(inner.get_image_features).parameters
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self.on_image: Callable[[], None] = lambda: None
        """Called after each image, so that many of them show progress."""

    @property
    def has_own_positions(self) -> bool:
        """Whether a token's rotary position has several axes (multimodal rotary embeddings)."""
        return hasattr(self._model, "get_rope_index")

    def features(self, image: Image) -> Features:
        """The image's features, computed or kept."""
        found = self._kept.pop(image.digest, None)
        if found is None:
            found = self._compute(self.reader.read(image))
            self.on_image()
        self._kept[image.digest] = found
        while sum(kept.num_bytes for kept in self._kept.values()) > self._kept_bytes:
            self._kept.popitem(last=False)
        return found

    def forget(self) -> None:
        """Drop all features."""
        self._kept.clear()

    def is_feature(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) which of an image's tokens a feature replaces; the others are line ends."""
        mask: NDArray[np.bool_] = tokens == self.reader.image_token_id
        return mask

    @torch.no_grad()
    def _compute(self, read: ReadImage) -> Features:
        inputs = {
            name: to_device(np.ascontiguousarray(value), self._device)
            for name, value in read.inputs.items()
        }
        given = {
            name: value.to(self._dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if name in self._accepted
        }
        output: Any = self._model.get_image_features(**given, return_dict=True)
        rows = _joined(output.pooler_output).to(self._dtype)
        later = getattr(output, "deepstack_features", None) or ()
        return Features(
            rows=rows,
            later=tuple(_joined(each).to(self._dtype) for each in later),
            grid={name: value for name, value in inputs.items() if name.endswith("_thw")},
        )

    def position_ids(self, tokens: NDArray[np.int32], images: Sequence[PlacedImage]) -> Tensor:
        """(A, T) the rotary positions of a sequence's tokens, on A axes; of the whole sequence."""
        numbers = torch.arange(len(tokens))
        if not images or not self.has_own_positions:
            return numbers[None]
        kinds = torch.zeros(1, len(tokens), dtype=torch.int32)
        for placed in images:
            kinds[0, placed.start : placed.end] = 1
        grids = [self.features(placed.image).grid for placed in images]
        joined = {name: torch.cat([grid[name].cpu() for grid in grids]) for name in grids[0]}
        positions: Tensor
        positions, _ = self._model.get_rope_index(
            torch.from_numpy(np.asarray(tokens, np.int64))[None], mm_token_type_ids=kinds, **joined
        )
        return positions[:, 0]


def _joined(rows: Any) -> Tensor:
    """(n, C) of one image's features, which families give as a list, a tuple or a batch of one."""
    if isinstance(rows, Tensor):
        return rows.flatten(0, -2)
    return torch.cat([each.flatten(0, -2) for each in rows])
