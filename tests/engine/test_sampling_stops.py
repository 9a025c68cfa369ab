"""Stop strings are found in text that comes in pieces, as they would be in the whole text."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from training.engine.renderer.streamed_text import UNFINISHED, StreamedText
from training.engine.sampler.stop_strings import StopScanner, StopWatch

letters = st.text(alphabet="ab", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4)


def naive_find(text: str, stops: Sequence[str]) -> int | None:
    """Read the text letter by letter; where the longest stop string that ends first begins."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


def cut(text: str, lengths: Sequence[int]) -> list[str]:
    pieces = []
    for length in lengths:
        pieces.append(text[:length])
        text = text[length:]
    return [*pieces, text]


@given(text=letters, stops=stop_lists, lengths=st.lists(st.integers(0, 9)))
@settings(max_examples=150)
def test_the_scanner_finds_what_reading_the_whole_text_finds(
    text: str, stops: list[str], lengths: list[int]
) -> None:
    scanner = StopScanner(stops)
    found = None
    for piece in cut(text, lengths):
        found = scanner.find(piece)
        if found is not None:
            break
    assert found == naive_find(text, stops)


@given(stops=stop_lists, text=letters)
def test_the_scanner_stops_with_the_piece_that_completes_a_stop_string(
    stops: list[str], text: str
) -> None:
    scanner = StopScanner(stops)
    for length, letter in enumerate(text, start=1):
        found = scanner.find(letter)
        assert (found is not None) == any(stop in text[:length] for stop in stops)
        if found is not None:
            break


def decode(tokens: Sequence[int]) -> str:
    """A byte is a token; larger tokens are special and have no text."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


characters = st.text(alphabet="aé€😀\ufffd", max_size=12).map(lambda text: list(text.encode()))
any_tokens = st.lists(
    st.one_of(characters, st.lists(st.integers(0, 300), max_size=6)), max_size=8
).map(lambda parts: [token for part in parts for token in part])


@given(tokens=any_tokens)
@example(tokens=[0xFF] * 30 + list("😀".encode()))  # in its middle, no more is decoded at once
@settings(max_examples=150)
def test_streamed_pieces_are_the_whole_text_but_for_an_unfinished_end(tokens: list[int]) -> None:
    stream = StreamedText(decode)
    streamed = "".join(stream.next_piece(tokens[: n + 1]) for n in range(len(tokens)))
    whole = decode(tokens)
    assert whole.rstrip(UNFINISHED) == streamed.rstrip(UNFINISHED)
    assert whole.startswith(streamed)


@given(
    text=st.text(alphabet="aé€😀", max_size=60),
    stop=st.text(alphabet="aé€😀", min_size=1, max_size=3),
)
@settings(max_examples=150)
def test_a_sequence_stops_when_its_text_holds_the_stop_string(text: str, stop: str) -> None:
    watch = StopWatch(decode, [stop])
    tokens: list[int] = []
    for token in text.encode():
        tokens.append(token)
        if watch.has_stopped(tokens):
            break
    if stop in text:
        before = text[: text.index(stop)]
        assert decode(tokens) == before + stop
        assert watch.text_before_stop == before
    else:
        assert tokens == list(text.encode())
        assert watch.text_before_stop is None


def test_a_stop_string_after_bytes_that_never_become_a_character_is_found() -> None:
    watch = StopWatch(decode, ["stop"])
    tokens = [0xFF] * 80 + list(b"stop")
    assert not any(watch.has_stopped(tokens[:n]) for n in range(1, len(tokens)))
    assert watch.has_stopped(tokens)
    assert watch.text_before_stop == UNFINISHED * 80


SPECIAL = {256: "<|x|>", 257: "<|end|>"}
"""Tokens that ``decode`` leaves out."""

written_parts = st.lists(
    st.one_of(st.sampled_from(sorted(SPECIAL)), st.text(alphabet="<|x>aé€", max_size=4)), max_size=8
)


@given(
    parts=written_parts,
    stop=st.one_of(
        st.text(alphabet="<|x>aé€", min_size=1, max_size=3),
        st.sampled_from(["<|x|>", "<|end|>", "a<|x|>", "<|x|>é", "|><|"]),
    ),
)
@settings(max_examples=300)
def test_a_stop_string_may_name_special_tokens(parts: list[str | int], stop: str) -> None:
    """It is looked for in the text with them written out; the text given has none of them."""
    watch = StopWatch(decode, [stop], special_texts=SPECIAL)
    written = "".join(SPECIAL[part] if isinstance(part, int) else part for part in parts)
    told = [
        token for part in parts for token in ([part] if isinstance(part, int) else part.encode())
    ]
    stopped = next((n for n in range(1, len(told) + 1) if watch.has_stopped(told[:n])), None)
    assert (stopped is not None) == (stop in written)
    if stopped is not None:
        at, kept = 0, ""
        for part in parts:  # the text without special tokens, up to the stop string
            whole = SPECIAL[part] if isinstance(part, int) else part
            if not isinstance(part, int):
                kept += part[: max(0, written.index(stop) - at)]
            at += len(whole)
        assert watch.text_before_stop == kept
    else:
        assert decode(told).startswith(watch.certain_text)


def test_long_text_is_not_decoded_from_the_start_again() -> None:
    longest = 0

    def measured(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    stream = StreamedText(measured)
    tokens = list(b"word " * 200)
    for n in range(len(tokens)):
        stream.next_piece(tokens[: n + 1])
    assert longest < 40
