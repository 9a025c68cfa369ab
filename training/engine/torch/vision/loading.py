"""Which model folders read images, and how they are loaded."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from training.engine.error_text import error_text
from training.engine.renderer.images.processor_files import load_processor
from training.engine.renderer.images.reader import ImageReader

logger = logging.getLogger(__name__)


def image_reader_of(
    path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ImageReader | None, str | None]:
    """The reader of a folder's images, or why a model with a vision tower has none.

    A chat template that only the processor has becomes the tokenizer's.
    """
    if not _has_vision(config):
        return None, None
    try:
        processor = load_processor(path, config, tokenizer)
        reader = ImageReader(processor, int(config.image_token_id))
    except Exception as error:  # other people's files
        logger.warning("%s: its image processor cannot be loaded", path, exc_info=error)
        what = error_text(error)
        return None, f"this base model's folder has no image processor that can be loaded ({what})"
    if tokenizer.chat_template is None:
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    return reader, None


def model_class_of(config: PreTrainedConfig, reader: ImageReader | None) -> Any:
    """transformers' class for a folder: the language model alone, if there is such a class and
    nothing reads the images."""
    has_text_class = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not _has_vision(config) or (reader is None and has_text_class):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _has_vision(config: PreTrainedConfig) -> bool:
    return (
        config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and getattr(config, "vision_config", None) is not None
    )
