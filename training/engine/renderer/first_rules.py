"""The first version's rendering of conversations, for replays of requests that it accepted.

It accepted special tokens written out in a content, trained the text between the template's
own words instead of the tokens after a prompt, and cut the text at every content. A run that it
trained is rebuilt with its original tokens and weights. New requests never use this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from training.engine.renderer.chat_template import ChatTemplate, Message
from training.engine.renderer.edges import TextTokens
from training.engine.renderer.message_spans import Span, find_messages
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS, Datum


def first_datum(
    template: ChatTemplate,
    messages: Sequence[Message],
    train_on: str,
    *,
    tokenize: Callable[[str], TextTokens],
    special_texts: Sequence[str],
) -> Datum:
    """A conversation of roles and texts as the first version made it a cross_entropy datum.

    Args:
        train_on: ``assistant``, ``all`` or ``auto``, as in the request.
        tokenize: Tokenizes a text.
        special_texts: The tokenizer's special tokens, written out.

    Raises:
        InvalidRequest: The template or the tokenizer has changed since that version.
    """
    text = template.render(messages, NO_CHAT_OPTIONS)
    spans = find_messages(template, messages, NO_CHAT_OPTIONS, text)
    if spans is None or None in spans:
        raise InvalidRequest("messages: the model's chat template rewrites these contents")
    contents = [span for span in spans if span is not None]
    said = _said(text, contents, special_texts)
    edges = {edge for span in contents for edge in (span.start, span.end)}
    tokens = _tokenize_with_cuts(tokenize, text, sorted(edges | {span.end for span in said}))
    starts, ends = tokens.offsets.T
    speaks = [message["role"] == "assistant" for message in messages]
    everyone = train_on == "all" or not any(speaks)
    weights = np.zeros(len(tokens.ids), dtype=np.float32)
    for span, speaking in zip(said, speaks, strict=True):
        if everyone or speaking:
            weights[(starts >= span.start) & (ends <= span.end)] = 1.0
    return Datum(
        model_input=np.asarray(tokens.ids[:-1], dtype=np.int32),
        loss_fn_inputs={
            "target_tokens": np.asarray(tokens.ids[1:], dtype=np.int64),
            "weights": weights[1:],
        },
    )


def _said(text: str, contents: Sequence[Span], special_texts: Sequence[str]) -> list[Span]:
    """Each content with the special token that closes it, if one does."""
    following = [*(span.start for span in contents[1:]), len(text)]
    said = []
    for content, next_content in zip(contents, following, strict=True):
        glue = text[content.end : next_content]
        closing = glue.lstrip()
        length = max(map(len, filter(closing.startswith, special_texts)), default=0)
        end = content.end + len(glue) - len(closing) + length if length else content.end
        said.append(Span(content.start, end))
    return said


def _tokenize_with_cuts(
    tokenize: Callable[[str], TextTokens], text: str, edges: Sequence[int]
) -> TextTokens:
    """The text's tokens, cut at those edges that a token of the whole text straddles."""
    whole = tokenize(text)
    starts, ends = whole.offsets.T
    cuts = [edge for edge in edges if np.any((starts < edge) & (edge < ends))]
    if not cuts:
        return whole
    pieces = [(tokenize(text[start:end]), start) for start, end in pairwise([0, *cuts, len(text)])]
    return TextTokens(
        [token for piece, _ in pieces for token in piece.ids],
        np.concatenate([piece.offsets + start for piece, start in pieces]),
    )
