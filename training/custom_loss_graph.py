"""A client's own loss: a graph of named operations, checked before it runs.

The graph is torch.fx's record of a Python function, as plain data. Checking needs no torch:
that every node is one of the allowed operations, called with an allowed number of arguments, on
results of earlier nodes, and that the last one returns a loss and named metrics.
``training.engine.custom_loss.run`` checks values and sizes when it runs the graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.custom_loss_limits import (
    MAX_DEPTH,
    MAX_INPUTS,
    MAX_INTEGER,
    MAX_ITEMS,
    MAX_NAME,
    MAX_NODES,
    MAX_TEXT,
)
from training.custom_loss_ops import (
    ATTRIBUTES,
    DTYPES,
    FUNCTIONS,
    METHODS,
    NEUTRAL_KWARGS,
    Signature,
)
from training.errors import InvalidRequest, LimitExceeded

FORMAT = 1

_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}", re.ASCII)
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)", re.ASCII)
_FLOATS = ("inf", "-inf", "nan")


@dataclass(frozen=True)
class GraphInput:
    """One input that every datum has."""

    name: str
    rank: int
    """0 is one number, 1 is (N,), 2 is (N, K)."""


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """One operation; arguments are in the uploaded form."""

    name: str
    op: str
    """``placeholder``, ``call_function`` or ``call_method``."""
    target: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomLossGraph:
    """A checked graph."""

    name: str
    inputs: tuple[GraphInput, ...]
    """The first is ``logprobs``."""
    nodes: tuple[GraphNode, ...]
    """In order of execution, without the output."""
    loss: str
    """Name of the node whose value is the loss."""
    metrics: Mapping[str, str]
    """Metric name, such as ``custom/kl:mean``, to the name of the node whose value it is."""


def check_graph(name: Any, inputs: Any, graph: Any) -> CustomLossGraph:
    """The graph of an upload, or of the stored row of one.

    Args:
        name: The loss's name, for messages.
        inputs: ``[{"name", "rank"}]``.
        graph: ``{"format": 1, "nodes": [{"op", "name", "target", "args", "kwargs"}]}``.

    Raises:
        InvalidRequest: The message names the node and the reason. (400)
        LimitExceeded: It has more nodes than this server runs. (400)
    """
    if type(name) is not str or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"name: expected text of up to {MAX_NAME} printable characters")
    declared = _check_inputs(inputs)
    _check_keys(graph, ("format", "nodes"), "graph")
    if type(graph.get("format", FORMAT)) is not int or graph.get("format", FORMAT) != FORMAT:
        raise InvalidRequest(f"graph.format: expected {FORMAT}")
    items = graph.get("nodes")
    if not isinstance(items, list) or not items:
        raise InvalidRequest("graph.nodes: expected a list of nodes")
    if len(items) > MAX_NODES:
        raise LimitExceeded(f"graph.nodes: {len(items)} nodes; this server runs {MAX_NODES}")
    nodes: list[GraphNode] = []
    names: set[str] = set()
    for index, item in enumerate(items):
        node = _check_node(item, f"graph.nodes[{index}]", names)
        if node.op == "output":
            if index != len(items) - 1:
                raise InvalidRequest(f"graph.nodes[{index}]: the output is not the last node")
            loss, metrics = _check_output(node, f"graph.nodes[{index}] ({node.name})", names)
        else:
            nodes.append(node)
        names.add(node.name)
    if node.op != "output":
        raise InvalidRequest("graph.nodes: the last node is not an output")
    placeholders = [node.target for node in nodes if node.op == "placeholder"]
    if placeholders != [item.name for item in declared]:
        raise InvalidRequest(
            f"graph.nodes: placeholders {_shown(placeholders)} are not the inputs, in their order"
        )
    return CustomLossGraph(
        name=name, inputs=declared, nodes=tuple(nodes), loss=loss, metrics=metrics
    )


def graph_as_sent(value: Any) -> Any:
    """A graph from the database, with large floats restored.

    jsonb has one kind of number and writes 1e30 as an integer. No integer argument is so
    large, so it was a float.
    """
    if isinstance(value, dict):
        return {name: graph_as_sent(item) for name, item in value.items()}
    if isinstance(value, list):
        return [graph_as_sent(item) for item in value]
    return float(value) if type(value) is int and abs(value) > MAX_INTEGER else value


def _check_inputs(inputs: Any) -> tuple[GraphInput, ...]:
    if not isinstance(inputs, list) or not 0 < len(inputs) <= MAX_INPUTS:
        raise InvalidRequest(f"inputs: expected a list of 1 to {MAX_INPUTS} inputs")
    declared = []
    for index, item in enumerate(inputs):
        where = f"inputs[{index}]"
        _check_keys(item, ("name", "rank"), where)
        name, rank = item.get("name"), item.get("rank")
        if type(name) is not str or not _INPUT_NAME.fullmatch(name):
            raise InvalidRequest(f"{where}.name: expected a lower-case name; got {_shown(name)}")
        if type(rank) is not int or rank not in (0, 1, 2):
            raise InvalidRequest(f"{where}.rank: expected 0, 1 or 2; got {_shown(rank)}")
        declared.append(GraphInput(name, rank))
    if declared[0].name != "logprobs" or declared[0].rank == 0:
        raise InvalidRequest("inputs[0]: expected logprobs, of rank 1 or 2")
    if len({item.name for item in declared}) < len(declared):
        raise InvalidRequest("inputs: a name occurs twice")
    return tuple(declared)


def _check_node(item: Any, where: str, names: set[str]) -> GraphNode:
    _check_keys(item, ("op", "name", "target", "args", "kwargs"), where)
    name, op, target = item.get("name"), item.get("op"), item.get("target")
    if type(name) is not str or not _NODE_NAME.fullmatch(name):
        raise InvalidRequest(f"{where}.name: expected a name; got {_shown(name)}")
    where = f"{where} ({name})"
    if name in names:
        raise InvalidRequest(f"{where}: the name occurs twice")
    if type(op) is not str or type(target) is not str:
        raise InvalidRequest(f"{where}: op and target must be text")
    args, kwargs = item.get("args", []), item.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise InvalidRequest(f"{where}: args must be a list and kwargs an object")
    budget = [MAX_ITEMS]
    for value in (*args, *kwargs.values()):
        _check_argument(value, where, names, budget, depth=0)
    node = GraphNode(name=name, op=op, target=target, args=args, kwargs=kwargs)
    if op in ("placeholder", "output"):
        if kwargs or (args and op == "placeholder"):
            raise InvalidRequest(f"{where}: {op} takes no further arguments")
        return node
    if op == "call_function":
        known = FUNCTIONS
    elif op == "call_method":
        known = METHODS
    else:
        raise InvalidRequest(f"{where}: {_shown(op)} is not allowed in a custom loss")
    if target not in known:
        raise InvalidRequest(
            f"{where}: {_shown(target)} is not one of the operations of a custom loss"
        )
    _check_call(node, known[target], where)
    return node


def _check_call(node: GraphNode, signature: Signature, where: str) -> None:
    given = {key for key, value in node.kwargs.items() if not is_neutral(key, value, signature)}
    if unknown := sorted(given - signature.kwargs):
        raise InvalidRequest(f"{where}: {node.target} takes no {_shown(unknown[0])} here")
    num_args = len(node.args)
    if num_args > signature.max_args or num_args + len(given) < signature.min_args:
        raise InvalidRequest(
            f"{where}: {node.target} with {num_args} arguments; it takes {signature.min_args} to "
            f"{signature.max_args}"
        )
    if node.op == "call_method" and not (num_args and _is_ref(node.args[0])):
        raise InvalidRequest(f"{where}: {node.target} is not called on a node")
    if node.target == "getattr" and not (
        _is_ref(node.args[0]) and type(node.args[1]) is str and node.args[1] in ATTRIBUTES
    ):
        raise InvalidRequest(f"{where}: getattr may read {', '.join(sorted(ATTRIBUTES))} of a node")
    if node.target == "torch.functional.einsum" and type(node.args[0]) is not str:
        raise InvalidRequest(f"{where}: einsum's first argument must be its equation")


def is_neutral(key: str, value: Any, signature: Signature) -> bool:
    """Whether a keyword argument that the operation does not take has no effect."""
    if key in signature.kwargs or key not in NEUTRAL_KWARGS:
        return False
    return value is None or value is False or (key == "_stacklevel" and type(value) is int)


def _check_argument(
    value: Any, where: str, names: set[str], budget: list[int], *, depth: int
) -> None:
    """Check that a value has the uploaded form of an argument."""
    budget[0] -= 1
    if budget[0] < 0:
        raise LimitExceeded(f"{where}: more than {MAX_ITEMS} values in its arguments")
    if depth > MAX_DEPTH:
        raise LimitExceeded(f"{where}: lists in lists, more than {MAX_DEPTH} deep")
    if value is None or type(value) is bool:
        return
    if type(value) is int and abs(value) <= MAX_INTEGER:
        return
    if type(value) is float and value - value == 0:
        return
    if type(value) is str and _is_plain(value):
        return
    if isinstance(value, list):
        for item in value:
            _check_argument(item, where, names, budget, depth=depth + 1)
        return
    if not isinstance(value, dict) or len(value) != 1:
        raise InvalidRequest(f"{where}: {_shown(value)} is not an argument")
    [(kind, content)] = value.items()
    if kind in ("tuple", "slice", "dict"):
        if kind == "dict":
            items = list(content.values()) if isinstance(content, dict) else None
        else:
            items = content if isinstance(content, list) else None
        if items is None or (kind == "slice" and len(items) != 3):
            raise InvalidRequest(f"{where}: {_shown(value)} is no {kind}")
        if kind == "dict" and not all(map(_is_plain, content)):
            raise InvalidRequest(f"{where}: a key of its {kind} is not plain text")
        for item in items:
            _check_argument(item, where, names, budget, depth=depth + 1)
        return
    if kind == "ref":
        if type(content) is not str or content not in names:
            raise InvalidRequest(f"{where}: {_shown(content)} is not an earlier node")
        return
    is_known = (
        (kind == "ellipsis" and content is True)
        or (kind == "float" and type(content) is str and content in _FLOATS)
        or (kind == "dtype" and type(content) is str and content in DTYPES)
        or (kind == "device" and type(content) is str and _is_plain(content))
    )
    if not is_known:
        raise InvalidRequest(f"{where}: {_shown(value)} is not allowed in a custom loss")


def _check_output(node: GraphNode, where: str, names: set[str]) -> tuple[str, dict[str, str]]:
    """The loss's node and the metrics' nodes by metric name."""
    returned = node.args[0] if len(node.args) == 1 else None
    if isinstance(returned, dict):
        returned = returned.get("tuple")
    if not isinstance(returned, list) or len(returned) != 2 or not _is_ref(returned[0]):
        raise InvalidRequest(f"{where}: a custom loss returns (loss, metrics)")
    metrics = returned[1].get("dict") if isinstance(returned[1], dict) else None
    if not isinstance(metrics, dict):
        raise InvalidRequest(f"{where}: a custom loss returns its metrics as a dictionary")
    for key, value in metrics.items():
        if not _METRIC_NAME.fullmatch(key):
            raise InvalidRequest(
                f"{where}: metric {_shown(key)} is not named custom/<name>:sum or :mean"
            )
        if not _is_ref(value):
            raise InvalidRequest(f"{where}: metric {_shown(key)} is not a node")
    return returned[0]["ref"], {key: value["ref"] for key, value in metrics.items()}


def _is_plain(text: str) -> bool:
    """Whether a text may be an argument for torch: a mode, an equation, a name. It is stored, and
    appears in messages."""
    return len(text) <= MAX_TEXT and text.isascii() and text.isprintable()


def _is_ref(value: Any) -> bool:
    return isinstance(value, dict) and "ref" in value


def _check_keys(value: Any, allowed: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where}: expected an object")
    for key in value:
        if key not in allowed:
            raise InvalidRequest(f"{where}: unknown field {_shown(key)}")


def _shown(value: object) -> str:
    """The value for a message, shortened."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "a large number"  # Python may refuse to print its digits
    if isinstance(value, (str, int, float)) or value is None:
        return repr(value)[:80]
    if isinstance(value, list) and len(value) <= MAX_INPUTS:
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return f"a {type(value).__name__}"
