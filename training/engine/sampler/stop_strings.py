"""Finds stop strings in a sequence's text, independently of token boundaries.

Stop strings are searched in the text, so the tokens of a sequence are decoded as they arrive:
``StreamedText`` returns the text that is certain (without incomplete characters), ``StopScanner``
finds the first stop string in it, reading every character once or a few times but never from the
start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

UNFINISHED = "\ufffd"
"""The decoded form of bytes that are not, or not yet, a character."""

CONTEXT_TOKENS = 8
"""Tokens decoded again before new ones: a token's text can depend on those before."""

BYTES_OF_A_CHARACTER = 4
"""Most bytes, and so most tokens, of one character."""

BEFORE_TOKENS = CONTEXT_TOKENS + BYTES_OF_A_CHARACTER - 1
"""Enough tokens to start with at least ``CONTEXT_TOKENS`` and not inside a character."""

MOST_TOKENS = 32
"""Tokens decoded at once; of bytes that still are no character by then, only the last ones may
become one."""


Decode = Callable[[Sequence[int]], str]
"""Tokens as text, without special tokens."""


class StreamedText:
    """The text of a growing list of tokens, in pieces."""

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """
        Args:
            before: The tokens that these follow, such as a prompt; the last ``BEFORE_TOKENS`` are
                enough. Their text is not returned, but without them the first word could lose
                its space.
        """
        self._decode = decode
        self._before, self._text_before = _last_of(decode, before)
        self._start = 0
        self._num_given = 0  # characters of the text of tokens[start:] that were returned

    def next_piece(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """The text of the tokens since the last piece; empty while a character is incomplete.

        Args:
            tokens: All of the sequence's tokens so far.
            is_last: No more tokens will come: incomplete characters are returned as they are.
        """
        text = self._text_since_start(tokens)
        num_tokens = len(tokens) - self._start
        held = 0 if is_last else len(text) - len(text.rstrip(UNFINISHED))
        if must_forget := num_tokens >= MOST_TOKENS:
            held = min(held, BYTES_OF_A_CHARACTER - 1)
        certain = text[: len(text) - held]
        piece = certain[self._num_given :]
        self._num_given = max(self._num_given, len(certain))
        if must_forget or (num_tokens > 2 * CONTEXT_TOKENS and not held):
            self._forget(tokens, text, held, must=must_forget)
        return piece

    def _text_since_start(self, tokens: Sequence[int]) -> str:
        """The text of tokens[start:], without that of earlier tokens."""
        if self._start or not self._before:
            return self._decode(tokens[self._start :])
        text = self._decode([*self._before, *tokens])
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        # The tokens complete a character, or continue an incomplete one.
        return text[len(self._text_before.rstrip(UNFINISHED)) :]

    def _forget(self, tokens: Sequence[int], text: str, held: int, *, must: bool) -> None:
        """Move the start, but not into a character: its bytes would corrupt those after them.

        Args:
            held: Characters at the end of the text that were not returned.
        """
        latest = len(tokens) - CONTEXT_TOKENS
        for start in range(latest, latest - BYTES_OF_A_CHARACTER, -1):
            kept = self._decode(tokens[start:])
            if len(kept) >= held and text.endswith(kept):
                self._start, self._num_given = start, len(kept) - held
                return
        if must:
            self._start = latest
            self._num_given = max(0, len(self._decode(tokens[latest:])) - held)


def text_after(decode: Decode, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to that of those before; equals the pieces of ``StreamedText``."""
    last, base = _last_of(decode, before)
    whole = decode([*last, *tokens])
    if UNFINISHED not in whole and whole.startswith(base):
        return whole[len(base) :]
    # Some tokenizers corrupt a whole run of bytes because of one wrong byte; the pieces do not.
    stream = StreamedText(decode, before)
    pieces = [stream.next_piece(tokens[:count]) for count in range(1, len(tokens) + 1)]
    return "".join(pieces) + stream.next_piece(tokens, is_last=True)


def _last_of(decode: Decode, before: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens of ``before``, from the beginning of a character on, and their text.

    Bytes that begin inside a character can corrupt more than that one: some tokenizers then return
    no character for the whole run of bytes, so text after the cut would be lost too.
    """
    best, text = list(before[-CONTEXT_TOKENS:]), ""
    if best:
        text = decode(best)
    for number in range(CONTEXT_TOKENS + 1, BEFORE_TOKENS + 1):
        if UNFINISHED not in text or len(before) < number:
            break
        longer = list(before[-number:])
        if (text_of_longer := decode(longer)).count(UNFINISHED) < text.count(UNFINISHED):
            best, text = longer, text_of_longer
    return best, text


class StopScanner:
    """Finds the stop string that is complete first in a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: none of them empty."""
        self._stops = stops
        self._overlap = max(map(len, stops)) - 1
        self._tail = ""
        self.num_passed = 0
        """Characters from the start in which no stop string begins."""

    def find(self, piece: str) -> int | None:
        """The offset of the stop string that this piece completes, in characters from the start.

        Of several, the one that ends first counts, and of those that end there the longest. None
        if there is none; after a match the scanner must not be used again.
        """
        text = self._tail + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at = min(ends)
            return self.num_passed + at
        # A stop string that begins here may be completed by the next piece.
        cut = max(0, len(text) - self._overlap)
        self.num_passed += cut
        self._tail = text[cut:]
        return None


class TextSoFar:
    """The certain text of a growing list of tokens, for occasional reads."""

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """``before``: see ``StreamedText``."""
        self._stream = StreamedText(decode, before)
        self._num_read = 0
        self._text = ""

    def read(self, tokens: Sequence[int]) -> str:
        """The text of all of the sequence's tokens so far, without an incomplete character at its
        end."""
        for count in range(self._num_read + 1, len(tokens) + 1):  # one by one: see MOST_TOKENS
            self._text += self._stream.next_piece(tokens[:count])
        self._num_read = len(tokens)
        return self._text


class StopWatch:
    """One sequence's text so far, watched for stop strings.

    The client's text has no special tokens, but a stop string may contain
    one, alone or with text around it, so the watched text has them written out.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str],
        *,
        before: Sequence[int] = (),
        special_texts: Mapping[int, str] | None = None,
    ) -> None:
        """
        Args:
            before: See ``StreamedText``.
            special_texts: The texts of special tokens.
        """
        self._stream = StreamedText(decode, before)
        self._scanner = StopScanner(stops)
        self._special_texts = special_texts or {}
        self._watched = ""
        self._special_spans: list[tuple[int, int]] = []
        self.text_before_stop: str | None = None
        """The text up to the stop string, once there is one."""

    def has_stopped(self, tokens: Sequence[int]) -> bool:
        """Whether the sequence's tokens, the newest included, contain a stop string."""
        piece = self._stream.next_piece(tokens)
        special = self._special_texts.get(tokens[-1], "")
        if special:
            begin = len(self._watched) + len(piece)
            self._special_spans.append((begin, begin + len(special)))
        self._watched += piece + special
        at = self._scanner.find(piece + special)
        if at is None:
            return False
        self.text_before_stop = self._text_up_to(at)
        if special and at == len(self._watched) - len(special):
            # An incomplete character before the special token stays incomplete.
            self.text_before_stop += self._stream.next_piece(tokens, is_last=True)
        return True

    @property
    def certain_text(self) -> str:
        """The text in which no stop string can begin any more."""
        return self._text_up_to(self._scanner.num_passed)

    def _text_up_to(self, end: int) -> str:
        """The client's part of the first ``end`` watched characters."""
        kept, begin = "", 0
        for special_begin, special_end in self._special_spans:
            kept += self._watched[begin : min(special_begin, end)]
            begin = min(special_end, end)
        return kept + self._watched[begin:end]
