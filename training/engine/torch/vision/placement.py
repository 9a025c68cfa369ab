"""The images of a pass: which rows of the stream are features, and at which positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.engine.torch.to_device import to_device
from training.engine.torch.vision.tower import Features, VisionTower
from training.images import PlacedImage


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRows:
    """Some tokens of one sequence with images, at their rows of a stream."""

    tokens: NDArray[np.int32]
    """(T,) the whole sequence's."""
    images: Sequence[PlacedImage]
    start: int
    """The first token that is in the stream."""
    rows: NDArray[np.int64]
    """(n,) the rows of tokens ``start`` to ``start + n``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRows:
    """The rows of a stream that are image features."""

    rows: Tensor
    """(m,) int64, ascending."""
    features: Tensor
    """(m, C)"""
    later: Sequence[Tensor]
    """(m, C) each; see ``Features.later``."""

    def moved(self, place_of: Tensor) -> ImageRows | None:
        """Those of the rows (T,) that have a place, which is not negative, in order of it."""
        places = place_of[self.rows]
        chosen = places.argsort()[int((places < 0).sum()) :]
        if not len(chosen):
            return None
        return ImageRows(
            rows=places[chosen],
            features=self.features[chosen],
            later=[each[chosen] for each in self.later],
        )


def place(
    tower: VisionTower | None, sequences: Iterable[SequenceRows], position_ids: Tensor
) -> tuple[ImageRows | None, Tensor]:
    """The image rows of a pass, and its positions.

    Args:
        tower: None for a model that reads no images.
        sequences: Those with images; the others keep their positions.
        position_ids: (T,) int64, each row's place in its own sequence.

    Returns:
        None if no row is of an image; and the positions (A, T) if tokens have several axes, (T,) if
        not.
    """
    if tower is None:
        return None, position_ids
    rows: list[NDArray[np.int64]] = []
    found: list[Features] = []
    numbers: list[NDArray[np.int64]] = []
    for sequence in sequences:
        end = sequence.start + len(sequence.rows)
        if tower.has_own_positions:
            position_ids = _with_own_positions(tower, sequence, position_ids)
        for placed in sequence.images:
            own = tower.is_feature(sequence.tokens[placed.start : placed.end])
            places = np.flatnonzero(own) + placed.start
            here = np.flatnonzero((places >= sequence.start) & (places < end))
            if len(here):
                rows.append(sequence.rows[places[here] - sequence.start])
                numbers.append(here)
                found.append(tower.features(placed.image))
    if not found:
        return None, position_ids
    # Datums that share a prefix share its rows.
    unique, first = np.unique(np.concatenate(rows), return_index=True)

    def gathered(of: Callable[[Features], Tensor]) -> Tensor:
        device = position_ids.device
        parts = [
            of(features).index_select(0, to_device(n, device))
            for features, n in zip(found, numbers, strict=True)
        ]
        return torch.cat(parts).index_select(0, to_device(first, device))

    image_rows = ImageRows(
        rows=to_device(unique, position_ids.device),
        features=gathered(lambda features: features.rows),
        later=[
            gathered(lambda features, n=n: features.later[n])  # type: ignore[misc]
            for n in range(len(found[0].later))
        ],
    )
    return image_rows, position_ids


def _with_own_positions(tower: VisionTower, sequence: SequenceRows, position_ids: Tensor) -> Tensor:
    own = tower.position_ids(sequence.tokens, sequence.images)  # (A, T)
    if position_ids.ndim == 1:
        position_ids = position_ids.expand(len(own), -1).clone()
    rows = to_device(sequence.rows, position_ids.device)
    stop = sequence.start + len(sequence.rows)
    position_ids[:, rows] = to_device(own[:, sequence.start : stop], position_ids.device)
    return position_ids
