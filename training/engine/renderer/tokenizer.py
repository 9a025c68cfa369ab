"""What a renderer uses of a tokenizer: transformers' fast ones have it, and the fake's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class AddedToken(Protocol):
    """A token that stands by itself in any text."""

    @property
    def content(self) -> str: ...

    @property
    def special(self) -> bool:
        """Whether ``decode`` may leave it out."""


class Tokenizer(Protocol):
    """A part of ``transformers.PreTrainedTokenizerBase``; its documentation says what each does."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Of ``AddedToken``."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    @property
    def eos_token_id(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A text's ``input_ids``, ``offset_mapping`` and ``special_tokens_mask``, as asked for."""

    def decode(self, *args: Any, **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_chat_template(self, *args: Any, **kwargs: Any) -> str: ...

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...
