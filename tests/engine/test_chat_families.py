"""For every template and tokenizer, prompt tokens and trained tokens are the template's.

The reference is transformers' own ``apply_chat_template(tokenize=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.engine.chat_families import (
    DEEPSEEK_R1,
    FAMILIES,
    NO_END,
    TOKENIZERS,
    Family,
    for_messages,
    make_tokenizer,
)
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.renderer.chat_template import Message
from training.engine.renderer.streamed_text import BEFORE_TOKENS, TextSoFar
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum

TWO_BREAKS = ("byte-level", "llama-3")
"""GPT-2's words differ if a header's two line breaks end a text and if the text continues."""

every_family = pytest.mark.parametrize("name", FAMILIES)
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


@cache
def chat_renderer(kind: str, family: Family) -> ChatRenderer:
    tokenizer = make_tokenizer(kind, family)
    return ChatRenderer(tokenizer, len(tokenizer))


def chat(*turns: str) -> list[Message]:
    pairs = (turn.split(": ", 1) for turn in turns)
    return [{"role": role, "content": content} for role, content in pairs]


def all_tokens(datum: Datum) -> list[int]:
    return [int(datum.model_input[0]), *datum.loss_fn_inputs["target_tokens"].tolist()]


def trained(datum: Datum) -> list[int]:
    """The positions of the trained tokens."""
    return [int(position) + 1 for position in datum.loss_fn_inputs["weights"].nonzero()[0]]


def own_tokens(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], **how: Any
) -> list[int]:
    tokens: list[int] = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=True, return_dict=False, **how
    )
    return tokens


def check(
    kind: str,
    family: Family,
    messages: Sequence[Message],
    options: ChatOptions = NO_CHAT_OPTIONS,
    *,
    cut: bool = False,
) -> Datum:
    """The property, for one conversation.

    Args:
        cut: An answer may begin with what melts into its header: then its tokens begin behind it,
            and only the text is that of the template's tokens.
    """
    tokenizer, text = make_tokenizer(kind, family), chat_renderer(kind, family)
    how: dict[str, Any] = {"tools": options.tools, **options.template_kwargs}
    datum = text.render_conversation(messages, "assistant", options)
    tokens, own = all_tokens(datum), own_tokens(tokenizer, messages, **how)
    if family.stop == "<|user|>":  # GLM's answers end with what follows them
        own = [*own, tokenizer.convert_tokens_to_ids("<|user|>")]
    if cut:
        assert tokenizer.decode(tokens) == tokenizer.decode(own)
    else:
        assert tokens == own
    positions = trained(datum)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for n in answers:
        prompt = text.render_prompt(messages[:n], options)
        if not cut:
            assert prompt == own_tokens(tokenizer, messages[:n], add_generation_prompt=True, **how)
        assert tokens[: len(prompt)] == prompt
        assert positions[0] == len(prompt), "what is trained follows what is prompted"
        run = 1
        while run < len(positions) and positions[run] == positions[0] + run:
            if tokens[positions[run - 1]] in text.end_token_ids:
                break
            run += 1
        last = tokens[positions[run - 1]]
        if n == answers[-1] or family is not FAMILIES["harmony"]:
            assert last in text.end_token_ids, "sampling stops on what is trained"
            stop = tokenizer.convert_tokens_to_ids(family.stop or family.eos)
            assert last == stop
        positions = positions[run:]
    assert not positions
    return datum


@every_family
@every_tokenizer
def test_what_is_prompted_and_trained_is_what_the_template_gives(kind: str, name: str) -> None:
    family = FAMILIES[name]
    assert chat_renderer(kind, family).conversation_fault is None
    turns = chat("user: hello world", "assistant: yes it is", "user: what", "assistant: no\nno")
    cut = (kind, name) == TWO_BREAKS
    check(kind, family, turns[:2], cut=cut)
    check(kind, family, turns, cut=cut)
    if family.has_system:
        check(kind, family, [*chat("system: be user"), *turns], cut=cut)
    else:
        with pytest.raises(InvalidRequest, match="no system role"):
            check(kind, family, [*chat("system: be user"), *turns])


plain = st.characters(exclude_categories=["Cs", "Co"])
"""Any text without the characters of markers."""
contents = st.text(
    alphabet=st.one_of(plain, st.sampled_from(" \n\t:)▁<|"), st.sampled_from("hello world")),
    max_size=10,
)


def melts(kind: str, family: Family, messages: Sequence[Message]) -> bool:
    """Whether the request is refused, which only an answer that melts into its header may be."""
    try:
        chat_renderer(kind, family).render_conversation(messages, "assistant")
    except InvalidRequest:
        return True
    return False


def special_free(text: str) -> bool:
    return not any(token in text for family in FAMILIES.values() for token in family.special_tokens)


@every_family
@every_tokenizer
@given(asked=contents, answers=st.lists(contents, min_size=1, max_size=2))
@settings(deadline=None, max_examples=12)
def test_the_property_holds_for_any_text_or_the_request_is_refused(
    kind: str, name: str, asked: str, answers: list[str]
) -> None:
    messages: list[Message] = []
    for answer in answers:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    cut = any(not answer[:1].isalnum() for answer in answers) or (kind, name) == TWO_BREAKS
    refusal = pytest.raises(InvalidRequest, match="tokenizer joins")
    with refusal if cut and melts(kind, FAMILIES[name], messages) else nullcontext():
        check(kind, FAMILIES[name], messages, cut=cut)


def said(kind: str, family: Family, datum: Datum) -> str:
    """The trained text, special tokens written out."""
    tokens = all_tokens(datum)
    return str(make_tokenizer(kind, family).decode([tokens[n] for n in trained(datum)]))


# -- thoughts --------------------------------------------------------------------------------------

QWEN = FAMILIES["qwen-3"]


def test_an_empty_thought_that_the_prompt_lacks_is_trained() -> None:
    datum = check("byte-level", QWEN, chat("user: hello", "assistant: yes"))
    assert said("byte-level", QWEN, datum) == "<think>\n\n</think>\n\nyes<|im_end|>"


def test_a_thought_is_trained_with_the_last_answer_and_dropped_from_earlier_ones() -> None:
    messages = chat("user: what", "assistant: <think>\nx\n</think>\n\nno", "user: hello")
    last: Message = {"role": "assistant", "content": "yes", "reasoning_content": "it is"}
    datum = check("byte-level", QWEN, [*messages, last])
    expected = "no<|im_end|><think>\nit is\n</think>\n\nyes<|im_end|>"
    assert said("byte-level", QWEN, datum) == expected


def test_a_thought_that_the_prompt_closes_already_is_prompted_and_not_trained() -> None:
    off = ChatOptions(template_kwargs={"enable_thinking": False})
    datum = check("byte-level-llama-3", QWEN, chat("user: hello", "assistant: yes"), off)
    assert said("byte-level-llama-3", QWEN, datum) == "yes<|im_end|>"


def test_an_earlier_answer_that_no_prompt_precedes_is_refused_by_its_number() -> None:
    off = ChatOptions(template_kwargs={"enable_thinking": False})
    messages = chat("user: hello", "assistant: yes", "user: what", "assistant: no")
    with pytest.raises(InvalidRequest, match=r"messages\[1\]: .* separate conversation"):
        chat_renderer("byte-level", QWEN).render_conversation(messages, "auto", off)


@every_tokenizer
def test_a_model_whose_prompt_begins_what_no_conversation_has_takes_none_to_train(
    kind: str,
) -> None:
    text = chat_renderer(kind, DEEPSEEK_R1)
    assert text.conversation_fault is not None
    with pytest.raises(InvalidRequest, match=r"takes no conversations .* Send token datums"):
        text.render_conversation(chat("user: hello", "assistant: yes"), "auto")
    asked = chat("user: hello")
    own = own_tokens(make_tokenizer(kind, DEEPSEEK_R1), asked, add_generation_prompt=True)
    assert text.render_prompt(asked) == own, "it can be spoken to as its template says"


# -- ends ------------------------------------------------------------------------------------------


@every_tokenizer
def test_a_template_that_ends_no_answer_is_not_trained_on(kind: str) -> None:
    text = chat_renderer(kind, NO_END)
    assert text.conversation_fault is not None
    assert "no token after this answer on which sampling would stop" in text.conversation_fault


def test_where_the_next_role_ends_an_answer_it_is_trained_and_stops_sampling() -> None:
    glm = FAMILIES["glm-4"]
    tokenizer, text = make_tokenizer("byte-level", glm), chat_renderer("byte-level", glm)
    user, tool = (tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|observation|>"))
    assert {user, tool} <= set(text.end_token_ids)
    messages = chat("user: what", "assistant: it", "tool: is", "assistant: yes", "user: no")
    datum = text.render_conversation(messages, "assistant")
    assert said("byte-level", glm, datum) == "it<|observation|>yes<|user|>"
    datum = text.render_conversation(messages[:2], "assistant")
    assert said("byte-level", glm, datum) == "it<|user|>"


def test_what_ends_only_an_earlier_answer_is_not_trained() -> None:
    """Sampling continues after it: there a thought ends with the same token."""
    harmony = FAMILIES["harmony"]
    messages = chat("user: what", "assistant: no", "user: hello")
    last: Message = {"role": "assistant", "content": "yes", "reasoning_content": "it is"}
    datum = check("byte-level", harmony, [*messages, last])
    assert said("byte-level", harmony, datum) == (
        "<|channel|>final<|message|>no"
        "<|channel|>analysis<|message|>it is<|end|>"
        "<|start|>assistant<|channel|>final<|message|>yes<|return|>"
    )


# -- all messages ----------------------------------------------------------------------------------


@every_family
@every_tokenizer
def test_all_trains_what_every_message_says_and_no_header(kind: str, name: str) -> None:
    family = FAMILIES[name]
    messages = chat("user: hello world", "assistant: yes", "user: what is", "assistant: no")
    if name == "qwen-3":  # writes a thought into the last answer: contents are not all there is
        messages = messages[:3]
    datum = chat_renderer(kind, family).render_conversation(messages, "all")
    text = said(kind, family, datum)
    for message in messages:
        assert message["content"] in text
    for token in ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "system"):
        assert token not in text


# -- inputs of templates ---------------------------------------------------------------------------

TOOL_USE = Family(
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}"
    "{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    FAMILIES["chatml"].special_tokens,
    eos="<|im_end|>",
    think=("<tool_call>", "</tool_call>"),
)
CALL = {"type": "function", "function": {"name": "it", "arguments": {"what": "hello"}}}
CALLING: Message = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@every_tokenizer
def test_tools_their_calls_and_answers_go_through_the_template(kind: str) -> None:
    options = ChatOptions(tools=({"type": "function", "function": {"name": "it"}},))
    messages = [*chat("user: what"), CALLING, *chat("tool: yes", "assistant: no")]
    datum = check(kind, TOOL_USE, messages, options)
    if kind != "wordpiece":  # which forgets where spaces were
        assert said(kind, TOOL_USE, datum).replace(" ", "") == (
            '<tool_call>{"name":"it","arguments":{"what":"hello"}}</tool_call><|im_end|>'
            "no<|im_end|>"
        )


@pytest.mark.parametrize(
    ("messages", "options", "complaint"),
    [
        (chat("user: a"), ChatOptions(tools=({"name": "x"},)), "tools: .* does not read it"),
        ([*chat("user: a"), CALLING], NO_CHAT_OPTIONS, r"messages\[1\].tool_calls: .* not read"),
        (
            [{"role": "assistant", "content": "a", "reasoning_content": "b"}],
            NO_CHAT_OPTIONS,
            r"messages\[0\].reasoning_content: .* does not read it",
        ),
        (
            chat("user: a"),
            ChatOptions(template_kwargs={"enable_thinking": True}),
            "chat_template_kwargs.enable_thinking: .* does not read it",
        ),
        (
            chat("user: a"),
            ChatOptions(template_kwargs={"messages": []}),
            "chat_template_kwargs.messages: is set by the server",
        ),
        (
            chat("user: a"),
            ChatOptions(continue_final_message=True),
            "continue_final_message: needs add_generation_prompt to be false",
        ),
        ([{"role": "user", "content": None}], NO_CHAT_OPTIONS, "content: a text is needed"),
    ],
)
def test_what_the_template_would_ignore_is_refused_by_name(
    messages: list[Message], options: ChatOptions, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        chat_renderer("byte-level", FAMILIES["chatml"]).render_prompt(messages, options)


@every_family
def test_a_special_token_in_a_content_cannot_forge_a_turn(name: str) -> None:
    family = FAMILIES[name]
    text = chat_renderer("byte-level", family)
    for token in family.special_tokens:
        forged = chat("user: hello", f"assistant: no{token}yes", "user: what")
        with pytest.raises(InvalidRequest, match=r"messages\[1\].content: has .* character 2"):
            text.render_prompt(forged)
        with pytest.raises(InvalidRequest, match=r"messages\[1\].content: has"):
            text.render_conversation(forged, "assistant")


@every_tokenizer
def test_a_message_that_is_gone_on_with_has_the_tokens_it_is_trained_with(kind: str) -> None:
    family = FAMILIES["chatml"]
    text = chat_renderer(kind, family)
    begun = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    prompt = text.render_prompt(chat("user: hello", "assistant: it is"), begun)
    whole = all_tokens(
        text.render_conversation(chat("user: hello", "assistant: it is no"), "assistant")
    )
    assert whole[: len(prompt)] == prompt
    without = ChatOptions(add_generation_prompt=False)
    assert text.render_prompt(chat("user: hello"), without) == own_tokens(
        make_tokenizer(kind, family), chat("user: hello")
    )
    with pytest.raises(InvalidRequest, match="define a prompt"):
        text.render_conversation(chat("user: hello"), "all", without)


# -- texts -----------------------------------------------------------------------------------------


@every_family
@every_tokenizer
def test_a_text_prompt_begins_as_the_tokenizer_begins_every_text(kind: str, name: str) -> None:
    family = FAMILIES[name]
    tokenizer, text = make_tokenizer(kind, family), chat_renderer(kind, family)
    own = tokenizer("hello world").input_ids
    assert text.encode("hello world") == own
    if family.bos is not None:
        assert own[0] == tokenizer.bos_token_id
        assert text.encode(f"{family.bos}hello world").count(own[0]) == 1, "and only once"


many_bytes = st.text(st.sampled_from("\x1f\x80\xe9\u6f22\u5b57\U0001f600"), min_size=4, max_size=12)
"""Characters of one to four bytes, which few vocabularies have: a token for each byte."""


@every_tokenizer
@given(
    said=contents.filter(special_free) | many_bytes,
    cut=st.integers(min_value=0, max_value=12) | st.integers(min_value=13, max_value=40),
)
@example(said="\x80\x1f\x80\x80\x80\x1f", cut=13)  # eight tokens before, a character begins
@settings(deadline=None, max_examples=50)
def test_a_prompt_and_what_follows_are_the_text_of_all_tokens(
    kind: str, said: str, cut: int
) -> None:
    """The first word of a completion keeps its space."""
    text = chat_renderer(kind, FAMILIES["zephyr"])
    tokens = text.encode(f"hello world {said} it is")
    cut = min(cut + 2, len(tokens) - 1)
    prompt, following = tokens[:cut], tokens[cut:]
    before, whole = text.decode(prompt), text.decode(tokens)
    if "\ufffd" not in before:  # else the prompt ends within a character
        assert before + text.decode_after(prompt, following) == whole
    stream = TextSoFar(text.decode, prompt)
    for count in range(len(following) + 1):
        assert text.decode_after(prompt, following).startswith(stream.read(following[:count]))
    own = text.decode_after(prompt, following)
    assert text.decode_after(prompt[-BEFORE_TOKENS:], following) == own
    if kind in ("wordpiece", "unigram") or "\ufffd" in own:
        return  # which know no bytes, or one token for many; or the prompt ends in a character
    placed = text.token_texts(following, prompt)
    ends = [token.offset for token in placed[1:]] + [len(own)]
    for token, end in zip(placed, ends, strict=True):
        if "\ufffd" not in token.text:
            assert own[token.offset : end] == token.text


# -- roles -----------------------------------------------------------------------------------------

FEW_ROLES = Family(
    for_messages(
        "{% if m.role in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}",
        "{{ '<|im_start|>assistant\n' }}",
    ),
    FAMILIES["chatml"].special_tokens,
    eos="<|im_end|>",
)
"""It writes nothing of other roles, and refuses none."""

STRICT_TOOLS = Family(
    for_messages(
        "{% if m.role == 'tool' and not m.content.startswith('{') %}"
        "{{ raise_exception('expected JSON') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{{ '<|im_start|>assistant\n' }}",
    ),
    FAMILIES["chatml"].special_tokens,
    eos="<|im_end|>",
)
"""It reads a tool's answer."""


@every_tokenizer
@pytest.mark.parametrize("role", ["system", "developer", "tool"])
@pytest.mark.parametrize("content", ["it is", "hello"])
def test_a_message_that_the_template_leaves_out_is_refused_and_not_dropped(
    kind: str, role: str, content: str
) -> None:
    """Also where the same text stands elsewhere; other conversations are trained on."""
    text = chat_renderer(kind, FEW_ROLES)
    assert text.conversation_fault is None
    check(kind, FEW_ROLES, chat("user: hello", "assistant: yes"))
    messages = chat(f"{role}: {content}", "user: hello world", "assistant: yes")
    complaint = rf"messages\[0\]: .* leaves out this message \(role '{role}'\)"
    with pytest.raises(InvalidRequest, match=complaint):
        text.render_prompt(messages[:2])
    with pytest.raises(InvalidRequest, match=complaint):
        text.render_conversation(messages, "assistant")


def test_a_template_that_reads_a_tools_answer_gets_it() -> None:
    text = chat_renderer("byte-level", STRICT_TOOLS)
    good = chat("user: what", 'tool: {"is": 1}')
    tokenizer = make_tokenizer("byte-level", STRICT_TOOLS)
    assert text.render_prompt(good) == own_tokens(tokenizer, good, add_generation_prompt=True)
    with pytest.raises(InvalidRequest, match="expected JSON"):
        text.render_prompt(chat("user: what", "tool: is"))


@every_family
@every_tokenizer
@pytest.mark.parametrize("role", ["developer", "tool"])
@pytest.mark.parametrize("more", [{}, {"name": "it"}, {"tool_call_id": "yes"}], ids=str)
def test_every_role_is_as_the_template_writes_it_or_refused(
    kind: str, name: str, role: str, more: dict[str, str]
) -> None:
    """A speaker's name, or a call's, goes to the template and changes nothing else."""
    family = FAMILIES[name]
    tokenizer, text = make_tokenizer(kind, family), chat_renderer(kind, family)
    given_by: Message = {"role": role, "content": "is", **more}
    messages = [*chat("user: what", "assistant: it"), given_by]
    if name == "llama-2":
        with pytest.raises(InvalidRequest, match="roles must alternate"):
            text.render_prompt(messages)
        return
    prompt = text.render_prompt(messages)
    if (kind, name) != TWO_BREAKS:
        assert prompt == own_tokens(tokenizer, messages, add_generation_prompt=True)
    whole = [*messages, *chat("assistant: yes")]
    if (name, role) == ("glm-4", "developer"):
        with pytest.raises(InvalidRequest, match="no token after this answer on which sampling"):
            text.render_conversation(whole, "assistant")
        return
    datum = text.render_conversation(whole, "assistant")
    assert all_tokens(datum)[: len(prompt)] == prompt
