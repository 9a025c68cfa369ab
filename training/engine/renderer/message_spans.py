"""Finds each message's content in a rendered conversation.

The conversation is rendered a second time with markers in place of the contents, so the text
between the markers is exactly the template's own. If putting the contents back does
not give the original rendering, the template rewrites contents, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.engine.renderer.chat_template import ChatTemplate, Message
from training.errors import InvalidRequest
from training.types import ChatOptions

_PADDING = "\t\v\t"
"""White space around a marker, which shows whether the template trims contents.
No template writes this itself."""


_WRITTEN_ROLES = ("user", "assistant")
"""A template may leave out a message of any other role. A content of these that stands in the text
was not left out; one of the others may stand there by chance."""


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of a rendered conversation."""

    start: int
    end: int


def find_messages(
    template: ChatTemplate, messages: Sequence[Message], options: ChatOptions, text: str
) -> list[Span | None] | None:
    """The contents' places in ``text``, the rendering of the messages.

    Returns:
        One span per message, None for one without content; or None if the template rewrites
        contents, so that their places are unknown.

    Raises:
        InvalidRequest: The template leaves a content out.
    """
    if any(isinstance(message.get("content"), list) for message in messages):
        return None  # with images: nobody trains their texts
    # Private-use characters: no template writes them, no trimming removes them.
    markers = [_marker(n) if _has_content(m) else None for n, m in enumerate(messages)]
    marked = template.render(
        [
            message if marker is None else {**message, "content": f"{_PADDING}{marker}{_PADDING}"}
            for message, marker in zip(messages, markers, strict=True)
        ],
        options,
    )
    rebuilt = ""
    spans: list[Span | None] = []
    for n, (message, marker) in enumerate(zip(messages, markers, strict=True)):
        if marker is None:
            spans.append(None)
            continue
        before, found, marked = marked.partition(marker)
        if not found:
            raise _left_out(n, message)
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
        spans.append(Span(len(rebuilt), len(rebuilt) + len(content)))
        rebuilt += content
    return spans if rebuilt + marked == text else None


def require_all_written(
    template: ChatTemplate, messages: Sequence[Message], options: ChatOptions, text: str
) -> None:
    """Refuse a prompt of which the template leaves a message out: many know only some roles.

    Args:
        text: The rendering of the messages, as a prompt or as a conversation.

    Raises:
        InvalidRequest: It names the message.
    """
    for n, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(part.get("text", "").strip() not in text for part in parts):
            raise _left_out(n, message)
    doubtful = [
        n
        for n, message in enumerate(messages)
        if isinstance(message.get("content"), str)
        and (content := message["content"].strip())
        and (message["role"] not in _WRITTEN_ROLES or content not in text)
    ]
    if not doubtful:
        return
    marked = [
        {**message, "content": _marker(n)} if n in doubtful else message
        for n, message in enumerate(messages)
    ]
    try:
        rendered = template.render(marked, options)
    except InvalidRequest:
        return  # it reads the content, and expects another
    for n in doubtful:
        if _marker(n) not in rendered:
            raise _left_out(n, messages[n])


def _marker(n: int) -> str:
    return f"\ue000{n}\ue001"


def _left_out(n: int, message: Message) -> InvalidRequest:
    return InvalidRequest(
        f"messages[{n}]: the model's chat template leaves out this message "
        f"(role {message['role']!r})"
    )


def _has_content(message: Message) -> bool:
    """An empty text beside tool calls counts as none, since many templates leave it out."""
    content = message.get("content")
    return content is not None and not (content == "" and message.get("tool_calls"))


def begin_of_content(
    template: ChatTemplate,
    messages: Sequence[Message],
    n: int,
    options: ChatOptions,
    text: str,
) -> int:
    """The last character of ``text`` before which the content of message n may begin.

    For templates that rewrite contents: the text differs from there on if the content does.
    """
    other = {**messages[n], "content": "\ue000\ue001"}
    rendered = template.render([*messages[:n], other], options)
    for at, (ours, theirs) in enumerate(zip(text, rendered, strict=False)):
        if ours != theirs:
            return at
    return min(len(text), len(rendered))
