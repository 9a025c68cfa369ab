"""Chat templates as families of models have them, and tokenizers of each kind, made in the process.

The templates are written from the documented structure of each family, shortened to what decides
which tokens there are: trimming, the text before and after an answer, the end of the
prompt, the treatment of earlier thoughts. None is a copy of a model's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ("hello", "world", "assistant", "user", "system", "what", "is", "it", "yes", "no")


@dataclass(frozen=True)
class Family:
    """One template, and its tokenizer's special tokens."""

    template: str
    special_tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    has_system: bool = True
    strips_after: tuple[str, ...] = ()
    """Special tokens that take in the white space behind them, as Phi-3's do."""
    stop: str | None = None
    """The token that ends an answer, if it is not the end token."""
    think: tuple[str, ...] = ()
    """Added tokens that are not special."""


def for_messages(body: str, prompt: str, before: str = "") -> str:
    """A template that writes each message, and then the beginning of an answer."""
    return (
        f"{before}{{% for m in messages %}}{body}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


_REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)

FAMILIES = {
    "chatml": Family(
        for_messages(
            "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
            "{{ '<|im_start|>assistant\n' }}",
        ),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "llama-2": Family(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = none %}"
        "{% set turns = messages %}{% endif %}{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.first and system is not none %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
        "{% else %}{% set content = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        eos="</s>",
        bos="<s>",
    ),
    "llama-3": Family(
        for_messages(
            "{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
            " + m.content | trim + '<|eot_id|>' %}"
            "{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}",
            "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
        ),
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        stop="<|eot_id|>",
    ),
    "mistral-v3": Family(
        _REFUSES_SYSTEM + "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        bos="<s>",
        has_system=False,
    ),
    "mistral-v7": Family(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        eos="</s>",
        bos="<s>",
    ),
    "gemma": Family(
        for_messages(
            "{% set role = 'model' if m.role == 'assistant' else m.role %}"
            "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}",
            "{{ '<start_of_turn>model\n' }}",
            before="{{ bos_token }}" + _REFUSES_SYSTEM,
        ),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        bos="<bos>",
        has_system=False,
        stop="<end_of_turn>",
    ),
    "phi-3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        eos="<|endoftext|>",
        strips_after=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        stop="<|end|>",
    ),
    "phi-4": Family(
        for_messages(
            "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}",
            "{{ '<|im_start|>assistant<|im_sep|>' }}",
        ),
        ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        eos="<|endoftext|>",
        stop="<|im_end|>",
    ),
    "qwen-3": Family(
        "{% set ns = namespace(last=-1) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set thought = m.reasoning_content or '' %}{% set content = m.content %}"
        "{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        think=("<think>", "</think>"),
    ),
    "zephyr": Family(
        for_messages(
            "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}",
            "{{ '<|assistant|>\n' }}",
        ),
        ("<s>", "</s>"),
        eos="</s>",
        bos="<s>",
    ),
    "command-r": Family(
        for_messages(
            "{% set who = {'user': 'USER', 'assistant': 'CHATBOT'}[m.role] | default('SYSTEM') %}"
            "{{ '<|START_OF_TURN_TOKEN|><|' + who + '_TOKEN|>' + m.content.strip()"
            " + '<|END_OF_TURN_TOKEN|>' }}",
            "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}",
            before="{{ bos_token }}",
        ),
        (
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "glm-4": Family(
        for_messages(
            "{% set role = 'observation' if m.role == 'tool' else m.role %}"
            "{{ '<|' + role + '|>\n' + m.content }}",
            "{{ '<|assistant|>\n' }}",
            before="{{ '[gMASK]<sop>' }}",
        ),
        (
            "<|endoftext|>",
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
        ),
        eos="<|endoftext|>",
        stop="<|user|>",
    ),
    "harmony": Family(
        "{{ '<|start|>system<|message|>You are a model.<|end|>' }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% if loop.last and m.thinking %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
        "{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% elif m.role != 'system' %}"
        "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|start|>developer<|message|>' + m.content + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        eos="<|return|>",
    ),
}

DEEPSEEK_R1 = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1]"
    " + '<|end_of_sentence|>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
    eos="<|end_of_sentence|>",
    bos="<|begin_of_sentence|>",
    think=("<think>", "</think>"),
)
"""Its prompt begins a thought that no conversation has, so trained answers cannot follow it."""

NO_END = Family(
    for_messages("{{ m.role + ': ' + m.content + '\n' }}", "{{ 'assistant: ' }}"),
    ("<s>", "</s>"),
    eos="</s>",
    bos="<s>",
)
"""Nothing ends an answer."""


# -- tokenizers ------------------------------------------------------------------------------------


def _merges(words: Sequence[str], first: str) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for word in words:
        left = first
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
    return merges


def _vocab(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def byte_level(special: Sequence[str]) -> Tokenizer:
    """Like GPT-2: the last of several line breaks is a separate token, except at the end."""
    merges = [*_merges(WORDS, "Ġ"), ("Ċ", "Ċ"), ("Ċ", "Ġ"), (":", ")"), ("ĊĊ", "Ċ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = _vocab([*special, *alphabet, *(left + right for left, right in merges)])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_llama_3(special: Sequence[str]) -> Tokenizer:
    """Like Llama 3 and Qwen: all line breaks in a row are one word."""
    tokenizer = byte_level(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


_SP_DECODER = (
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
)
_UNKNOWN: dict[str, Any] = {"unk_token": "<unk>"}
_ASCII = [chr(code) for code in range(33, 127)]


def _sentencepiece(special: Sequence[str]) -> Tokenizer:
    merges = [*_merges(WORDS, "▁"), ("▁", "▁")]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    joined = [left + right for left, right in merges]
    vocab = _vocab(["<unk>", *special, *bytes_, "▁", *_ASCII, *joined])
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, **_UNKNOWN)
    )
    tokenizer.decoder = decoders.Sequence(list(_SP_DECODER))
    return tokenizer


def sentencepiece(special: Sequence[str]) -> Tokenizer:
    """Like Llama 2 and Mistral 7B: every text between special tokens gets a space."""
    tokenizer = _sentencepiece(special)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def sentencepiece_first(special: Sequence[str]) -> Tokenizer:
    """The later form: only the very first word gets a space."""
    tokenizer = _sentencepiece(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    return tokenizer


def gemma_like(special: Sequence[str]) -> Tokenizer:
    """Spaces are replaced and none is added."""
    tokenizer = _sentencepiece(special)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(list(_SP_DECODER[:3]))
    return tokenizer


def unigram(special: Sequence[str]) -> Tokenizer:
    """Unigram pieces over words that carry their space."""
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in special), ("▁", -3.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(char, -4.0) for char in ["\n", *_ASCII] if char not in ("▁",)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [("\n\n", -3.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(list(_SP_DECODER))
    return tokenizer


def wordpiece(special: Sequence[str]) -> Tokenizer:
    """Like BERT: an unknown word is one unknown token."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", *special, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece(_vocab(pieces), **_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


TOKENIZERS: dict[str, Callable[[Sequence[str]], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level-llama-3": byte_level_llama_3,
    "sentencepiece": sentencepiece,
    "sentencepiece-first": sentencepiece_first,
    "gemma-like": gemma_like,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


@cache
def make_tokenizer(kind: str, family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind with this family's special tokens and template."""
    tokenizer = TOKENIZERS[kind](family.special_tokens)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=token in family.strips_after)
            for token in family.special_tokens
        ]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.think])
    if family.bos is not None:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.eos,
        bos_token=family.bos,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = family.template
    return fast
