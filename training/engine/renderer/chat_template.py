"""A model's own chat template: messages and options to text, or a refusal that names the field.

Templates may ask for today's date. They always get the same date, because a conversation that is
replayed from the log on another day must give the same tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.engine.renderer.plain_template import is_plain_template
from training.engine.renderer.tokenizer import Tokenizer
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS, ChatOptions

Message = Mapping[str, Any]
"""A message in the templates' form; see ``training.types.Message.to_dict``."""

TEMPLATE_DATE = "26 Jul 2024"
"""The date for templates, in every requested format; Llama 3's own default."""

MAX_REASON_CHARACTERS = 300
"""Of a template's error about messages, which may contain them."""

_STILL_CLOCK = f"{{% macro strftime_now(format) %}}{TEMPLATE_DATE}{{% endmacro %}}"

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""The names under which transformers passes a message's reasoning to the template."""


class ChatTemplate:
    """Renders conversations. Holds no state between calls."""

    def __init__(self, tokenizer: Tokenizer, *, marks: Sequence[str] = ()) -> None:
        """
        Args:
            marks: Texts that stand for an image, which no text of a message may have.
        """
        self._tokenizer = tokenizer
        self._plain = _template_of(tokenizer, [])
        self._with_tools = _template_of(tokenizer, [{}])
        reserved = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*reserved, "messages", "conversations", *tokenizer.special_tokens_map}
        special = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        special |= set(marks)
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._needs_parts = bool(marks) and self._leaves_out_plain_text()
        self.is_plain = self._plain is not None and is_plain_template(self._plain)
        """Whether the template for conversations without tools is plain: see ``plain_template``."""

    def render(
        self,
        messages: Sequence[Message],
        options: ChatOptions,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        """The text that the template makes of messages which ``check`` has passed.

        Raises:
            InvalidRequest: The template refuses them.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [self._as_read(message) for message in messages],
                tools=None if options.tools is None else [dict(tool) for tool in options.tools],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=self._with_tools if options.tools else self._plain,
                **options.template_kwargs,
            )
        except Exception as error:
            # A template is the model's own program: any exception is about these messages.
            raise InvalidRequest(
                "The model's chat template refuses these messages: "
                f"{str(error)[:MAX_REASON_CHARACTERS]}"
            ) from error
        return str(text)

    def _as_read(self, message: Message) -> dict[str, Any]:
        """A message in the form that the template reads: an image is a mark only, and a template
        that reads lists of parts gets one of a text."""
        content = message.get("content")
        if isinstance(content, list):
            parts = [{"type": "image"} if "image" in part else part for part in content]
            return {**message, "content": parts}
        if isinstance(content, str) and self._needs_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        return dict(message)

    def _leaves_out_plain_text(self) -> bool:
        """Whether a template for images reads the texts of lists of parts only."""
        self._needs_parts = False
        try:
            text = self.render([{"role": "user", "content": "\ue000"}], NO_CHAT_OPTIONS)
        except InvalidRequest:
            return True
        return "\ue000" not in text

    def tokenize(self, messages: Sequence[Message]) -> list[int]:
        """The conversation tokenized by transformers in one call, for comparison."""
        tokens: Any = self._tokenizer.apply_chat_template(
            [self._as_read(message) for message in messages],
            chat_template=self._plain,
            tokenize=True,
            return_dict=False,
        )
        return list(tokens)

    def check(self, messages: Sequence[Message], options: ChatOptions) -> None:
        """Refuse fields that the template would ignore, and texts that could forge its turns.

        A special token that is written out in a content would become that token, as if the
        template had written it: the author could end the turn and speak in another role.

        Raises:
            InvalidRequest: The message names the field.
        """
        if self._plain is None:
            raise InvalidRequest(
                "The base model has no chat template: send text or tokens instead of messages."
            )
        if not messages:
            raise InvalidRequest("messages: empty")
        for n, message in enumerate(messages):
            self._check_message(message, f"messages[{n}]")
        template = self._with_tools if options.tools else self._plain
        if options.tools:
            _require_read("tools", ("tools",), str(template))
        for name in options.template_kwargs:
            where = f"chat_template_kwargs.{name[:60]}"
            if name in self._reserved:
                raise InvalidRequest(f"{where}: is set by the server")
            _require_read(where, (name,), str(template))
        self._check_texts("tools", options.tools or ())
        self._check_texts("chat_template_kwargs", options.template_kwargs)

    def _check_message(self, message: Message, where: str) -> None:
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{where}.role: a text is needed")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str | list) and (content is not None or not calls):
            raise InvalidRequest(f"{where}.content: a text is needed")
        template = str(self._plain) + str(self._with_tools)
        if calls:
            _require_read(f"{where}.tool_calls", ("tool_calls",), template)
        if message.get("reasoning_content"):
            _require_read(f"{where}.reasoning_content", _REASONING_NAMES, template)
        self._check_texts(where, message)

    def _check_texts(self, where: str, value: Any) -> None:
        for place, text in _texts(where, value):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"{place}: not valid Unicode: {error.reason}") from error
            found = self._special.search(text) if self._special else None
            if found:
                raise InvalidRequest(
                    f"{place}: has {found[0]!r} at character {found.start()}, which is a special "
                    "token of the model: within a conversation it could end a turn or begin "
                    "another. Leave it out, or send tokens instead of messages"
                )


def _template_of(tokenizer: Tokenizer, tools: list[dict[str, Any]]) -> str | None:
    """Some models have a separate template for conversations with tools."""
    try:
        template = str(tokenizer.get_chat_template(tools=tools or None))
    except ValueError:
        return None
    return _STILL_CLOCK + template if "strftime_now" in template else template


def _require_read(where: str, names: Sequence[str], template: str) -> None:
    if not any(re.search(rf"\b{re.escape(name)}\b", template) for name in names):
        raise InvalidRequest(f"{where}: the model's chat template does not read it")


def _texts(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, names of fields too, with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield where, name
            yield from _texts(f"{where}.{name[:60]}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(f"{where}[{index}]", item)
