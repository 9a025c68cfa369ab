"""The suite's base model: the drill's, narrower, with a default system message in its template.

Its weights are drawn wide enough (0.3) that a test that confuses two positions, sequences or
adapters sees it.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tinkerapi.drill import model
from tinkerapi.drill.model import (
    CONTEXT_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZER_SETTINGS,
    VOCAB_SIZE,
    byte_tokenizer,
    chat_template,
)

__all__ = [
    "CONTEXT_TOKENS",
    "SPECIAL_TOKENS",
    "VOCAB_SIZE",
    "make_tiny_model",
    "make_tokenizer",
    "make_wide_model",
]

END_TOKEN = SPECIAL_TOKENS.index("<|im_end|>")
DEFAULT_SYSTEM_MESSAGE = "You are a tiny test model."

CHAT_TEMPLATE = chat_template(
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM_MESSAGE + "<|im_end|>\n' }}"
    "{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The drill's tokenizer (its tokens are bytes) with the template above."""
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **TOKENIZER_SETTINGS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(directory: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write a seeded model, 16 wide; see ``tinkerapi.drill.model``."""
    return model.make_tiny_model(
        directory, seed=seed, hidden=16, spread=0.3, tied=tied, template=CHAT_TEMPLATE
    )


def make_wide_model(directory: Path) -> Path:
    """Write a seeded model, 128 wide: the kernels of other programs need heads of 32."""
    return model.make_tiny_model(
        directory, seed=0, hidden=128, spread=0.1, tied=True, template=CHAT_TEMPLATE
    )
