"""Tiny random models with a vision tower, and processors for them, made without a hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engine.families import small_config
from tests.tiny_model import VOCAB_SIZE, make_tokenizer

MARKS = {
    "llava": ["<image>"],
    "mistral3": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "glm46v": ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"],
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}
"""The special tokens of a family; the first stands for an image's features."""

IMAGE_TOKEN = VOCAB_SIZE
"""Its id: it is the first that is added to the tiny tokenizer."""

PROCESSOR_CLASSES = {
    "llava": "LlavaProcessor",
    "mistral3": "PixtralProcessor",
    "gemma3": "Gemma3Processor",
    "glm46v": "Glm46VProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
}

Image = tuple[str, dict[str, Any], dict[str, Any]]
"""An image processor's family and settings, and the processor's own settings."""

PATCHES: Image = (
    "qwen2_vl",
    {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}},
    {},
)
PROCESSORS: dict[str, Image] = {
    "llava": (
        "clip",
        {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}},
        {
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "mistral3": (
        "pixtral",
        {"size": {"longest_edge": 24}, "patch_size": 4},
        {"patch_size": 4, "spatial_merge_size": 2},
    ),
    "gemma3": ("gemma3", {"size": {"height": 16, "width": 16}}, {"image_seq_length": 4}),
    "glm46v": ("glm46v", PATCHES[1], {}),
    "qwen2_5_vl": PATCHES,
    "qwen3_vl": PATCHES,
    "qwen3_5": PATCHES,
}

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
EYES: dict[str, Any] = {**TINY, "num_attention_heads": 2, "patch_size": 4, "initializer_range": 0.3}
DEEP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "initializer_range": 0.3,
}
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
"""Heads that are wide enough for three axes, and layers enough for one of each kind."""

TEXT = {"vocab_size": VOCAB_SIZE + 8}


def vision_config(model_type: str) -> PretrainedConfig:
    """A tiny configuration of a family."""
    return CONFIGS[model_type](model_type)


def _text(text_type: str, **changes: Any) -> dict[str, Any]:
    config = small_config(text_type, **TEXT, **changes).to_dict()
    return {"model_type": text_type, **config}


def _llava(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](
        vision_config={"model_type": "clip_vision_model", **EYES, "image_size": 8},
        text_config=_text("llama"),
        image_token_id=IMAGE_TOKEN,
    )


def _mistral3(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](
        vision_config={"model_type": "pixtral", **EYES, "image_size": 24, "head_dim": 8},
        text_config=_text("mistral", sliding_window=None),
        spatial_merge_size=2,
        image_token_id=IMAGE_TOKEN,
    )


def _gemma3(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](
        vision_config={"model_type": "siglip_vision_model", **EYES, "image_size": 16},
        text_config=_text("gemma3_text"),
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        boi_token_index=IMAGE_TOKEN + 1,
        eoi_token_index=IMAGE_TOKEN + 2,
    )


def _many_axes(text_type: str, **eyes: Any) -> Callable[[str], PretrainedConfig]:
    def make(model_type: str) -> PretrainedConfig:
        return CONFIG_MAPPING[model_type](
            vision_config={**DEEP, **eyes},
            text_config=_text(text_type, **WIDE),
            image_token_id=IMAGE_TOKEN,
            video_token_id=IMAGE_TOKEN + 1,
            image_start_token_id=IMAGE_TOKEN + 2,
            image_end_token_id=IMAGE_TOKEN + 3,
            vision_start_token_id=IMAGE_TOKEN + 2,
            vision_end_token_id=IMAGE_TOKEN + 3,
        )

    return make


CONFIGS: dict[str, Callable[[str], PretrainedConfig]] = {
    "llava": _llava,
    "mistral3": _mistral3,
    "gemma3": _gemma3,
    "glm46v": _many_axes("glm4v_text", image_size=32),
    "qwen2_5_vl": _many_axes("qwen2_5_vl_text", fullatt_block_indexes=[1], window_size=16),
    "qwen3_vl": _many_axes(
        "qwen3_vl_text", num_position_embeddings=64, deepstack_visual_indexes=[0, 1]
    ),
    "qwen3_5": _many_axes("qwen3_5_text", num_position_embeddings=64, deepstack_visual_indexes=[]),
}


def save_vision_model(model_type: str, folder: Path) -> str:
    """A model folder with seeded weights, the tiny tokenizer and a processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(vision_config(model_type))
        for parameter in model.parameters():  # a bias or a gate of zeros would hide itself
            if not parameter.any():
                parameter.data.normal_(std=0.1)
        model.save_pretrained(folder)
    marks = MARKS.get(model_type, MARKS["qwen"])
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    if model_type == "gemma3":
        names = dict(zip(("image_token", "boi_token", "eoi_token"), marks, strict=True))
        tokenizer.init_kwargs["extra_special_tokens"] = names
        tokenizer._set_model_specific_special_tokens(names)
    tokenizer.chat_template = chat_template(*_around(marks))
    tokenizer.save_pretrained(folder)
    family, settings, own = PROCESSORS[model_type]
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    name = next(n for n in vars(module) if n.endswith("ImageProcessorPil"))
    getattr(module, name)(**settings).save_pretrained(folder)
    own = {**own, "processor_class": PROCESSOR_CLASSES[model_type]}
    (folder / "processor_config.json").write_text(json.dumps(own))
    return str(folder)


def _around(marks: list[str]) -> tuple[str, str, str]:
    """What a chat template writes for an image: a mark before it, its own, and one after it."""
    if len(marks) == 4:
        return marks[2], marks[0], marks[3]
    return "", marks[1] if marks[0] == "<image_soft_token>" else marks[0], ""


def chat_template(before: str, own: str, after: str) -> str:
    """ChatML whose contents may be lists of parts."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ '{before}{own}{after}' }}}}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
