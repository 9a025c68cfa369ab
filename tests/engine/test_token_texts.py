"""A single token has its text, its offset and its bytes, for every kind of vocabulary."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_model import make_tokenizer
from training.engine.renderer.token_texts import TokenTexts


def texts_of(tokenizer: PreTrainedTokenizerFast) -> TokenTexts:
    return TokenTexts(tokenizer, neutral=tokenizer.encode("a", add_special_tokens=False)[-1:])


TEXTS = ["aé€😀 b", " two  spaces", "\ufffd is a character too", "e\u0301", "日本語"]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece: words, and bytes for unknown characters."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁b"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=[("▁", "b")], unk_token="<unk>", byte_fallback=True)  # noqa: S106
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")  # noqa: S106


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_byte_level_tokens_add_up(text: str) -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    same, placed = texts_of(tokenizer).of_prompt(tokens, text)

    assert same == text
    assert b"".join(token.utf8 or b"?" for token in placed) == text.encode()
    # Bytes, characters: both say where a token begins.
    for token, at in zip(placed, range(len(tokens)), strict=True):
        begun = text.encode()[:at].decode(errors="ignore")
        assert token.offset == len(begun)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_vocabulary_with_byte_fallback_add_up(text: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    _, placed = texts_of(tokenizer).of_prompt(tokens, text)

    # Such a vocabulary adds a space at the beginning of every text.
    assert b"".join(token.utf8 or b"?" for token in placed) == f" {text}".encode()
    assert all(text[token.offset :].startswith("b") for token in placed if token.text == " b"[1:])


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_of_tokens_has_the_text_that_they_decode_to(text: str) -> None:
    tokenizer = make_tokenizer()
    start = tokenizer.bos_token_id
    tokens = [start, *tokenizer.encode(text, add_special_tokens=False)]
    decoded, placed = texts_of(tokenizer).of_prompt(tokens)

    assert decoded == tokenizer.bos_token + text  # special tokens are written out
    assert placed[0].text == tokenizer.bos_token
    assert placed[1].offset == len(tokenizer.bos_token)
    _, of_text = texts_of(tokenizer).of_prompt(tokens, text)  # one token before all text
    assert [token.offset for token in of_text[:2]] == [0, 0]
    if "\ufffd" in text:  # as tokens come one by one, this one looks like an unfinished character
        return
    assert [token.offset + len(tokenizer.bos_token) for token in of_text[1:]] == [
        token.offset for token in placed[1:]
    ]
