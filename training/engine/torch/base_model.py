"""The frozen base model: a transformers causal LM whose layers support packed streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from training.base_model_config import PADDED
from training.engine.interface import BaseModelInfo
from training.engine.torch.adapters import AdapterTensors, LoraShape
from training.engine.torch.attention.sequences import SequenceAttention
from training.engine.torch.experts.stacks import ExpertStack
from training.engine.torch.frozen_products import times_transposed
from training.engine.torch.logit_shape import LogitShape
from training.engine.torch.lora_linear import (
    common_rows,
    even_rank,
    missing_rows,
    row_parts,
    times,
)
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import (
    MIN_ROWS,
    ContextHolder,
    KeptInputs,
    PackedContext,
    PassContext,
    Segment,
    SingleContext,
    fewest_rows,
    join,
    rows_of,
)
from training.engine.torch.padded.grid import Longest, gather_rows, make_grids
from training.engine.torch.sharding.rank_group import RankGroup
from training.engine.torch.vision.placement import ImageRows
from training.engine.torch.vision.tower import VisionTower
from training.errors import InvalidRequest
from training.images import NO_IMAGES, PlacedImage
from training.types import TokenIds

ENOUGH_ROWS = 512
"""On a CPU a product's time for a row falls no further (measured with oneDNN, AVX-512 and AMX)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """One frozen model and its tokenizer. ``loading.load_base_model`` makes it."""

    info: BaseModelInfo
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    end_token_ids: tuple[int, ...]
    """The end tokens of the model's generation configuration."""
    model_type: str
    """transformers' name of its family."""
    head_name: str
    """The output head's module name, which keys adapter layouts like any other module's."""
    head_weight: Tensor
    """(V, C); the embedding matrix itself if the two are tied."""
    head_bias: Tensor | None
    logit_shape: LogitShape
    rotary_switch: int | None
    """Longer sequences have other rotary factors (``rotary``), and ``PackedContext`` must mark
    their rows; None: all have the same."""
    linear_shapes: dict[str, LoraShape]
    """Every module that can have an adapter, the head last; of a stack of experts each linear
    layer of an expert, for all of them together."""
    expert_stacks: dict[str, ExpertStack]
    """By name; their layers are among ``linear_shapes``."""
    stock_attention: str
    """The name of transformers' own attention for this model."""
    holder: ContextHolder
    """The current pass, for the model's layers."""
    can_recompute: bool
    """Whether its layers can compute their activations again in the backward pass."""
    _decoder: nn.Module
    vision: VisionTower | None = None
    """None for a model that reads no images."""
    image_fault: str | None = None
    """Why a model with a vision tower reads none."""
    reads_chunks: bool = True
    """Whether the padded layout may read a prompt in parts: some families' caches are wrong
    then."""
    shared_tokens: int = 0
    """On a CPU, the longest rectangle of the padded layout that several requests share."""
    group: RankGroup | None = None
    """The ranks over which it is sharded; None: all of it is in this process."""

    @property
    def is_padded(self) -> bool:
        """Whether its decoder computes rectangles of sequences and not packed streams."""
        return self.info.layout == PADDED

    @property
    def collects_weights(self) -> bool:
        """Whether the weights of a layer are collected from all ranks while it is computed, and are
        not whole here otherwise."""
        return self.group is not None and not self.group.splits_layers

    @property
    def divides_passes(self) -> bool:
        """Whether the ranks of its group compute different sequences of a pass. In the padded
        layout the number of rectangles would differ, so there each computes all."""
        return self.collects_weights and not self.is_padded

    @property
    def adds_head_gradient(self) -> bool:
        """Whether this process adds the gradient of the head's adapter: once, if all ranks compute
        the whole head."""
        return self.group is None or not self.group.splits_layers or self.group.is_first

    @cached_property
    def chunk_tokens(self) -> int:
        """The longest chunk of which recurrent layers compute whole ones, even for a shorter
        sequence. Gated delta layers do not name theirs, of 64 tokens."""
        sizes = (getattr(module, "chunk_size", None) for module in self._decoder.modules())
        return max([64, *(size for size in sizes if type(size) is int)])

    def sequence_states(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        segments: Sequence[Segment],
        row_ranges: Sequence[RowRange],
        is_long: Tensor | None = None,
        images: ImageRows | None = None,
        *,
        recomputes: bool = False,
    ) -> Tensor:
        """Run whole sequences through all layers, in the layout of the base model.

        Args:
            tokens: (T,) int64 on the model's device.
            position_ids: (T,) int64, each token's position in its own sequence; (A, T) if they
                have A axes.
            segments: The adapters of the T rows. Rows outside of them are padding.
            row_ranges: The sequences, in order. Only packed ones may share rows.
            is_long: See ``PackedContext``.
            images: The rows that are image features.
            recomputes: Whether layers keep only their input for the backward pass.

        Returns:
            (T, C), the input of the output head.
        """
        if self.is_padded:
            return self._padded_states(
                tokens, position_ids, segments, row_ranges, is_long, images, recomputes=recomputes
            )
        context = PackedContext(
            segments=segments,
            attention=SequenceAttention(
                row_ranges, team=self.holder.team, keeps_outputs=recomputes
            ),
            is_long=is_long,
            kept_inputs=KeptInputs() if recomputes else None,
        )
        return self.hidden_states(tokens, position_ids, context, images)

    def shares_rectangle(self, length: int) -> bool:
        """Whether several requests share a rectangle of this padded length: on a CPU, if that keeps
        the bits of each."""
        if self.device.type != "cpu":
            return True
        # Matrix kernels sum the rows left over from whole blocks in another order.
        is_whole = length % MIN_ROWS == 0
        return is_whole and self.fewest_rows <= length <= self.shared_tokens

    @property
    def enough_rows(self) -> int | None:
        """The rows of a pass beside which others gain nothing from more; None if they always gain:
        on a GPU, where each of many experts gets some of the rows, and where each pass collects
        the weights."""
        if self.device.type != "cpu" or self.is_padded or self.expert_stacks or self.group:
            return None
        return ENOUGH_ROWS

    @cached_property
    def fewest_rows(self) -> int:
        """The least rows of a pass for which their number does not affect any row's bits."""
        smallest = min(s.in_features * s.out_features for s in self.linear_shapes.values())
        if self.group is not None and self.group.splits_layers:
            smallest //= self.group.size  # this rank's part of a matrix
        return fewest_rows(self.device, self.dtype, smallest)

    def _padded_states(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        segments: Sequence[Segment],
        row_ranges: Sequence[RowRange],
        is_long: Tensor | None,
        images: ImageRows | None,
        *,
        recomputes: bool,
    ) -> Tensor:
        grids = make_grids(
            row_ranges,
            segments,
            longest=Longest(
                sequence=self.info.max_context_tokens, with_short_rotary=self.rotary_switch
            ),
            is_long=is_long,
            device=self.device,
            is_shared=self.shares_rectangle,
        )
        outputs = []
        for grid in grids:
            kept = KeptInputs() if recomputes else None
            context = PassContext(segments=grid.segments, kept_inputs=kept)
            positions = grid.positions(position_ids, longest=self.info.max_context_tokens)
            own_images = None if images is None else images.moved(grid.place_of(len(tokens)))
            hidden, _ = self.grid_states(grid.spread(tokens), positions, context, images=own_images)
            outputs.append(hidden)
        return gather_rows(outputs, grids, len(tokens))  # (T, C)

    def grid_states(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        context: PassContext | SingleContext,
        *,
        images: ImageRows | None = None,
        caches: bool = False,
        cache: Any = None,
    ) -> tuple[Tensor, Any]:
        """Run B sequences, or their next tokens, through all layers, in the padded layout.

        Args:
            tokens: (B, L) int64 on the model's device.
            position_ids: (B, L) int64; (A, B, L) if they have A axes.
            images: Those among the B * L tokens.
            context: The segments of a ``PassContext`` are of the B * L tokens.
            caches: Whether to make or continue a cache.
            cache: The result of the call for the tokens before; None if there are none.

        Returns:
            (B * L, C), and transformers' cache of the tokens so far, or None.
        """
        with self.holder.active(context):
            output = self._decoder(
                **({"input_ids": tokens} if images is None else self._inputs(tokens, images)),
                position_ids=position_ids,
                use_cache=caches,
                **({} if cache is None else {"cache": cache}),
            )
        return output.last_hidden_state.flatten(0, 1), output.cache if caches else None

    def hidden_states(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        context: PackedContext,
        images: ImageRows | None = None,
    ) -> Tensor:
        """Run the stream through all layers, in the packed layout.

        Records a backward pass if gradients are enabled and a segment wants one; the backward
        pass needs no context.

        Args:
            tokens: (T,) int64 on the model's device.
            position_ids: (T,) int64, each token's position in its own sequence; (A, T) if they
                have A axes.
            context: Its segments cover the T rows.
            images: The rows that are image features.

        Returns:
            (T, C), the input of the output head.
        """
        with self.holder.active(context):
            output = self._decoder(
                **(
                    {"input_ids": tokens[None]}
                    if images is None
                    else self._inputs(tokens[None], images)
                ),
                position_ids=position_ids[..., None, :],  # (1, T) or (A, 1, T)
                use_cache=False,
                packed_context=context,
            )
        hidden: Tensor = output.last_hidden_state[0]  # (T, C)
        return hidden

    def _inputs(self, tokens: Tensor, images: ImageRows) -> dict[str, Any]:
        """The decoder's inputs for tokens (B, L) with images: embeddings (B, L, C) instead."""
        embedded: Tensor = self._decoder.get_input_embeddings()(tokens)  # type: ignore[operator]
        rows = embedded.flatten(0, 1).index_copy(0, images.rows, images.features)
        inputs: dict[str, Any] = {"inputs_embeds": rows.view_as(embedded)}
        if images.later:
            is_image = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device)
            is_image[images.rows] = True
            inputs["visual_pos_masks"] = is_image.view_as(tokens)
            inputs["deepstack_visual_embeds"] = list(images.later)
        return inputs

    def skipped_positions(self, tokens: TokenIds, images: Sequence[PlacedImage]) -> int:
        """The difference between the rotary position of the token after these and their number.

        Raises:
            InvalidRequest: The base model reads no images.
        """
        if self.vision is None:
            raise InvalidRequest(f"prompt: {self.image_fault or NO_IMAGES}")
        return int(self.vision.position_ids(tokens, images).max()) + 1 - len(tokens)

    def frozen_tensors(self) -> list[Tensor]:
        """Its weights, and the other tensors that all passes read."""
        held = [*self._decoder.parameters(), *self._decoder.buffers()]
        own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in held]
        own.append(self.head_weight)
        return own if self.head_bias is None else [*own, self.head_bias]

    def report_progress(self, to: Callable[[], None]) -> None:
        """Call ``to`` at every layer of every pass."""
        self.holder.on_progress = to
        if self.vision is not None:
            self.vision.on_image = to

    def logits(self, hidden: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Next-token logits of some rows.

        The caller chooses rows and their number: the result is (rows x vocabulary).

        Args:
            hidden: (n, C) rows of ``hidden_states``' result.
            segments: Cover 0..n; they give the weights of the head's adapter for each row.

        Returns:
            (n, V) float32.
        """
        num_rows = len(hidden)
        padded = pad(hidden, (0, 0, 0, missing_rows(hidden, self.head_weight)))
        team = self.holder.team
        parts = row_parts(team, padded)
        if len(parts) == 1:
            output = times_transposed(padded, self.head_weight, self.head_bias, team=team)
            logits = output[:num_rows].float()  # (n, V)
            self._add_update(logits, hidden, segments, slice(0, num_rows))
            return self.logit_shape.shape(logits)
        logits = hidden.new_empty(len(padded), len(self.head_weight), dtype=torch.float32)

        def compute(part: slice) -> None:
            logits[part] = times_transposed(padded[part], self.head_weight, self.head_bias)
            self._add_update(logits, hidden, segments, part)

        team.run([partial(compute, part) for part in parts])
        return self.logit_shape.shape(logits[:num_rows])

    def _add_update(
        self, logits: Tensor, hidden: Tensor, segments: Sequence[Segment], part: slice
    ) -> None:
        """Add to some rows of the logits (n, V) what the head's adapters add."""
        for group in join(segments):
            weights, rows = group[0].weights, common_rows(rows_of(group), part)
            pair = self.head_pair(weights)
            if weights is not None and pair is not None:
                a, b = even_rank(*pair)
                xa = times(hidden[rows], a.T)  # (n', R')
                logits[rows].add_(times(xa, b.T), alpha=weights.layout.scale)

    def own_weights(self, module: str) -> Tensor | None:
        """The frozen weights of the output head or of an embedding; None for other modules."""
        if module == self.head_name:
            return self.head_weight
        for name, found in self._decoder.named_modules():
            if isinstance(found, nn.Embedding) and f".{module}".endswith(f".{name}"):
                return found.weight
        return None

    def head_pair(self, weights: AdapterTensors | None) -> tuple[Tensor, Tensor] | None:
        """The head's A (R, C) and B (V, R) in the model's dtype, if the adapter has one."""
        return None if weights is None else weights.pair(self.head_name, self.dtype)
