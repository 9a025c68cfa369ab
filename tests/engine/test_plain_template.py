"""Which chat templates can write far more than the texts that they are given, at once."""

from __future__ import annotations

import pytest

from tests.engine.chat_families import FAMILIES, Family
from training.engine.renderer.plain_template import is_plain_template

LOOP = "{% for m in messages %}{{ MARK }}{% endfor %}"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_families_templates_are_plain(family: Family) -> None:
    assert is_plain_template(family.template)


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | trim",
        "m['content'].strip() + '\n'",
        "m.content.split('</think>')[-1]",
        "m.content.replace('<think>', '') | replace('\n\n', '\n')",
        "', '.join(m.names) ~ (m.names | join(', '))",
        "m.tools | tojson(indent=4)",
        "messages[::-1][loop.index0 - 1].content",
        "'even' if loop.index0 % 2 == 0",
    ],
)
def test_what_puts_texts_together_is_plain(expression: str) -> None:
    assert is_plain_template(LOOP.replace("MARK", expression))


@pytest.mark.parametrize(
    "expression",
    [
        "m.content * 2",
        "9 ** 9",
        "m.content | center(m.n)",
        "m.content.ljust(m.n)",
        "m.content['zfill'](m.n)",
        "'%s' | format(m.content)",
        "'{:>{}}'.format(m.content, m.n)",
        "range(m.content | int)",
        "range(1000000)",
        "m.tools | tojson(indent=100000)",
        "m.content | indent(m.n)",
        "lipsum(m.n)",
        "m.content.replace('', m.content)",
        "m.content | replace('', m.content)",
        "m.content.join(m.names)",
        "m.names | join(m.content)",
        "m.names | join(d=m.content)",
    ],
)
def test_what_can_repeat_or_widen_a_text_is_not(expression: str) -> None:
    assert not is_plain_template(LOOP.replace("MARK", expression))


def test_a_template_that_cannot_be_read_is_not() -> None:
    assert not is_plain_template("{% for %}")
