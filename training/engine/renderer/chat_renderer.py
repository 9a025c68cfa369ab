"""Text into tokens and back: the base model's tokenizer and its chat template.

A conversation is rendered by the model's own template and tokenized as a whole. The trained part of
an answer follows the prompt that would have been sampled from, up to the token on which sampling
stops. So one property holds for every accepted conversation: **prompt tokens and trained tokens are
those of the template, and sampling stops on the token that was trained.** Any other conversation is
refused with the reason; a mask is never guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np

from training.engine.interface import Renderer
from training.engine.renderer.chat_template import ChatTemplate, Message
from training.engine.renderer.edges import EdgedTokens, TextTokens, tokenize_with_edges
from training.engine.renderer.first_rules import first_datum
from training.engine.renderer.images.reader import ImageReader, ReadImage
from training.engine.renderer.images.written import (
    TemplateWithImages,
    find_images,
    images_of_messages,
    place_chunks,
    read_images,
)
from training.engine.renderer.message_spans import require_all_written
from training.engine.renderer.rendered import RenderedConversation, answers, prompt_length
from training.engine.renderer.streamed_text import text_after
from training.engine.renderer.template_check import find_fault
from training.engine.renderer.token_texts import TokenTexts
from training.engine.renderer.tokenizer import Tokenizer
from training.engine.renderer.turn_ends import find_turn_ends
from training.engine.time_limit import time_limit
from training.errors import InvalidRequest
from training.images import NO_IMAGES, Chunks, Image
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum, TokenPrompt, TokenText

TRY_SECONDS = 5.0
"""Time limit of a template for a short conversation in the check at the start."""

TRAIN_ON = ("auto", "assistant", "all")


class ChatRenderer(Renderer):
    """One base model's tokenizer, with its chat template. Holds no state between calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        end_token_ids: Iterable[int] = (),
        images: ImageReader | None = None,
        image_fault: str | None = None,
    ) -> None:
        """
        Args:
            tokenizer: A fast tokenizer: its character offsets are needed.
            vocab_size: The base model's number of tokens. A tokenizer may have more.
            end_token_ids: Further end tokens, such as those of the model's
                generation configuration.
            images: Reads the model's images; None if it reads none.
            image_fault: Why it reads none.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._images = images
        self.image_fault = None if images is not None else image_fault or NO_IMAGES
        marks = () if images is None else (images.mark,)
        self._template = ChatTemplate(tokenizer, marks=marks)
        self.has_plain_template = self._template.is_plain
        added = tokenizer.added_tokens_decoder
        self._added = {i: t.content for i, t in added.items() if not t.content.isspace()}
        self.special_texts = {i: t.content for i, t in added.items() if t.special}
        """The texts of special tokens, which ``decode`` leaves out."""
        self._first_tokens = _first_tokens(tokenizer)
        self._token_texts = TokenTexts(tokenizer, neutral=self._ids_of("a")[-1:])
        with time_limit(TRY_SECONDS):
            self._ends = find_turn_ends(self._template, self._added_tokens_in)
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.end_token_ids: tuple[int, ...] = tuple(
            sorted({*own, *end_token_ids, *self._ends.stops})
        )
        """The end tokens: the tokenizer's, those passed in,
        and those that the chat template writes after the assistant's text."""
        with time_limit(TRY_SECONDS):
            self.conversation_fault = find_fault(self, self._template)
        """Why conversations cannot be trained on; None if they can."""

    # -- text ------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Text as the token ids of a prompt; special tokens may be written out.

        The tokenizer's own first token (BOS, for many models) comes first,
        unless the text begins with it already.

        Raises:
            InvalidRequest: The text is not valid Unicode.
        """
        tokens = self._tokenize(text).ids
        first = self._first_tokens
        return tokens if tokens[: len(first)] == first else [*first, *tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text, without special tokens; ids that have no text add none."""
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def written_out(self, tokens: Sequence[int]) -> str:
        """Token ids as text, special tokens included."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def decode_after(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that ``tokens`` add to that of those before, with the first word's space."""
        return text_after(self.decode, before, tokens)

    def token_texts(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[TokenText]:
        """Each sampled token's text, with its offset in the text of all of them.

        Args:
            before: The tokens before these; see ``decode_after``.
        """
        return self._token_texts.of_sample(tokens, before)

    def prompt_texts(
        self, tokens: Sequence[int], text: str | None = None
    ) -> tuple[str, list[TokenText]]:
        """A prompt's text and each of its tokens; see ``TokenTexts.of_prompt``."""
        return self._token_texts.of_prompt(tokens, text)

    @property
    def vocabulary_key(self) -> str:
        """See ``Renderer``: a hash of all tokens, as the vocabulary writes them."""
        pieces = [self._tokenizer.convert_ids_to_tokens(id_) for id_ in range(self._vocab_size)]
        return hashlib.sha256(repr(pieces).encode()).hexdigest()

    def token_bytes(self) -> list[bytes]:
        """See ``Renderer``."""
        return self._token_texts.bytes_of(range(self._vocab_size))

    # -- conversations ---------------------------------------------------------------------------

    def render_prompt(
        self, messages: Sequence[Message], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> list[int]:
        """A conversation as the T tokens of a prompt that ends where the assistant speaks.

        They are the tokens of the template, equal to those of ``render_conversation``
        for the same messages, so sampling continues exactly the prompt that was trained.

        Raises:
            InvalidRequest: The template refuses or leaves out a message, or the model has none.
        """
        return self._prompt_ids(messages, options, self._template)

    def render_image_prompt(
        self, messages: Sequence[Message], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> TokenPrompt:
        images, read, template = self._with_images(messages)
        ids = self._prompt_ids(messages, options, template)
        return TokenPrompt(tokens=np.array(ids, np.int32), images=find_images(ids, images, read))

    def place_images(self, chunks: Chunks) -> TokenPrompt:
        if self._images is None:
            raise InvalidRequest(f"chunks: {self.image_fault}")
        return place_chunks(self._images, chunks)

    def _with_images(
        self, messages: Sequence[Message]
    ) -> tuple[list[Image], list[ReadImage], ChatTemplate]:
        """A conversation's images, and the template that writes them."""
        found = images_of_messages(messages)
        if not found:
            return [], [], self._template
        if self._images is None:
            raise InvalidRequest(f"{next(iter(found))}: {self.image_fault}")
        read = read_images(self._images, found)
        written = [each.written for each in read]
        template = TemplateWithImages(self._template, self._images.mark, written)
        return list(found.values()), read, template

    def _prompt_ids(
        self, messages: Sequence[Message], options: ChatOptions, template: ChatTemplate
    ) -> list[int]:
        template.check(messages, options)
        if options.continue_final_message and options.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message: needs add_generation_prompt to be false, because the last "
                "message is continued and no other begins"
            )
        text = template.render(
            messages,
            options,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
        )
        require_all_written(template, messages, options, text)
        edges = []
        for n in answers(messages):
            with suppress(InvalidRequest):  # not trainable, but usable as a prompt
                edges.append(prompt_length(template, messages, n, options, text))
        tokens = self._tokenize_with_edges(text, edges)
        return self._tokenize(text).ids if tokens is None else tokens.ids

    def render_conversation(
        self,
        messages: Sequence[Message],
        train_on: str,
        options: ChatOptions = NO_CHAT_OPTIONS,
    ) -> Datum:
        """A conversation of T tokens as a cross_entropy datum of T - 1 positions.

        ``target_tokens`` (T - 1,) int64 is the next token, ``weights`` (T - 1,) float32 is 1
        where the next token is to be learned and 0 elsewhere.

        Args:
            messages: Each with ``role`` and ``content``; see ``training.types.Message``.
            train_on: ``assistant``: the tokens after each prompt that the assistant answers,
                with the token that ends its turn. ``all``: also the text of every other given
                message, with its end of turn, but not a system message that the template adds
                itself. ``auto``: ``assistant`` if there is an assistant turn, else ``all``.

        Raises:
            InvalidRequest: ``assistant`` without an assistant turn, or messages that the
                template refuses, drops or rewrites, or whose answers do not follow the prompt
                that the template makes of the messages before.
        """
        if train_on not in TRAIN_ON:
            raise InvalidRequest(f"train_on: {train_on!r} is none of {', '.join(TRAIN_ON)}")
        if options.continue_final_message or not options.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message, add_generation_prompt: define a prompt's end, and this is "
                "a conversation to train on"
            )
        self._template.check(messages, options)
        if self.conversation_fault is not None:
            raise InvalidRequest(
                "messages: this model takes no conversations to train on: "
                f"{self.conversation_fault}. Send token datums instead"
            )
        speaks = any(message["role"] == "assistant" for message in messages)
        if train_on == "assistant" and not speaks:
            raise InvalidRequest("train_on: assistant, but no message has the role assistant")
        everyone = train_on == "all" or not speaks
        if everyone and images_of_messages(messages):
            raise InvalidRequest(
                "train_on: with images only the assistant's messages are trained; send token "
                "datums to train others"
            )
        return self.training_datum(messages, options, everyone=everyone)

    def training_datum(
        self, messages: Sequence[Message], options: ChatOptions, *, everyone: bool
    ) -> Datum:
        """``render_conversation`` of checked messages; ``everyone`` trains all of them."""
        images, read, template = self._with_images(messages)
        rendered = RenderedConversation(template, messages, options, self._tokenize_with_edges)
        ids = list(rendered.tokens.ids)
        weights = np.zeros(len(ids) + 1, dtype=np.float32)
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                end = rendered.end_of_answer(n, self.end_token_ids, self._ends)
                if end is None:
                    ids.append(self._ends.closing(message))
                    end = len(ids)
                weights[rendered.answer(n).start : end] = 1.0
            elif everyone:
                said = rendered.said(n, self.special_texts)
                weights[said.start : said.stop] = 1.0
        if len(ids) < 2:
            raise InvalidRequest("messages: fewer than two tokens, so there is nothing to predict")
        return Datum(
            model_input=np.asarray(ids[:-1], dtype=np.int32),
            loss_fn_inputs={
                "target_tokens": np.asarray(ids[1:], dtype=np.int64),
                "weights": weights[1 : len(ids)],
            },
            images=find_images(ids[:-1], images, read),
        )

    def render_by_first_rules(self, messages: Sequence[Message], train_on: str) -> Datum:
        """The first version's datum of a conversation that it accepted; see ``first_rules``."""
        return first_datum(
            self._template,
            messages,
            train_on,
            tokenize=self._tokenize,
            special_texts=list(self.special_texts.values()),
        )

    # -- tokens ----------------------------------------------------------------------------------

    def _tokenize_with_edges(self, text: str, edges: Sequence[int]) -> EdgedTokens | None:
        """See ``edges``; None if the tokens of a cut text would change the text."""
        tokens = tokenize_with_edges(self._tokenize, text, edges, is_added=self._added.__contains__)
        if tokens.cuts:
            whole = self._tokenize(text)
            if self.written_out(tokens.ids) != self.written_out(whole.ids):
                return None
        return tokens

    def _tokenize(self, text: str) -> TextTokens:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"The text is not valid Unicode: {error.reason}") from error
        # verbose=False: the engine refuses a text longer than the context; no warning is needed.
        encoding = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = encoding["input_ids"]
        if ids and max(ids) >= self._vocab_size:
            raise InvalidRequest(
                f"token {max(ids)} ({self._tokenizer.convert_ids_to_tokens(max(ids))!r}) is "
                f"not in the base model's vocabulary of {self._vocab_size}"
            )
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return TextTokens(ids, offsets)

    def _added_tokens_in(self, text: str) -> list[int]:
        return [token for token in self._ids_of(text) if token in self._added]

    def _ids_of(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer itself puts before every text, such as BOS."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    masks: list[int] = encoding["special_tokens_mask"]
    ids: list[int] = encoding["input_ids"]
    return ids[: masks.index(0)] if 0 in masks else []
