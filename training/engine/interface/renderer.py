"""The renderer: conversations and text to tokens, and tokens back to text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from training.errors import InvalidRequest
from training.images import NO_IMAGES, Chunks
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum, TokenPrompt, TokenText


class Renderer(ABC):
    """The text side of one base model: its chat template and its tokenizer.

    Holds no state between calls, and can be pickled: the worker copies it into processes beside it,
    where a slow text delays nobody else.
    """

    conversation_fault: str | None = None
    """Why conversations cannot be trained on; None if they can."""
    image_fault: str | None = NO_IMAGES
    """Why images are refused; None if they are read."""
    has_plain_template: bool = False
    """Whether its template needs little memory for short messages: see
    ``training.engine.renderer.plain_template``."""

    @abstractmethod
    def render_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        train_on: str,
        options: ChatOptions = NO_CHAT_OPTIONS,
    ) -> Datum:
        """One conversation as a datum for cross_entropy, shifted by one token.

        The model's own chat template turns it into T tokens; the datum has T - 1 positions.
        ``train_on``: ``assistant`` gives weight 1 to the tokens after each prompt that ends where
        the assistant speaks, up to the token on which sampling stops; ``all`` also to the text and
        end
        of turn of every other given message; ``auto`` is ``assistant`` if there is an
        assistant turn and ``all`` otherwise.

        Raises:
            InvalidRequest: ``assistant`` was requested and there is no assistant turn, or the
                trained tokens would not be those that are sampled.
        """

    def render_by_first_rules(
        self, messages: Sequence[Mapping[str, Any]], *, train_on: str
    ) -> Datum:
        """A conversation of roles and texts as the first version rendered it, for replays of
        requests that it accepted."""
        return self.render_conversation(messages, train_on=train_on)

    @abstractmethod
    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> list[int]:
        """A conversation without images as a prompt that ends where the assistant begins to
        speak."""

    def render_image_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> TokenPrompt:
        """``render_prompt`` of a conversation with images."""
        raise InvalidRequest(f"messages: {self.image_fault}")

    def place_images(self, chunks: Chunks) -> TokenPrompt:
        """Token ids and images as one sequence of tokens.

        Each image is decoded, to find out whether it can be, and how many tokens it is.

        Raises:
            InvalidRequest: One of the images cannot be read, or is another number of tokens than
                expected; the message begins with its number: ``chunks[1]``.
        """
        raise InvalidRequest(f"chunks: {self.image_fault}")

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Text as the token ids of a prompt, without a chat template, beginning as the model's
        tokenizer begins every text."""

    @abstractmethod
    def token_texts(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[TokenText]:
        """Each sampled token by itself, special tokens written out, and its offset in the
        sequence's text.

        Args:
            before: The tokens before the sampled ones.
        """

    @abstractmethod
    def prompt_texts(
        self, tokens: Sequence[int], text: str | None = None
    ) -> tuple[str, list[TokenText]]:
        """A prompt's text, special tokens written out, and each token's offset in it.

        Args:
            text: The tokens' original text, if it was text; it is returned unchanged.
        """

    @property
    @abstractmethod
    def vocabulary_key(self) -> str:
        """Equal for two renderers only if their tokens are the same; quick to compute."""

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token of the base model, by id, special tokens written out; takes
        seconds for a large vocabulary. Bytes that are unknown are those of U+FFFD."""
