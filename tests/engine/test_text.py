"""A conversation becomes the tokens, targets and weights that the chat template implies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_model import (
    DEFAULT_SYSTEM_MESSAGE,
    END_TOKEN,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    make_tokenizer,
)
from training.engine.renderer import chat_renderer as text_module
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.renderer.chat_template import Message
from training.errors import InvalidRequest
from training.types import Datum

END = "<|im_end|>"
HEAD = f"<|im_start|>system\n{DEFAULT_SYSTEM_MESSAGE}{END}\n"

TINY = ChatRenderer(make_tokenizer(), VOCAB_SIZE)

contents = st.text(
    alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t")),
    max_size=12,
)
messages_of_any_roles = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}
    ),
    min_size=1,
    max_size=5,
)


def chat(*turns: str) -> list[Message]:
    """``chat("user: hi", "assistant: yes")`` as messages."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return [{"role": role, "content": content} for role, content in pairs]


def text_with_template(chat_template: str | None) -> ChatRenderer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    return ChatRenderer(tokenizer, VOCAB_SIZE)


def trained_tokens(datum: Datum) -> list[int]:
    inputs = datum.loss_fn_inputs
    return list(inputs["target_tokens"][inputs["weights"] > 0])


def trained_text(datum: Datum) -> str:
    """The datum's trained text, special tokens written out."""
    return str(make_tokenizer().decode(trained_tokens(datum)))


def all_tokens(datum: Datum) -> list[int]:
    return [*datum.model_input, datum.loss_fn_inputs["target_tokens"][-1]]


def said(messages: Sequence[Message], roles: Sequence[str]) -> str:
    return "".join(m["content"] + END for m in messages if m["role"] in roles)


# -- by hand ---------------------------------------------------------------------------------------


def test_a_conversation_is_rendered_shifted_and_weighted_as_written_out_by_hand() -> None:
    datum = TINY.render_conversation(chat("system: s", "user: u", "assistant: ok"), "assistant")
    rendered = (
        f"<|im_start|>system\ns{END}\n<|im_start|>user\nu{END}\n<|im_start|>assistant\nok{END}\n"
    )
    tokens = make_tokenizer()(rendered, add_special_tokens=False).input_ids
    # One token per byte and special token: "o", "k" and the end token stand before the newline.
    expected = [0.0] * len(tokens)
    expected[-4:-1] = [1.0, 1.0, 1.0]
    inputs = datum.loss_fn_inputs
    assert datum.model_input.tolist() == tokens[:-1]
    assert inputs["target_tokens"].tolist() == tokens[1:]
    assert inputs["weights"].tolist() == expected[1:]
    assert datum.model_input.dtype == np.int32
    assert inputs["target_tokens"].dtype == np.int64
    assert inputs["weights"].dtype == np.float32


def test_a_system_message_that_the_template_adds_is_not_trained() -> None:
    datum = TINY.render_conversation(chat("user: test"), "all")
    assert trained_text(datum) == f"test{END}"
    assert make_tokenizer().decode(all_tokens(datum)) == f"{HEAD}<|im_start|>user\ntest{END}\n"


def test_auto_trains_the_assistant_or_else_everything() -> None:
    assert trained_text(TINY.render_conversation(chat("user: a"), "auto")) == f"a{END}"
    both = chat("user: a", "assistant: b")
    assert trained_text(TINY.render_conversation(both, "auto")) == f"b{END}"


def test_an_empty_reply_trains_its_end_of_turn() -> None:
    datum = TINY.render_conversation(chat("user: a", "assistant: "), "assistant")
    assert trained_tokens(datum) == [END_TOKEN]


def test_a_content_that_looks_like_the_template_is_found_where_it_is() -> None:
    """Searching for the content would find these words in a header first."""
    tricky = chat("user: user", "assistant: assistant", "user: im_end", "assistant: \n")
    datum = TINY.render_conversation(tricky, "all")
    assert trained_text(datum) == f"user{END}assistant{END}im_end{END}\n{END}"


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    prompt = TINY.render_prompt(chat("user: hi"))
    assert (
        make_tokenizer().decode(prompt)
        == f"{HEAD}<|im_start|>user\nhi{END}\n<|im_start|>assistant\n"
    )


# -- properties ------------------------------------------------------------------------------------


@given(messages_of_any_roles)
@settings(deadline=None)
def test_all_trains_every_content_and_end_of_turn(messages: list[Message]) -> None:
    datum = TINY.render_conversation(messages, "all")
    assert trained_text(datum) == said(messages, ["system", "user", "assistant"])


@given(messages_of_any_roles)
@settings(deadline=None)
def test_auto_trains_what_the_assistant_says(messages: list[Message]) -> None:
    roles = {message["role"] for message in messages}
    expected = said(messages, ["assistant"] if "assistant" in roles else ["system", "user"])
    assert trained_text(TINY.render_conversation(messages, "auto")) == expected


@given(messages_of_any_roles, st.sampled_from(["auto", "all"]))
@settings(deadline=None)
def test_tokens_are_those_of_the_template_and_shifted_by_one(
    messages: list[Message], train_on: str
) -> None:
    datum = TINY.render_conversation(messages, train_on)
    whole = make_tokenizer().apply_chat_template(messages, tokenize=False)
    assert all_tokens(datum) == make_tokenizer()(whole, add_special_tokens=False).input_ids
    assert list(datum.model_input[1:]) == list(datum.loss_fn_inputs["target_tokens"][:-1])


@given(messages_of_any_roles, contents)
@settings(deadline=None)
def test_what_is_trained_follows_the_prompt_that_is_sampled_from(
    messages: list[Message], reply: str
) -> None:
    prompt = TINY.render_prompt(messages)
    conversation = [*messages, {"role": "assistant", "content": reply}]
    assert all_tokens(TINY.render_conversation(conversation, "auto"))[: len(prompt)] == prompt


@given(contents)
@settings(deadline=None)
def test_decode_undoes_encode(text: str) -> None:
    assert TINY.decode(TINY.encode(text)) == text


# -- a tokenizer whose merges cross the template's edges -------------------------------------------


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Like the tiny one, but newlines and spaces melt together, as in real tokenizers."""
    plain = make_tokenizer()
    pieces = sorted(plain.get_vocab(), key=plain.get_vocab().__getitem__)
    vocab = {piece: n for n, piece in enumerate([*pieces, "ĊĊ", "ĊĠ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("Ċ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[1],
        eos_token=END,
        unk_token=SPECIAL_TOKENS[0],
    )
    fast.chat_template = plain.chat_template
    return fast


@given(messages_of_any_roles, contents)
@example([{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}], "\n")
@settings(deadline=None)
def test_no_token_melts_a_header_into_what_follows_it(messages: list[Message], reply: str) -> None:
    assume(messages[0]["role"] != "assistant")  # it follows no prompt: see the next test
    text = ChatRenderer(merging_tokenizer(), VOCAB_SIZE + 2)
    conversation = [*messages, {"role": "assistant", "content": reply}]
    datum = text.render_conversation(conversation, "assistant")
    assert merging_tokenizer().decode(trained_tokens(datum)) == said(conversation, ["assistant"])
    prompt = text.render_prompt(messages)
    assert all_tokens(datum)[: len(prompt)] == prompt


@pytest.mark.parametrize("content", [" ", "\n", " x"])
def test_an_answer_without_a_prompt_has_the_tokens_of_the_whole_text(content: str) -> None:
    tokenizer = merging_tokenizer()
    text = ChatRenderer(tokenizer, VOCAB_SIZE + 2)
    conversation = chat(f"assistant: {content}", "user: u")
    datum = text.render_conversation(conversation, "assistant")
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert all_tokens(datum) == tokenizer(whole, add_special_tokens=False).input_ids
    # The first trained token has the header's last newline too.
    assert tokenizer.decode(trained_tokens(datum)) == f"\n{content}{END}"


def test_where_nothing_melts_the_tokens_are_those_of_the_whole_text() -> None:
    text = ChatRenderer(merging_tokenizer(), VOCAB_SIZE + 2)
    messages = chat("user: a\n\nb", "assistant: c\n d")
    whole = merging_tokenizer().apply_chat_template(messages, tokenize=False)
    expected = merging_tokenizer()(whole, add_special_tokens=False).input_ids
    assert all_tokens(text.render_conversation(messages, "all")) == expected


# -- other templates -------------------------------------------------------------------------------

LLAMA_2_LIKE = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('start with user') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'].strip() }} <|im_end|>{% endif %}"
    "{% endfor %}"
)


def test_a_template_that_trims_contents_trains_what_it_leaves() -> None:
    text = text_with_template(LLAMA_2_LIKE)
    messages = chat("user:  hi \n", "assistant: \tyes ")
    assert trained_text(text.render_conversation(messages, "assistant")) == f" yes {END}"
    # The user's text has no end of turn in this template.
    assert trained_text(text.render_conversation(messages, "all")) == f"hi yes {END}"


def test_a_template_that_refuses_the_messages_refuses_the_request() -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages: start with user"):
        text_with_template(LLAMA_2_LIKE).render_conversation(chat("assistant: a"), "all")


def test_a_role_that_the_template_leaves_out_is_named() -> None:
    messages = [*chat("user: a"), {"role": "critic", "content": "b"}]
    with pytest.raises(InvalidRequest, match=r"messages\[1\]: .* \(role 'critic'\)"):
        text_with_template(LLAMA_2_LIKE).render_conversation(messages, "all")


def test_where_contents_are_rewritten_an_answer_is_what_follows_its_prompt() -> None:
    """The text of other messages cannot be located there, so it is not trained."""
    shouting = text_with_template(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = chat("user: aa", "assistant: bb", "user: cc", "assistant: dd")
    datum = shouting.render_conversation(messages, "assistant")
    assert trained_text(datum) == f"BB{END}DD{END}"
    with pytest.raises(InvalidRequest, match=r"messages\[0\]: .* rewrites these contents"):
        shouting.render_conversation(messages, "all")
    assert shouting.render_prompt(chat("user: aa")) == shouting.encode(f"user:AA{END}assistant:")


def test_a_template_that_asks_for_the_date_is_told_the_same_one_every_day() -> None:
    dated = text_with_template("{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}")
    assert dated.decode(dated.render_prompt(chat("user: x"))) == "26 Jul 2024x"


def test_a_template_that_does_not_end_is_found_out_when_it_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_module, "TRY_SECONDS", 0.2)
    loops = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    assert "takes more than 0.2 seconds" in str(text_with_template(loops).conversation_fault)
    assert text_with_template(loops).encode("a") == TINY.encode("a"), "and text is served"


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        text_with_template(None).render_prompt(chat("user: a"))


# -- end tokens, text ------------------------------------------------------------------------------


def test_end_tokens_are_the_tokenizers_the_models_and_the_templates() -> None:
    assert TINY.end_token_ids == (END_TOKEN,)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = SPECIAL_TOKENS[0]  # a base model whose template says otherwise
    assert ChatRenderer(tokenizer, VOCAB_SIZE, end_token_ids=[9]).end_token_ids == (0, END_TOKEN, 9)


def test_decode_leaves_special_tokens_out_and_encode_reads_them() -> None:
    tokens = TINY.encode(f"a{END}b")
    assert END_TOKEN in tokens
    assert len(tokens) == 3
    assert TINY.decode(tokens) == "ab"


def test_decode_of_a_token_without_text_adds_nothing() -> None:
    """A model may have more rows in its head than its tokenizer has tokens."""
    assert TINY.decode([*TINY.encode("a"), VOCAB_SIZE + 7]) == "a"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "train_on", "complaint"),
    [
        ([], "auto", "messages: empty"),
        (chat("user: a"), "assistant", "no message has the role assistant"),
        (chat("user: a"), "everything", "train_on: 'everything' is none of"),
        ([{"role": "user"}], "auto", r"messages\[0\].content: a text is needed"),
        ([{"content": "a"}], "auto", r"messages\[0\].role: a text is needed"),
        (chat("user: \ud800"), "auto", "not valid Unicode"),
    ],
)
def test_a_bad_conversation_is_refused_by_name(
    messages: list[Message], train_on: str, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        TINY.render_conversation(messages, train_on)


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    small = ChatRenderer(make_tokenizer(), END_TOKEN + 1)
    assert small.encode(END) == [END_TOKEN]
    with pytest.raises(InvalidRequest, match="not in the base model's vocabulary of 3"):
        small.encode("a")
