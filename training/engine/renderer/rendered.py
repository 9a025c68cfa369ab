"""One conversation as its model's template renders it: its text, its tokens, and their authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from training.engine.renderer.chat_template import ChatTemplate, Message
from training.engine.renderer.edges import EdgedTokens
from training.engine.renderer.message_spans import Span, begin_of_content, find_messages
from training.engine.renderer.turn_ends import TurnEnds
from training.errors import InvalidRequest
from training.types import ChatOptions

MELTS = (
    "messages: an answer begins with what the model's tokenizer joins with the header before it, "
    "so sampling after the header could not produce it; let it begin with a letter, or send "
    "token datums instead"
)


class RenderedConversation:
    """A whole conversation, for training."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        options: ChatOptions,
        tokenize_with_edges: Callable[[str, Sequence[int]], EdgedTokens | None],
    ) -> None:
        """
        Args:
            tokenize_with_edges: The text's tokens, of which one ends at each edge; None if they
                cannot.

        Raises:
            InvalidRequest: The template leaves something out, or an answer does not follow the
                prompt that the template makes of the messages before it.
        """
        self._template, self._messages, self._options = template, messages, options
        self._text = template.render(messages, options)
        self._spans = find_messages(template, messages, options, self._text)
        edges = {
            n: prompt_length(template, messages, n, options, self._text) for n in answers(messages)
        }
        tokens = tokenize_with_edges(self._text, list(edges.values()))
        if tokens is None:
            raise InvalidRequest(MELTS)
        self.tokens = tokens
        self._begins = dict(zip(edges, tokens.edges, strict=True))

    def answer(self, n: int) -> range:
        """The tokens from the beginning of answer n to the next message's content."""
        begin = self._begins.get(n)
        if begin is None:  # it is the first message and has no prompt
            begin = self._overlap(self._content(n)).start
        return range(begin, max(begin, self._next_content(n)))

    def end_of_answer(self, n: int, stops: Sequence[int], ends: TurnEnds) -> int | None:
        """The end of the trained part of answer n: after the token on which sampling stops.

        Returns:
            None for a last answer after which the template writes nothing, although it would if
            the conversation continued.

        Raises:
            InvalidRequest: The answer has no such end.
        """
        answer = self.answer(n)
        for index in answer:
            if self.tokens.ids[index] in stops:
                return index + 1
        if n == len(self._messages) - 1:
            if ends.after_last is not None:
                return None
        else:
            # The token that ends it here is not the one that ends a sample, so it is not trained.
            closing = [index for index in answer if self.tokens.ids[index] in ends.earlier]
            if closing:
                return closing[-1]
        raise InvalidRequest(
            f"messages[{n}]: the model's chat template writes no token after this answer on which "
            "sampling would stop"
        )

    def said(self, n: int, special_texts: Mapping[int, str]) -> range:
        """The tokens of message n's content, with the special token that closes it, if any."""
        content = self._content(n)
        later = [span.start for span in (self._spans or ())[n + 1 :] if span is not None]
        glue = self._text[content.end : min(later, default=len(self._text))]
        closing = glue.lstrip()
        length = max(map(len, filter(closing.startswith, special_texts.values())), default=0)
        end = content.end + len(glue) - len(closing) + length if length else content.end
        said = self._overlap(Span(content.start, end))
        if said and self.tokens.ids[said.start] in special_texts:
            first = int(self.tokens.offsets[said.start, 0])
            if (
                first < content.start
            ):  # a token of the header that includes the white space after it
                return range(said.start + 1, said.stop)
        return said

    def _content(self, n: int) -> Span:
        span = None if self._spans is None else self._spans[n]
        if span is None:
            raise InvalidRequest(
                f"messages[{n}]: the model's chat template rewrites these contents, so the "
                "tokens to train are unknown; send token datums instead"
            )
        return span

    def _next_content(self, n: int) -> int:
        """The number of tokens before the content of the message after n."""
        if n == len(self._messages) - 1:
            return len(self.tokens.ids)
        if n + 1 in self._begins:
            return self._begins[n + 1]
        if self._spans is not None:
            begin = self._content(n + 1).start
        else:
            begin = begin_of_content(
                self._template, self._messages, n + 1, self._options, self._text
            )
        return int(np.searchsorted(self.tokens.offsets[:, 0], begin))

    def _overlap(self, span: Span) -> range:
        """The tokens that overlap the span."""
        starts, ends = self.tokens.offsets.T
        first = int(np.searchsorted(ends, span.start, side="right"))
        return range(first, max(first, int(np.searchsorted(starts, span.end))))


def answers(messages: Sequence[Message]) -> list[int]:
    """The assistant's messages that follow a prompt; the first message has none."""
    return [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]


def prompt_length(
    template: ChatTemplate, messages: Sequence[Message], n: int, options: ChatOptions, text: str
) -> int:
    """The length in characters of answer n's prompt, with which ``text`` begins.

    Raises:
        InvalidRequest: The rendered conversation does not begin with that prompt.
    """
    prompt = template.render(messages[:n], options, add_generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    raise InvalidRequest(
        f"messages[{n}]: the model's chat template does not write this answer after the prompt "
        "that it makes of the messages before, so trained and sampled tokens would differ. "
        "If it treats earlier answers differently, train each answer as the last one of a "
        "separate conversation; otherwise send token datums"
    )
