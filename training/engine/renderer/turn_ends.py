"""Finds the tokens that end an answer, by rendering test conversations with the model's template.

Most templates write a token after the assistant's text. Some (GLM's) write none: there the
token that announces the next role ends the turn, so it must be learned, and sampling must stop
on it. One (gpt-oss's) ends earlier answers with a different token than the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.engine.renderer.chat_template import ChatTemplate, Message
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS

_ANSWER, _NEXT = "\ue002", "\ue003"  # private-use characters: no template writes them

_ASKED: list[Message] = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": _ANSWER},
]


@dataclass(frozen=True)
class TurnEnds:
    """Token ids at the end of the assistant's text."""

    stops: frozenset[int] = frozenset()
    """Tokens with which the template ends an answer; sampling stops on them."""
    earlier: frozenset[int] = frozenset()
    """Tokens after an earlier answer, if they differ from those after the last one."""
    after_last: int | None = None
    """The token that the template would write after the last answer if the user continued, if it
    writes nothing itself; else None."""
    after_call: int | None = None
    """The same if a tool answers next."""

    def closing(self, answer: Message) -> int:
        """The token that closes a last answer after which the template writes none."""
        token = self.after_call if answer.get("tool_calls") else self.after_last
        if token is None:
            raise ValueError("the template closes its last answer itself")
        return token


def find_turn_ends(template: ChatTemplate, find_added: Callable[[str], Sequence[int]]) -> TurnEnds:
    """How this template ends an answer; no stops if it has no end, or refuses a plain question.

    Args:
        find_added: The added tokens in a text, in order.
    """

    def closing(*following: Message) -> int | None:
        try:
            text = template.render([*_ASKED, *following], NO_CHAT_OPTIONS)
        except InvalidRequest:
            return None
        tokens = find_added(text.rpartition(_ANSWER)[2].partition(_NEXT)[0])
        return tokens[0] if tokens else None

    last = closing()
    by_user = closing({"role": "user", "content": _NEXT})
    by_tool = closing({"role": "tool", "content": _NEXT})
    if last is not None:
        earlier = {token for token in (by_user, by_tool) if token not in (None, last)}
        return TurnEnds(frozenset({last}), frozenset(t for t in earlier if t is not None))
    if by_user is None:
        return TurnEnds()
    return TurnEnds(
        stops=frozenset(t for t in (by_user, by_tool) if t is not None),
        after_last=by_user,
        after_call=by_user if by_tool is None else by_tool,
    )
