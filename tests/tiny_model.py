"""A transformer of a few thousand parameters in an ordinary model folder, made in the process.

Its tokenizer knows the 256 bytes and three special tokens, its chat template is ChatML with a
default system message: small, but of the same kind as the model that the server ships with.
Weights are drawn wide enough (0.3) that its predictions are far from uniform, so that a test
that confuses two positions, sequences or adapters sees it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinkerapi.drill.model import (
    CONTEXT_TOKENS,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    byte_tokenizer,
    chat_template,
)

__all__ = ["CONTEXT_TOKENS", "SPECIAL_TOKENS", "VOCAB_SIZE", "make_tiny_model", "make_tokenizer"]

END_TOKEN = SPECIAL_TOKENS.index("<|im_end|>")
DEFAULT_SYSTEM_MESSAGE = "You are a tiny test model."

CHAT_TEMPLATE = chat_template(
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM_MESSAGE + "<|im_end|>\n' }}"
    "{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The drill's tokenizer (its tokens are bytes) with the template above."""
    unknown, start, end = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(),
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(directory: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write a seeded Llama (2 layers, 4 query heads on 2 key heads, fp32) with its tokenizer.

    Args:
        directory: Made if missing.
        tied: Whether the output head is the embedding matrix.
        seed: Same seed, same weights; the process's random state is left alone.

    Returns:
        ``directory``, which ``from_pretrained`` loads.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=END_TOKEN,
        pad_token_id=END_TOKEN,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory
