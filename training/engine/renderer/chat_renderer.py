"""Text into tokens and back: the base model's tokenizer and its chat template.

A conversation is rendered by the model's own template and tokenized whole. What is trained of an
answer is what follows the prompt that would have been sampled from, up to the token on which
sampling stops. So one property holds for whatever is accepted: **the tokens prompted and the
tokens trained are the tokens that the template gives, and sampling stops on what was trained.**
What cannot have it is refused by name; no mask is ever guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np

from training.engine.interface import Renderer
from training.engine.renderer.chat_template import ChatTemplate, Message
from training.engine.renderer.edges import EdgedTokens, TextTokens, tokenize_with_edges
from training.engine.renderer.first_rules import first_datum
from training.engine.renderer.rendered import RenderedConversation, answers, prompt_length
from training.engine.renderer.template_check import find_fault
from training.engine.renderer.token_texts import TokenTexts
from training.engine.renderer.tokenizer import Tokenizer
from training.engine.renderer.turn_ends import find_turn_ends
from training.engine.sampler.stop_strings import text_after
from training.engine.time_limit import time_limit
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum, TokenText

TRY_SECONDS = 5.0
"""What a template may take for a short conversation when it is tried."""

TRAIN_ON = ("auto", "assistant", "all")


class ChatRenderer(Renderer):
    """One base model's tokenizer, with its chat template. Holds no state between calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        end_token_ids: Iterable[int] = (),
    ) -> None:
        """
        Args:
            tokenizer: A fast one: its character offsets are needed.
            vocab_size: How many tokens the base model knows. A tokenizer may know more.
            end_token_ids: End tokens beside the tokenizer's own, such as those of the model's
                generation configuration.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._template = ChatTemplate(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._added = {i: t.content for i, t in added.items() if not t.content.isspace()}
        self.special_texts = {i: t.content for i, t in added.items() if t.special}
        """Special tokens, written out; ``decode`` leaves them out."""
        self._first_tokens = _first_tokens(tokenizer)
        self._token_texts = TokenTexts(tokenizer, neutral=self._ids_of("a")[-1:])
        with time_limit(TRY_SECONDS):
            self._ends = find_turn_ends(self._template, self._added_tokens_in)
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.end_token_ids: tuple[int, ...] = tuple(
            sorted({*own, *end_token_ids, *self._ends.stops})
        )
        """Where the model itself ends what it says: the tokenizer's end token, those handed in,
        and what the chat template writes after what the assistant says."""
        with time_limit(TRY_SECONDS):
            self.conversation_fault = find_fault(self, self._template)
        """Why no conversation can be trained on; None if they can be."""

    # -- text ------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Text as the token ids of a prompt; a special token written out becomes that token.

        What the tokenizer itself begins every text with (a BOS token, for many) comes first,
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
        """What ``tokens`` add to the text of those before, the first word's space included."""
        return text_after(self.decode, before, tokens)

    def token_texts(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[TokenText]:
        """Each sampled token by itself, placed in the text of all of them.

        Args:
            before: The tokens that these follow; see ``decode_after``.
        """
        return self._token_texts.of_sample(tokens, before)

    def prompt_texts(
        self, tokens: Sequence[int], text: str | None = None
    ) -> tuple[str, list[TokenText]]:
        """A prompt's text and each of its tokens; see ``TokenTexts.of_prompt``."""
        return self._token_texts.of_prompt(tokens, text)

    # -- conversations ---------------------------------------------------------------------------

    def render_prompt(
        self, messages: Sequence[Message], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> list[int]:
        """A conversation as the T tokens of a prompt that ends where the assistant speaks.

        They are the tokens that the template gives, and those that ``render_conversation`` gives
        for the same messages, so what was trained after them is what is sampled after them.

        Raises:
            InvalidRequest: The template refuses the messages, or there is none.
        """
        self._template.check(messages, options)
        if options.continue_final_message and options.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message: needs add_generation_prompt to be false, for the last "
                "message is gone on with and no other begins"
            )
        text = self._template.render(
            messages,
            options,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
        )
        edges = []
        for n in answers(messages):
            with suppress(InvalidRequest):  # nobody trains on it, but it can be spoken to
                edges.append(prompt_length(self._template, messages, n, options, text))
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
            train_on: ``assistant``: what follows each prompt that ends where the assistant speaks,
                with the token that ends its turn. ``all``: that, and what every other message
                given says, with its end of turn, but not a system message that the template adds
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
                "continue_final_message, add_generation_prompt: say how a prompt ends, and this "
                "is a conversation to train on"
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
        return self.training_datum(messages, options, everyone=train_on == "all" or not speaks)

    def training_datum(
        self, messages: Sequence[Message], options: ChatOptions, *, everyone: bool
    ) -> Datum:
        """``render_conversation`` of what has been checked; ``everyone`` trains all messages."""
        rendered = RenderedConversation(
            self._template, messages, options, self._tokenize_with_edges
        )
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
        )

    def render_by_first_rules(self, messages: Sequence[Message], train_on: str) -> Datum:
        """What the first version made of a conversation that it accepted; see ``first_rules``."""
        return first_datum(
            self._template,
            messages,
            train_on,
            tokenize=self._tokenize,
            special_texts=list(self.special_texts.values()),
        )

    # -- tokens ----------------------------------------------------------------------------------

    def _tokenize_with_edges(self, text: str, edges: Sequence[int]) -> EdgedTokens | None:
        """See ``edges``; None where tokens of a cut text would not be the text's."""
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
        # verbose=False: a text longer than the context is the engine's to refuse, not a warning.
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
    """What the tokenizer puts before every text by itself, such as a BOS token."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    masks: list[int] = encoding["special_tokens_mask"]
    ids: list[int] = encoding["input_ids"]
    return ids[: masks.index(0)] if 0 in masks else []
