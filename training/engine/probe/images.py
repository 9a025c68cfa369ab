"""The check, at every start, that the engine reads images as transformers does.

The unmodified model computes one sequence with an image, alone. Then the engine computes it beside
a text, and by parts over its cache. A model whose images the engine does not compute rightly (say,
because their tokens see each other in both directions) still serves text.
"""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor
from transformers import PreTrainedModel

from training.engine.error_text import error_text
from training.engine.probe.comparison import logprob_difference, tolerance
from training.engine.probe.passes import PackedPasses, PaddedPasses, ProbePasses
from training.engine.probe.stock_answers import Passage, StockAnswers
from training.engine.renderer.images.reader import ImageReader
from training.engine.torch.base_model import BaseModel
from training.engine.torch.out_of_memory import is_out_of_memory
from training.engine.torch.packing.stream import Segment
from training.images import Image, PlacedImage
from training.types import TokenIds

logger = logging.getLogger(__name__)

SIZE = (60, 44)
"""Pixels of the image; processors make it larger if they have to."""

BEFORE, AFTER = 5, 9
"""Tokens of text around it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StockImage:
    """A sequence with an image, as the unmodified model computes it."""

    passage: Passage
    logprobs: Tensor
    """(n, V) float32"""


def ask_stock_image(
    model: PreTrainedModel, reader: ImageReader, *, vocab_size: int, context_tokens: int
) -> StockImage | str:
    """The unmodified model's results, or the reason why it reads no images."""
    try:
        return _ask(model, reader, vocab_size, context_tokens)
    except Exception as error:  # a model's own code may raise everything
        if is_out_of_memory(error):
            raise
        logger.warning("an image cannot be computed", exc_info=error)
        what = error_text(error)
        return f"transformers itself cannot compute an image with this base model ({what})"


def _ask(
    model: PreTrainedModel, reader: ImageReader, vocab_size: int, context_tokens: int
) -> StockImage | str:
    if _sees_both_ways(model):
        return (
            "the tokens of an image see each other in both directions in this base model's family, "
            "which this server does not compute; send the request without images"
        )
    if reader.image_token_id >= vocab_size:
        return "the token that stands for images is outside this base model's vocabulary"
    image = _drawn()
    read = reader.read(image)
    text = np.random.default_rng(0).integers(0, vocab_size, BEFORE + AFTER).astype(np.int32)
    text[text == reader.image_token_id] = 0
    tokens: TokenIds = np.concatenate([text[:BEFORE], read.tokens, text[BEFORE:]])
    if len(tokens) > context_tokens:
        return (
            f"an image is {len(read.tokens)} tokens of this base model, and it reads at most "
            f"{context_tokens}"
        )
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    kinds = (ids == reader.image_token_id).int()[None]
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(model.device)
        for name, value in read.inputs.items()
        if name in accepted
    }
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in accepted:
            inputs[name] = kinds
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False, **inputs).logits[0]
    placed = PlacedImage(image=image, start=BEFORE, num_tokens=len(read.tokens))
    passage = Passage(
        tokens=ids,
        first_position=0,
        sequence_tokens=len(ids),
        whole=tokens,
        images=(placed,),
    )
    return StockImage(passage=passage, logprobs=logits.float().log_softmax(-1))


BOTH_WAYS = re.compile(r"(?<!mm_)token_type_ids|block_sequence_ids|bidirectional")
"""What the code of such families has: arguments from which they make the mask."""


def _sees_both_ways(model: PreTrainedModel) -> bool:
    """Whether the attention among an image's tokens is not causal.

    A comparison of results would not do: in bfloat16 the difference may be within rounding.
    """
    return (
        BOTH_WAYS.search(inspect.getsource(inspect.getmodule(type(model)) or type(model)))
        is not None
    )


def image_fault(
    base_model: BaseModel, stock: StockAnswers, image: StockImage, *, num_layers: int
) -> str | None:
    """Why the engine's results for the image are not the unmodified model's; None if they are."""
    passes: ProbePasses = (
        PaddedPasses(base_model)
        if base_model.is_padded
        else PackedPasses(base_model, num_layers=num_layers)
    )
    passages = [stock.longest, image.passage]
    num_rows = sum(len(passage.tokens) for passage in passages)
    try:
        with torch.no_grad():
            beside = passes.beside(passages, Segment(start=0, end=num_rows, weights=None))
            cached = passes.cached(passages, None)
    except Exception as error:  # a model's own code may raise everything
        if is_out_of_memory(error):
            raise
        logger.warning("an image cannot be computed", exc_info=error)
        return f"this server cannot compute this base model's images ({error_text(error)})"
    for what, answers in (("beside a text", beside), ("over a cache", cached)):
        worst = logprob_difference(answers[1], image.logprobs, base_model.dtype)
        if not worst <= tolerance(base_model.dtype):  # NaN too
            return (
                f"this server does not compute this base model's images rightly: {what}, "
                f"log-probabilities differ by {worst:.2g} nats from stock transformers"
            )
    return None


def _drawn() -> Image:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    file = BytesIO()
    Pictures.fromarray(pixels).resize(SIZE, Pictures.Resampling.NEAREST).save(file, "png")
    return Image(data=file.getvalue(), format="png")
