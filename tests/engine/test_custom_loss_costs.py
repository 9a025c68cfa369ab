"""Costs of custom losses' operations: counted before they run, and never too low."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.custom_loss_fuzz import INPUTS, OPERATIONS, RandomGraph
from training.custom_loss_graph import check_graph
from training.custom_loss_limits import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_TENSORS
from training.engine.custom_loss import run
from training.engine.custom_loss.arguments import Call
from training.engine.custom_loss.cost import Cost, excess
from training.engine.custom_loss.costs import RULES
from training.engine.custom_loss.run import Work, run_custom_loss
from training.errors import InvalidRequest, LimitExceeded, NonFiniteResult

ZEROS = torch.zeros(3, 4)


def cost(rule: str, *args: Any, **kwargs: Any) -> Cost:
    return RULES[rule](Call(args=args, kwargs=kwargs))


def test_every_operation_names_a_rule_and_every_rule_has_operations() -> None:
    assert {signature.cost for _, _, signature in OPERATIONS} == set(RULES)


@pytest.mark.parametrize(
    ("rule", "args", "tensors"),
    [
        ("rows", (torch.zeros(2**22, 0),), 2**22),
        ("rows", (ZEROS, 1), 4),
        ("splits", (torch.zeros(2**22), 1), 2**22),
        ("splits", (torch.zeros(10), 4), 3),
        ("splits", (torch.zeros(10), [3, 7]), 2),
        ("chunks", (torch.zeros(0), 2**53), 2**53),
        ("chunks", (torch.zeros(10), 2**53), 10),
        ("differences", (torch.zeros(5), 2**20), 2**20),
        ("shifting", (torch.zeros(5), [1] * 90, [0] * 90), 90),
        ("joining", ([ZEROS] * 150,), 151),
        ("elementwise", (), 1),
    ],
)
def test_tensors_are_counted_those_without_elements_too(
    rule: str, args: tuple[Any, ...], tensors: int
) -> None:
    rule = "light" if rule == "elementwise" else rule
    assert cost(rule, *args).tensors == tensors


@pytest.mark.parametrize(
    ("rule", "args", "elements"),
    [
        ("light", (torch.zeros(5, 1), torch.zeros(1, 7)), 35),
        ("filling", ([2**22, 0],), 2**22),
        ("filling", (2**31, 2**31, 2**31), 2**93),
        ("spreading", (torch.zeros(1), 2**32, 2**32), 2**64),
        ("repeating", (torch.zeros(0), 2**53), 2**53),
        ("repeating", (torch.zeros(3), 5, 2), 30),
        ("range", (0, 2**53, 1), 2**53 + 1),
        ("range", (10,), 11),
        ("square", (2**20,), 2**40),
        ("reduction", (torch.zeros(2**20, 0), 1), 2**20),
        ("reduction", (ZEROS, [0, 1]), 1),
        ("reduction", (ZEROS,), 1),
        ("differences", (torch.zeros(16), 8), 128),
        # The places that a mask picks: a number for each dimension, beside the values.
        ("selection", (torch.zeros(16, 1), torch.ones(1, 16, dtype=torch.bool)), 3 * 256),
        ("indexing", (torch.zeros(9, 4), torch.tensor([[0, 1, 2]])), 12),
        ("indexing", (torch.zeros(9, 4), slice(2, None, 3)), 12),
        ("indexing", (torch.zeros(9, 4), (..., None, 1)), 9),
        # A product of stacks copies what it broadcasts.
        ("product", (torch.zeros(5, 2, 3), torch.zeros(3, 4)), 5 * (2 * 4 + 2 * 3 + 3 * 4)),
    ],
)
def test_elements_are_counted_with_what_is_made_on_the_way(
    rule: str, args: tuple[Any, ...], elements: int
) -> None:
    assert cost(rule, *args).elements == elements


@pytest.mark.parametrize(
    ("rule", "args", "multiplications"),
    [
        ("product", (torch.zeros(5, 2, 3), torch.zeros(5, 3, 4)), 5 * 2 * 3 * 4),
        ("product", (torch.zeros(6), torch.zeros(6)), 6),
        ("product", (torch.ones(2, 2).long(), torch.ones(2, 2).long()), 32 * 8),
        ("contraction", ("ij , jk", torch.zeros(2, 3), torch.zeros(3, 4)), 24),
        ("contraction", ("a,b -> b", torch.zeros(2**10), torch.zeros(2**10)), 2**20),
    ],
)
def test_products_are_counted_by_their_multiplications(
    rule: str, args: tuple[Any, ...], multiplications: int
) -> None:
    assert cost(rule, *args).multiplications == multiplications


def test_a_part_costs_its_whole_input_backwards() -> None:
    """A gradient of the input's size is filled with zeros for every part that is taken."""
    assert cost("indexing", torch.zeros(10**6), 3).steps > 10**6
    assert cost("part", torch.zeros(10**6), 0, 3).steps > 10**6


def graph(*nodes: tuple[str, str, list[Any]]) -> Any:
    """``logprobs``, the nodes as (name, target, args), and the sum of logprobs as the loss."""
    calls = [
        {"op": "call_function" if "." in target else "call_method", "name": name,
         "target": target, "args": args}
        for name, target, args in (*nodes, ("loss", "torch.sum", [{"ref": "logprobs"}]))
    ]  # fmt: skip
    returned = {"tuple": [{"ref": "loss"}, {"dict": {}}]}
    placeholder = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    output = {"op": "output", "name": "output", "target": "output", "args": [returned]}
    return check_graph("hostile", INPUTS, {"format": 1, "nodes": [placeholder, *calls, output]})


X = {"ref": "x"}
LARGE = ("x", "torch.ones", [[2**22]])


@pytest.mark.parametrize(
    ("nodes", "asked", "limit"),
    [
        ([("x", "torch.zeros", [[2**22, 0]]), ("y", "unbind", [X])], 2**22, MAX_TENSORS),
        ([("x", "torch.zeros", [[0]]), ("y", "chunk", [X, 2**53])], 2**53, MAX_TENSORS),
        ([("x", "torch.ones", [[9]]), ("y", "torch.diff", [X, 2**20])], 2**20, MAX_TENSORS),
        ([("x", "torch.zeros", [[0]]), ("y", "tile", [X, 2**53])], 2**53, MAX_ELEMENTS),
        ([LARGE, ("y", "reshape", [X, [1] * 20 + [-1]])], 21, MAX_DIMENSIONS),
        ([LARGE, ("y", "operator.getitem", [X, {"tuple": [None] * 99}])], 100, MAX_DIMENSIONS),
    ],
)
def test_a_refusal_names_the_node_what_was_asked_and_the_limit(
    nodes: Any, asked: int, limit: int
) -> None:
    with pytest.raises(LimitExceeded) as refusal:
        run_custom_loss(graph(*nodes), torch.tensor([-1.0, -2.0]), {}, Work())
    name, target, _ = nodes[-1]
    message = str(refusal.value)
    assert message.startswith(f"custom loss 'hostile', node {name} ({target}): {asked} ")
    assert f"may have {limit}" in message


def test_nothing_that_was_computed_once_is_refused_when_it_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Limits may become stricter with a new version; a run's log must still be replayed."""
    checked = graph(("x", "torch.ones", [[2**10]]))
    logprobs = torch.tensor([-1.0, -2.0])
    before = run_custom_loss(checked, logprobs, {}, Work())
    monkeypatch.setattr(run, "MAX_ELEMENTS", 2**8)
    with pytest.raises(LimitExceeded):
        run_custom_loss(checked, logprobs, {}, Work())
    again = run_custom_loss(checked, logprobs, {}, Work(is_replay=True))
    assert again.loss == before.loss


def test_no_rule_says_less_than_what_its_operation_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random graphs of every operation, small enough to compute hundreds."""
    missed: list[tuple[str, Cost]] = []

    def noted(found: Cost, expected: Cost) -> Cost:
        more = excess(found, expected)
        if more.elements or more.tensors or found.largest > expected.elements:
            missed.append((name, more))
        return more

    monkeypatch.setattr(run, "excess", noted)
    monkeypatch.setattr(run, "MAX_ELEMENTS", 2**13)
    monkeypatch.setattr(run, "MAX_STEPS", 2**24)
    monkeypatch.setattr("tests.engine.custom_loss_fuzz.HOSTILE_SHAPES", [[2**10], [64, 1], [9, 0]])
    computed = set()
    for number in range(3 * len(OPERATIONS)):
        operation = OPERATIONS[number % len(OPERATIONS)]
        name = f"{operation[1]} of graph {number}"
        try:
            checked = check_graph("fuzz", INPUTS, RandomGraph(str(number), operation).graph)
            run_custom_loss(checked, torch.tensor([-1.0, -2.0]), {}, Work())
        except (InvalidRequest, NonFiniteResult):
            continue
        computed.add(operation[:2])
    assert not missed
    assert len(computed) > len(OPERATIONS) / 2
