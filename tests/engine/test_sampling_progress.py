"""The text reported during sampling is always a beginning of the final text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_model import VOCAB_SIZE
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.renderer.streamed_text import TextSoFar
from training.engine.sampler.stop_strings import StopWatch
from training.engine.torch.base_model import BaseModel


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@given(
    text=st.text(alphabet="aé€😀", max_size=60),
    stops=st.lists(st.text(alphabet="aé€😀", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=100)
def test_nothing_of_a_stop_string_is_told_before_it_is_known_not_to_be_one(
    text: str, stops: list[str]
) -> None:
    watch = StopWatch(decode, stops)
    tokens: list[int] = []
    told = [""]
    for token in text.encode():
        tokens.append(token)
        stopped = watch.has_stopped(tokens)
        told.append(watch.certain_text)
        if stopped:
            break
    final = decode(tokens) if watch.text_before_stop is None else watch.text_before_stop
    assert all(later.startswith(earlier) for earlier, later in pairwise(told))
    assert final.startswith(told[-1])
    if watch.text_before_stop is None:
        assert len(final) - len(told[-1]) < max(map(len, stops))


@given(
    tokens=st.lists(
        st.one_of(st.text(alphabet="aé€😀").map(str.encode), st.binary(max_size=5)), max_size=30
    ).map(b"".join),
    looks=st.sets(st.integers(0, 200), max_size=8),
)
@settings(max_examples=100)
def test_whenever_one_looks_the_text_so_far_is_a_beginning_of_the_text(
    tokens: bytes, looks: set[int]
) -> None:
    so_far = TextSoFar(decode)
    for count in [*sorted(look for look in looks if look < len(tokens)), len(tokens)]:
        told = so_far.read(list(tokens[:count]))
        assert decode(tokens).startswith(told)
    assert decode(tokens).rstrip("\ufffd") == told.rstrip("\ufffd")


def test_each_token_has_its_own_text_and_its_place(tied_base_model: BaseModel) -> None:
    text = ChatRenderer(tied_base_model.tokenizer, VOCAB_SIZE)
    said = "aé€😀 b"
    tokens = [*text.encode(said), *text.end_token_ids[:1]]
    placed = text.token_texts(tokens)

    assert [token.offset for token in placed] == [
        len(text.decode(tokens[:count]).rstrip("\ufffd")) for count in range(len(tokens))
    ]
    for own, offset, _ in placed[:-1]:
        assert "\ufffd" in own or said[offset:].startswith(own)
    assert b"".join(token.utf8 or b"?" for token in placed[:-1]) == said.encode()
    assert placed[-1].text == tied_base_model.tokenizer.convert_ids_to_tokens(tokens[-1])
