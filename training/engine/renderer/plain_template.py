"""Whether a chat template only puts texts together, and so needs little memory for short ones.

A template is a program from the model's folder. A time limit ends its loops, but one operation,
such as a text times a number, could still take all of the machine's memory.
"""

from __future__ import annotations

from jinja2 import Environment, TemplateError, nodes

_LARGE = 1000
"""A larger number in a template may be a width."""

_WIDENING = frozenset(
    {"center", "expandtabs", "format", "indent", "int", "ljust", "lipsum", "rjust", "zfill"}
)
"""Filters, methods and functions that can write far more than they are given."""

_REPEATING = frozenset({"join", "replace"})
"""Filters and methods that write a text many times; harmless with a text of the template's own."""


def is_plain_template(template: str) -> bool:
    """Whether no single operation of it can write far more than the texts that it is given.

    A template that cannot be read counts as not plain.
    """
    # S701: it is only parsed.
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701
    try:
        tree = environment.parse(template)
    except TemplateError:
        return False
    if next(tree.find_all((nodes.Mul, nodes.Pow)), None) is not None:
        return False
    for node in tree.find_all(
        (nodes.Const, nodes.Filter, nodes.Getattr, nodes.Getitem, nodes.Name)
    ):
        if isinstance(node, nodes.Const):
            if isinstance(node.value, int | float) and abs(node.value) > _LARGE:
                return False
        elif isinstance(node, nodes.Filter):
            if node.name in _WIDENING or (node.name in _REPEATING and not _has_own_texts(node)):
                return False
        elif _name_of(node) in _WIDENING:
            return False
    return all(map(_repeats_own_text, tree.find_all(nodes.Call)))


def _name_of(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return None


def _repeats_own_text(call: nodes.Call) -> bool:
    """False for ``x.join(...)`` and ``x.replace(..., y)`` with texts that are not its own."""
    function = call.node
    name = _name_of(function)
    if name not in _REPEATING:
        return True
    if name == "replace":
        return _has_own_texts(call)
    return isinstance(function, nodes.Getattr) and isinstance(function.node, nodes.Const)


def _has_own_texts(node: nodes.Call | nodes.Filter) -> bool:
    return (
        all(isinstance(argument, nodes.Const) for argument in node.args)
        and not node.kwargs
        and node.dyn_args is None
        and node.dyn_kwargs is None
    )
