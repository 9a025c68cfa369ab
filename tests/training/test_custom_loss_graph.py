"""The checker of uploaded losses: accepted graphs, and no exceptions except refusals."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.custom_loss_graph import MAX_NODES, check_graph
from training.custom_loss_ops import FUNCTIONS, METHODS
from training.errors import InvalidRequest, LimitExceeded

INPUTS = [{"name": "logprobs", "rank": 1}, {"name": "advantages", "rank": 1}]


def node(op, name, target, *args, **kwargs):
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def call(target, *args, **kwargs):
    return node("call_function", "x", target, *args, **kwargs)


def ref(name):
    return {"ref": name}


def graph_with(*nodes, metrics=None, loss="x"):
    """Two placeholders, the nodes, and an output."""
    placeholders = [node("placeholder", item["name"], item["name"]) for item in INPUTS]
    returned = {"tuple": [ref(loss), {"dict": metrics or {}}]}
    return {
        "format": 1,
        "nodes": [*placeholders, *nodes, node("output", "output", "output", returned)],
    }


GOOD = graph_with(
    call("operator.mul", ref("logprobs"), ref("advantages")),
    node("call_method", "sum_1", "sum", ref("x"), dim=-1),
    metrics={"custom/kl:mean": ref("sum_1")},
    loss="sum_1",
)


def refusal(graph, inputs=INPUTS, name="loss"):
    with pytest.raises(InvalidRequest) as error:
        check_graph(name, inputs, graph)
    return str(error.value)


def test_a_good_graph_is_its_nodes_in_order():
    graph = check_graph("loss", INPUTS, GOOD)
    assert [item.name for item in graph.nodes] == ["logprobs", "advantages", "x", "sum_1"]
    assert [(item.name, item.rank) for item in graph.inputs] == [("logprobs", 1), ("advantages", 1)]
    assert (graph.loss, graph.metrics) == ("sum_1", {"custom/kl:mean": "sum_1"})


FORBIDDEN = [
    "__import__", "builtins.__import__", "eval", "exec", "open", "compile", "setattr", "delattr",
    "os.system", "subprocess.run", "torch.load", "torch.save", "torch.ops.aten.add", "torch.rand",
    "torch.utils.cpp_extension.load", "torch.hub.load", "torch.manual_seed", "torch.from_file",
    "torch.set_default_device", "operator.attrgetter", "operator.methodcaller", "operator.setitem",
    "operator.lshift", "operator.imul", "math.factorial", "torch.__dict__", "numpy.load",
    "torch._C._nn", "torch", "", "torch.exp ", "torch..exp", "torch.nn.functional.dropout",
]  # fmt: skip
FORBIDDEN_METHODS = [
    "__class__", "__reduce__", "__reduce_ex__", "__setstate__", "__getattribute__", "backward",
    "item", "tolist", "numpy", "data_ptr", "storage", "untyped_storage", "apply_", "map_", "set_",
    "register_hook", "share_memory_", "cuda", "cpu", "add_", "copy_", "requires_grad_", "type",
    "bernoulli", "uniform_", "resize_", "",
]  # fmt: skip


@pytest.mark.parametrize("target", FORBIDDEN)
def test_a_function_that_is_not_listed_is_refused_by_name(target):
    message = refusal(graph_with(call(target, ref("logprobs"))))
    assert message.startswith(f"graph.nodes[2] (x): {target!r} is not one of the operations")


@pytest.mark.parametrize("target", FORBIDDEN_METHODS)
def test_a_method_that_is_not_listed_is_refused_by_name(target):
    message = refusal(graph_with(node("call_method", "x", target, ref("logprobs"))))
    assert message.startswith(f"graph.nodes[2] (x): {target!r} is not one of the operations")


def test_nothing_listed_is_private_in_place_or_leaves_torch():
    for name in (*METHODS, *(name.rpartition(".")[2] for name in FUNCTIONS)):
        assert not name.startswith("_")
        assert not name.endswith("_") or name in ("and_", "or_")
    assert not {"item", "tolist", "numpy", "backward"} & set(METHODS)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("get_attr", "x", "weight")], "(x): 'get_attr' is not allowed"),
        ([node("call_module", "x", "linear", ref("logprobs"))], "(x): 'call_module' is not allo"),
        ([call("torch.exp", ref("later"))], "(x): 'later' is not an earlier node"),
        ([call("torch.exp", ref("x"))], "(x): 'x' is not an earlier node"),
        ([call("torch.exp")], "(x): torch.exp with 0 arguments"),
        ([call("torch.exp", ref("logprobs"), 1)], "(x): torch.exp with 2 arguments"),
        ([call("torch.exp", ref("logprobs"), out=ref("advantages"))], "(x): torch.exp takes no"),
        ([call("torch.exp", {"code": "1"})], "(x): a dict is not allowed in a custom loss"),
        ([call("torch.exp", {"ref": ["logprobs"]})], "(x): ['logprobs'] is not an earlier node"),
        ([call("torch.exp", {"dtype": "qint8"})], "(x): a dict is not allowed in a custom loss"),
        ([call("torch.exp", {"ref": "logprobs", "tuple": []})], "(x): a dict is not an argument"),
        ([call("torch.exp", [[[[[[1]]]]]])], "(x): lists in lists"),
        ([call("torch.exp", [1] * 500)], "(x): more than 200 values"),
        ([call("torch.exp", 10**30)], "(x): a large number is not an argument"),
        ([call("torch.exp", "x" * 999)], "(x): 'xxx"),
        ([call("torch.exp", "a\x00b")], "(x): 'a\\x00b' is not an argument"),
        ([call("torch.exp", "\ud800")], "(x): '\\ud800' is not an argument"),
        ([call("torch.exp", {"device": "cpu\x00"})], "(x): a dict is not allowed"),
        ([call("torch.exp", {"dict": {"\x00": 1}})], "(x): a key of its dict is not plain text"),
        ([call("getattr", ref("logprobs"), "__class__")], "(x): getattr may read T, device, d"),
        ([call("getattr", ref("logprobs"), ref("advantages"))], "(x): getattr may read"),
        ([call("getattr", "logprobs", "shape")], "(x): getattr may read"),
        ([node("call_method", "x", "sum", 5)], "(x): sum is not called on a node"),
        ([call("torch.functional.einsum", ref("logprobs"), ref("advantages"))], "(x): einsum's"),
        ([call("torch.exp", ref("logprobs"))] * 2, "(x): the name occurs twice"),
        (
            [{"op": "output", "name": "o", "target": "output", "args": []}],
            ": the output is not the last node",
        ),
        ([{**call("torch.exp", ref("logprobs")), "code": "1"}], ": unknown field 'code'"),
        ([node("call_function", "x y", "torch.exp", ref("logprobs"))], ".name: expected a name"),
    ],
)
def test_a_bad_node_is_refused_by_place_and_reason(nodes, message):
    text = refusal(graph_with(*nodes))
    assert text.startswith("graph.nodes[")
    assert message in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "graph.format: expected 1"),
        ({"nodes": []}, "graph.nodes: expected a list"),
        ({"nodes": GOOD["nodes"][:-1]}, "graph.nodes: the last node is not an output"),
        ({"nodes": GOOD["nodes"][1:]}, "graph.nodes[1] (x): 'logprobs' is not an earlier node"),
        ({"nodes": GOOD["nodes"][:1] + GOOD["nodes"][-1:]}, "graph.nodes[1] (output): 'sum_1'"),
        ({"nodes": GOOD["nodes"][:1] * (MAX_NODES + 1)}, "graph.nodes: 401 nodes"),
        ({"code": "print()"}, "graph: unknown field 'code'"),
    ],
)
def test_a_bad_graph_is_refused(change, message):
    assert refusal({**GOOD, **change}).startswith(message)


@pytest.mark.parametrize("key", ["loss:sum", "custom/x", "custom/X:mean", "custom/x:max", "a:sum"])
def test_a_metric_that_could_hide_another_is_refused(key):
    graph = graph_with(call("torch.exp", ref("logprobs")), metrics={key: ref("x")})
    assert "is not named custom/<name>:sum or :mean" in refusal(graph)


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [{"name": "advantages", "rank": 1}],
        [{"name": "logprobs", "rank": 0}],
        [{"name": "logprobs", "rank": True}],
        [{"name": "logprobs", "rank": 1}, {"name": "logprobs", "rank": 1}],
        [{"name": "logprobs", "rank": 1}, {"name": "__class__()", "rank": 1}],
        INPUTS[::-1],
        None,
    ],
)
def test_bad_inputs_are_refused(inputs):
    assert refusal(GOOD, inputs=inputs).startswith(("inputs", "graph.nodes: placeholders"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["logprobs", "x", "torch.exp", "sum", "call_method", "output", "getattr"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["ref", "tuple", "dict", "slice", "float", "dtype", "device", "op", "name"])
        | st.text(max_size=3),
        inner,
        max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_graph_is_checked_or_refused_and_nothing_else(data):
    graph = copy.deepcopy(GOOD)
    place = graph["nodes"][data.draw(st.integers(0, len(graph["nodes"]) - 1))]
    key = data.draw(st.sampled_from(["op", "name", "target", "args", "kwargs"]))
    place[key] = data.draw(VALUES)
    try:
        checked = check_graph("loss", INPUTS, graph)
    except (InvalidRequest, LimitExceeded):
        return
    for item in checked.nodes:
        known = METHODS if item.op == "call_method" else FUNCTIONS
        assert item.op == "placeholder" or item.target in known


@settings(max_examples=100, deadline=None)
@given(VALUES, VALUES, VALUES)
def test_anything_at_all_is_refused_and_nothing_else(name, inputs, graph):
    with pytest.raises(InvalidRequest):
        check_graph(name, inputs, graph)
