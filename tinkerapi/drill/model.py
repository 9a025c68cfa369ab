"""A Llama of a few thousand parameters, written without torch: the base model of the drill and of
the test suite.

The drill's is wide enough that a pass uses the same matrix kernels as a real model's. Its weights
are large enough that its predictions are far from uniform, so that a wrong gradient shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
LAYERS, HEADS, KEY_HEADS = 2, 4, 2
CONTEXT_TOKENS = 512
TOKENIZER_SETTINGS = {
    "unk_token": SPECIAL_TOKENS[0],
    "bos_token": SPECIAL_TOKENS[1],
    "eos_token": SPECIAL_TOKENS[2],
    "pad_token": SPECIAL_TOKENS[2],
    "model_max_length": CONTEXT_TOKENS,
    "clean_up_tokenization_spaces": False,
}
ADAPTER_CACHE_BYTES = 2_000_000
"""Room for the largest of a drill's adapters and some others, not for all: they come and go."""


def chat_template(before_first: str = "") -> str:
    """ChatML; ``before_first`` is the template's text before the first message is written."""
    return (
        "{% for message in messages %}"
        + before_first
        + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: token = byte, after the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def make_tiny_model(
    directory: Path,
    *,
    seed: int,
    hidden: int = 64,
    spread: float = 0.2,
    tied: bool = True,
    template: str | None = None,
) -> Path:
    """Write config, tokenizer (its tokens are the bytes) and weights; return ``directory``.

    Args:
        directory: Made if missing.
        seed: Equal seeds give equal files.
        hidden: Width of the residual stream, a multiple of ``HEADS``.
        spread: Standard deviation of the weights.
        tied: Whether the output head is the embedding matrix.
        template: The chat template; None means ``chat_template()``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": hidden // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **TOKENIZER_SETTINGS,
        "chat_template": template or chat_template(),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    weights = _weights(np.random.default_rng(seed), hidden, spread, tied=tied)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _weights(
    rng: np.random.Generator, hidden: int, spread: float, *, tied: bool
) -> dict[str, np.ndarray]:
    def draw(rows: int, columns: int) -> np.ndarray:
        return (spread * rng.standard_normal((rows, columns))).astype(np.float32)

    norm = np.ones(hidden, np.float32)
    keys = KEY_HEADS * hidden // HEADS
    weights = {"model.embed_tokens.weight": draw(VOCAB_SIZE, hidden), "model.norm.weight": norm}
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (2 * hidden, hidden),
            "mlp.up_proj": (2 * hidden, hidden),
            "mlp.down_proj": (hidden, 2 * hidden),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = norm
    return weights if tied else {**weights, "lm_head.weight": draw(VOCAB_SIZE, hidden)}
