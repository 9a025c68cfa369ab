"""Text into tokens and back: the base model's tokenizer and its chat template.

Which tokens of a conversation are trained is read off the model's own template, whatever it is:
the conversation is rendered a second time with markers in place of the contents, so that the
text between the markers is the template's own, to the character. If putting the contents
back does not give the real rendering, the template rewrites what it is given and the request is
refused; no mask is ever guessed.

Templates may ask for today's date. Theirs stands still here, because a conversation that is
replayed from the log on another day must become the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from training.engine.stopping import StreamedText
from training.errors import InvalidRequest
from training.types import Datum

Message = Mapping[str, str]

TRAIN_ON = ("auto", "assistant", "all")
TEMPLATE_DATE = "26 Jul 2024"
"""What a template that asks for the date is told, in whatever format; Llama 3's own default."""

_STILL_CLOCK = f"{{% macro strftime_now(format) %}}{TEMPLATE_DATE}{{% endmacro %}}"

_PADDING = "\t\v\t"
"""White space around a marker: whether it is still there tells if the template trims contents.
No template writes this itself."""


@dataclass(frozen=True)
class _Span:
    """Characters ``start`` to ``end`` (exclusive) of a rendered conversation."""

    start: int
    end: int


@dataclass(frozen=True)
class _Turn:
    """Where one message's content and its end of turn lie in the rendered text."""

    content: _Span
    said: _Span
    """The content and the end-of-turn token after it, if the template writes one."""


class ChatText:
    """One base model's tokenizer, with its chat template. Holds no state between calls."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        *,
        end_token_ids: Iterable[int] = (),
    ) -> None:
        """
        Args:
            tokenizer: A fast one: its character offsets are needed.
            vocab_size: How many tokens the base model knows. A tokenizer may know more.
            end_token_ids: End tokens beside the tokenizer's own, such as those of the model's
                generation configuration.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._template = _chat_template(tokenizer)
        self._special_tokens = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.end_token_ids: tuple[int, ...] = tuple(
            sorted({*own, *end_token_ids, *self._template_end_token()})
        )
        """Where the model itself ends what it says: the tokenizer's end token, those handed in,
        and the one that the chat template writes after what the assistant says."""

    def encode(self, text: str) -> list[int]:
        """Text as token ids, adding nothing; a special token written out becomes that token.

        Raises:
            InvalidRequest: The text is not valid Unicode.
        """
        return self._tokenize(text, ())[0]

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text, without special tokens; ids that have no text add none."""
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def token_texts(self, tokens: Sequence[int]) -> list[tuple[str, int]]:
        """Each token's own text, special tokens written out, and its offset in the whole text."""
        stream, offset = StreamedText(self.decode), 0
        seen: list[int] = []
        placed: list[tuple[str, int]] = []
        for token in tokens:
            seen.append(token)
            own = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            placed.append((str(own), offset))
            offset += len(stream.next_piece(seen))
        return placed

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the T tokens of a prompt that ends where the assistant speaks.

        These are the tokens that ``render_conversation`` gives for the same messages, so what
        was trained after them is what is sampled after them.

        Raises:
            InvalidRequest: The template refuses the messages, or there is none.
        """
        _check_messages(messages)
        text = self._render(messages, add_generation_prompt=True)
        try:
            turns = self._turns(messages, text, add_generation_prompt=True)
        except InvalidRequest:
            turns = []  # a template that rewrites contents can still be spoken to
        return self._tokenize(text, _boundaries(turns))[0]

    def render_conversation(self, messages: Sequence[Message], train_on: str) -> Datum:
        """A conversation of T tokens as a cross_entropy datum of T - 1 positions.

        ``target_tokens`` (T - 1,) int64 is the next token, ``weights`` (T - 1,) float32 is 1
        where the next token is to be learned and 0 elsewhere.

        Args:
            messages: Each with ``role`` and ``content``.
            train_on: ``assistant``: what the assistant says, with the token that ends its turn,
                without the header that announces it. ``all``: likewise for every message given,
                but not for a system message that the template adds itself. ``auto``:
                ``assistant`` if there is an assistant turn, else ``all``.

        Raises:
            InvalidRequest: ``assistant`` without an assistant turn, or messages that the
                template refuses, drops or rewrites.
        """
        if train_on not in TRAIN_ON:
            raise InvalidRequest(f"train_on: {train_on!r} is none of {', '.join(TRAIN_ON)}")
        _check_messages(messages)
        speaks = [message["role"] == "assistant" for message in messages]
        if train_on == "assistant" and not any(speaks):
            raise InvalidRequest("train_on: assistant, but no message has the role assistant")
        everyone = train_on == "all" or not any(speaks)
        text = self._render(messages, add_generation_prompt=False)
        turns = self._turns(messages, text, add_generation_prompt=False)
        tokens, offsets = self._tokenize(text, _boundaries(turns))
        if len(tokens) < 2:
            raise InvalidRequest("messages: fewer than two tokens, so there is nothing to predict")
        starts, ends = offsets.T  # (T,), (T,)
        weights = np.zeros(len(tokens), dtype=np.float32)
        for turn, speaking in zip(turns, speaks, strict=True):
            if everyone or speaking:
                weights[(starts >= turn.said.start) & (ends <= turn.said.end)] = 1.0
        return Datum(
            model_input=np.asarray(tokens[:-1], dtype=np.int32),
            loss_fn_inputs={
                "target_tokens": np.asarray(tokens[1:], dtype=np.int64),
                "weights": weights[1:],
            },
        )

    def _template_end_token(self) -> tuple[int, ...]:
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        try:
            inputs = self.render_conversation(conversation, "assistant").loss_fn_inputs
        except InvalidRequest:
            return ()  # no template, or one that does not know these roles
        last = int(inputs["target_tokens"][inputs["weights"] > 0][-1])
        return (last,) if last in self._special_tokens.values() else ()

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if self._template is None:
            raise InvalidRequest(
                "The base model has no chat template: send text or tokens instead of messages."
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._template,
            )
        except Exception as error:
            # A template is the model's own program: whatever it raises speaks of these messages.
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}"
            ) from error
        return str(text)

    def _turns(
        self, messages: Sequence[Message], text: str, *, add_generation_prompt: bool
    ) -> list[_Turn]:
        """Find every message in ``text``, its rendering, by rendering markers in its place."""
        # Private-use characters: no template writes them, no trimming removes them.
        markers = [f"\ue000{n}\ue001" for n in range(len(messages))]
        marked = self._render(
            [
                {**message, "content": f"{_PADDING}{marker}{_PADDING}"}
                for message, marker in zip(messages, markers, strict=True)
            ],
            add_generation_prompt=add_generation_prompt,
        )
        rebuilt, contents = "", []
        for n, (message, marker) in enumerate(zip(messages, markers, strict=True)):
            before, found, marked = marked.partition(marker)
            if not found:
                raise InvalidRequest(
                    f"messages[{n}]: the model's chat template leaves out this message "
                    f"(role {message['role']!r})"
                )
            content = message["content"]
            if before.endswith(_PADDING):
                before = before.removesuffix(_PADDING)
            else:
                content = content.lstrip()
            if marked.startswith(_PADDING):
                marked = marked.removeprefix(_PADDING)
            else:
                content = content.rstrip()
            rebuilt += before
            contents.append(_Span(len(rebuilt), len(rebuilt) + len(content)))
            rebuilt += content
        if rebuilt + marked != text:
            raise InvalidRequest(
                "messages: the model's chat template rewrites these contents, so which tokens are "
                "trained cannot be told; send token datums instead"
            )
        ends = [following.start for following in contents[1:]] + [len(text)]
        return [
            _Turn(content, _Span(content.start, self._end_of_turn(text, content.end, end)))
            for content, end in zip(contents, ends, strict=True)
        ]

    def _end_of_turn(self, text: str, content_end: int, next_content: int) -> int:
        """Where the special token that closes a message ends; without one, the content's end."""
        glue = text[content_end:next_content]
        closing = glue.lstrip()
        length = max(map(len, filter(closing.startswith, self._special_tokens)), default=0)
        return content_end + len(glue) - len(closing) + length if length else content_end

    def _tokenize(
        self, text: str, boundaries: Sequence[int]
    ) -> tuple[list[int], NDArray[np.int64]]:
        """T token ids and their character offsets (T, 2), no token across a boundary.

        Text is cut only at those boundaries that a token would straddle (a reply that begins
        with white space, say, which would melt into the header's newline): elsewhere the tokens
        are those of the whole text.
        """
        tokens, offsets = self._tokenize_piece(text)
        cuts = [
            boundary
            for boundary in boundaries
            if np.any((offsets[:, 0] < boundary) & (boundary < offsets[:, 1]))
        ]
        if not cuts:
            return tokens, offsets
        edges = [0, *cuts, len(text)]
        pieces = [(self._tokenize_piece(text[start:end]), start) for start, end in pairwise(edges)]
        return (
            [token for (piece, _), _ in pieces for token in piece],
            np.concatenate([spans + start for (_, spans), start in pieces]),
        )

    def _tokenize_piece(self, text: str) -> tuple[list[int], NDArray[np.int64]]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"The text is not valid Unicode: {error.reason}") from error
        # verbose=False: a text longer than the context is the engine's to refuse, not a warning.
        encoding = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        tokens: list[int] = encoding["input_ids"]
        if tokens and max(tokens) >= self._vocab_size:
            raise InvalidRequest(
                f"token {max(tokens)} ({self._tokenizer.convert_ids_to_tokens(max(tokens))!r}) is "
                f"not in the base model's vocabulary of {self._vocab_size}"
            )
        return tokens, np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError:
        return None
    return _STILL_CLOCK + template if "strftime_now" in template else template


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("messages: empty")
    for n, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise InvalidRequest(f"messages[{n}].{name}: a text is needed")


def _boundaries(turns: Sequence[_Turn]) -> list[int]:
    edges = {edge for turn in turns for edge in (turn.content.start, turn.content.end)}
    return sorted(edges | {turn.said.end for turn in turns})
