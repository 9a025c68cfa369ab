"""A tokenizer without a vocabulary: a token is a byte of UTF-8, and one more ends a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from training.engine.fake.sampler import END_TOKEN

END_TEXT = "<end>"

CHAT_TEMPLATE = (
    "{% if enable_thinking is defined %}thinking: {{ enable_thinking }}<end>{% endif %}"
    "{% if tools %}tools: {{ tools | length }}<end>{% endif %}"
    "{% for message in messages %}"
    "{{ message.role }}: {{ message.reasoning_content or '' }}{{ message.content or '' }}"
    "{% for call in message.tool_calls or () %}{{ call.function.name }}(){% endfor %}<end>"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_TEMPLATE = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)


@dataclass(frozen=True)
class _EndToken:
    content: str = END_TEXT
    special: bool = True


class ByteTokenizer:
    """A ``renderer.tokenizer.Tokenizer``. Holds nothing."""

    eos_token_id = END_TOKEN
    special_tokens_map: Mapping[str, str] = {"eos_token": END_TEXT}
    added_tokens_decoder: Mapping[int, _EndToken] = {END_TOKEN: _EndToken()}

    def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        for number, part in enumerate(text.split(END_TEXT)):
            if number:
                ids.append(END_TOKEN)
                offsets.append((place, place + len(END_TEXT)))
                place += len(END_TEXT)
            for character in part:
                own = character.encode()
                ids += own
                offsets += [(place, place + 1)] * len(own)
                place += 1
        return {
            "input_ids": ids,
            "offset_mapping": offsets,
            "special_tokens_mask": [int(token == END_TOKEN) for token in ids],
        }

    def decode(
        self, tokens: Sequence[int], *, skip_special_tokens: bool = False, **options: Any
    ) -> str:
        end = b"" if skip_special_tokens else END_TEXT.encode()
        written = [end if token == END_TOKEN else bytes([token]) for token in tokens]
        return b"".join(written).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return END_TEXT if token == END_TOKEN else f"<0x{token:02X}>"

    def get_chat_template(self, **options: Any) -> str:
        return CHAT_TEMPLATE

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        return_dict: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        text = _TEMPLATE.render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        if continue_final_message:
            text = text.removesuffix(END_TEXT)
        return self(text)["input_ids"] if tokenize else text
