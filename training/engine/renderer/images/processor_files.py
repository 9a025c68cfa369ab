"""Loads a model folder's processor: images to pixels, and to the tokens that stand for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import transformers
from transformers import AutoImageProcessor, PreTrainedConfig, ProcessorMixin
from transformers.models.auto import processing_auto
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def load_processor(
    path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> ProcessorMixin:
    """The processor of a folder, without its parts for video and sound.

    transformers' own loading needs torchvision for many models, only for their videos. Images are
    processed by Pillow on every machine, so that their pixels have the same bits
    everywhere.

    Raises:
        Exception: It cannot be loaded.
    """
    cls = processor_class(vars(processing_auto)["PROCESSOR_MAPPING_NAMES"][config.model_type])
    settings, _ = cls.get_processor_dict(path)
    parts: dict[str, Any] = {
        "image_processor": AutoImageProcessor.from_pretrained(
            path, backend="pil", trust_remote_code=False
        ),
        "tokenizer": tokenizer,
    }
    arguments = [parts.get(name) for name in cls.get_attributes()]
    with _parts_may_be_missing():
        processor: ProcessorMixin = cls.from_args_and_dict(arguments, settings)
    return processor


def processor_class(name: str) -> Any:
    """A processor's class, also where torchvision is missing.

    transformers' namespace then has only a dummy of a class that it ties to torchvision, and one
    module (Pixtral's) imports a function from a module for torchvision, although the one for Pillow
    has the same function.
    """
    module = "transformers." + vars(transformers)["_class_to_module"][name]
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    family = module.rpartition(".processing_")
    for_pillow = import_module(f"{family[0]}.image_processing_pil_{family[2]}")
    sys.modules[f"{family[0]}.image_processing_{family[2]}"] = for_pillow
    return getattr(import_module(module), name)


@contextmanager
def _parts_may_be_missing() -> Iterator[None]:
    """Let processors be made without a video processor, whose class needs torchvision."""
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        yield
