"""Conversations as clients send them: messages of roles, and the inputs of a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from training.images import Image

JsonObject = Mapping[str, Any]
"""A JSON object as a client sent it: text, numbers, booleans, None, lists and objects."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles in a conversation. A model's chat template may not have all of them."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. Fields that are None are absent for the template."""

    role: str
    """One of ``ROLES``."""
    content: str | tuple[str | Image, ...] | None
    """Text, or texts and at least one image in order. None for a message with nothing but
    ``tool_calls``; the template then sees no content, as in transformers, since many templates
    would write the word None."""
    _: KW_ONLY
    name: str | None = None
    """The speaker among several, or the tool that answers."""
    tool_calls: tuple[JsonObject, ...] | None = None
    """The assistant's calls: ``{"id", "type": "function", "function": {"name", "arguments"}}``
    each. Templates expect ``arguments`` as an object; the parser converts JSON text."""
    tool_call_id: str | None = None
    """The call that a message of the role ``tool`` answers."""
    reasoning_content: str | None = None
    """The assistant's reasoning before its answer, for templates of thinking models."""

    @property
    def images(self) -> list[Image]:
        """The images in its content."""
        parts = self.content if isinstance(self.content, tuple) else ()
        return [part for part in parts if isinstance(part, Image)]

    def to_dict(self) -> dict[str, Any]:
        """The message as a dictionary: role, content, and the other fields that are set.

        A content with images is a list of parts, as templates take it, with the image itself in
        each part of an image.
        """
        extras = {
            "name": self.name,
            "tool_calls": None if self.tool_calls is None else list(self.tool_calls),
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        given = {name: value for name, value in extras.items() if value is not None}
        content = self.content
        if isinstance(content, tuple):
            return {"role": self.role, "content": [_to_part(part) for part in content], **given}
        return {"role": self.role, "content": content, **given}


def _to_part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, Image):
        return {"type": "image", "image": part}
    return {"type": "text", "text": part}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The inputs of a template beside the messages.

    A conversation to train takes ``tools`` and ``template_kwargs``; the other two define how a
    prompt ends and are refused there.
    """

    tools: tuple[JsonObject, ...] | None = None
    """Functions the assistant may call, as OpenAI writes them; None offers none."""
    add_generation_prompt: bool = True
    """Whether a prompt ends with the header after which the assistant speaks."""
    continue_final_message: bool = False
    """The prompt ends with the last message's text, which sampling continues. Needs
    ``add_generation_prompt=False``."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the model's own template, such as ``enable_thinking``. One that the template
    does not read is refused."""


NO_CHAT_OPTIONS = ChatOptions()


@dataclass(frozen=True)
class Conversation:
    """Messages in order; the worker renders them with the model's own chat template."""

    messages: tuple[Message, ...]
    options: ChatOptions = NO_CHAT_OPTIONS

    def to_dicts(self) -> list[dict[str, Any]]:
        """``[{"role", "content", ...}, ...]``, as chat templates take them."""
        return [message.to_dict() for message in self.messages]

    @property
    def images(self) -> list[Image]:
        """The images in its messages."""
        return [image for message in self.messages for image in message.images]
