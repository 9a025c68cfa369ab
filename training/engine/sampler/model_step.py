"""One packed pass over the base model for sampling, shared by prefill and decode.

A pass computes every row on its own. Where kernels would not do that, its rows are padded until
they do. On a CPU a job's log-probabilities then have the same bits with any batch-mates, and those
of training (``attention.arithmetic`` is the other condition). A GPU chooses its matrix kernels by
the number of rows, so there the last bits may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.row_padding import RowPadding
from training.engine.torch.attention.interface import Attention
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.stream import PackedContext, Segment
from training.engine.torch.to_device import to_device
from training.engine.torch.vision.placement import SequenceRows, place


class ModelStep:
    """A base model and the cache beside it."""

    def __init__(self, base_model: BaseModel, cache: KvCache) -> None:
        self.base_model = base_model
        self.cache = cache
        self.padding = RowPadding(base_model)

    def hidden_states(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        segments: Sequence[Segment],
        attention: Attention,
        lengths: Sequence[int],
        images: Sequence[SequenceRows] = (),
    ) -> Tensor:
        """(T, H) of T rows, each a token at its position in its sequence, whose lengths are
        given.

        Args:
            images: The sequences with images.
        """
        device = self.base_model.device
        switch = self.base_model.rotary_switch
        is_long = None
        if switch is not None and max(lengths) > switch:
            is_long = to_device([length > switch for length in lengths], device)
        image_rows, position_ids = place(
            self.base_model.vision, images, to_device(positions, device)
        )
        return self.base_model.hidden_states(
            to_device(tokens, device, torch.int64),
            position_ids,
            PackedContext(segments=segments, attention=attention, is_long=is_long),
            image_rows,
        )
