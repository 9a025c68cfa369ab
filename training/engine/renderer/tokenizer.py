"""The tokenizer interface of a renderer, which transformers' fast ones and the fake have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class AddedToken(Protocol):
    """A token that is never joined with text around it."""

    @property
    def content(self) -> str: ...

    @property
    def special(self) -> bool:
        """Whether ``decode`` may leave it out."""


class Tokenizer(Protocol):
    """A part of ``transformers.PreTrainedTokenizerBase``; see its documentation."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Values are ``AddedToken``."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    @property
    def eos_token_id(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A text's ``input_ids``, ``offset_mapping`` and ``special_tokens_mask``, as requested."""

    def decode(self, *args: Any, **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_chat_template(self, *args: Any, **kwargs: Any) -> str: ...

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...
