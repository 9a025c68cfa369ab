"""The drill's base model: a Llama of a few thousand parameters, written without torch.

It is wide enough that a pass uses the same matrix kernels as a real model's, and its weights are
large enough that its predictions are far from uniform, so that a wrong gradient shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_HEADS = 64, 128, 2, 4, 2
CONTEXT_TOKENS = 512
ADAPTER_CACHE_BYTES = 2_000_000
"""Room for the largest of a drill's adapters and some others, not for all: they come and go."""
SPREAD = 0.2  # standard deviation of the weights


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


def make_drill_model(directory: Path, *, seed: int) -> Path:
    """Write config, tokenizer (its tokens are the bytes) and weights; return ``directory``."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(directory)
    save_file(_weights(seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(rows: int, columns: int) -> np.ndarray:
        return (SPREAD * rng.standard_normal((rows, columns))).astype(np.float32)

    norm = np.ones(HIDDEN, np.float32)
    keys = KEY_HEADS * HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": draw(VOCAB_SIZE, HIDDEN), "model.norm.weight": norm}
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (keys, HIDDEN),
            "self_attn.v_proj": (keys, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = norm
    return weights


def _write_tokenizer(directory: Path) -> None:
    unknown, start, end = SPECIAL_TOKENS
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": unknown,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
