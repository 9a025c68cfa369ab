"""Random graphs of every operation that custom losses may use, with hostile sizes and arguments.

The long form of ``tests/engine/test_custom_loss_fuzz.py``, in the process that a worker uses:

    python -m tests.engine.custom_loss_fuzz [GRAPHS] [SEED]
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.custom_loss_graph import check_graph
from training.custom_loss_limits import CPU_SECONDS, MEMORY_BYTES, WALL_SECONDS
from training.custom_loss_ops import DTYPES, FUNCTIONS, METHODS, Signature
from training.engine.custom_loss.process import CustomLossProcess
from training.engine.custom_loss.run import (
    CustomLossInputs,
    CustomLossOutput,
    CustomLossRunner,
    Work,
)
from training.errors import InvalidRequest, OutOfMemory

INPUTS = [{"name": "logprobs", "rank": 1}]
COUNTS = [-1, 0, 1, 2, 3, 7, 64, 2**12, 2**14, 2**20, 2**24, 2**31, 2**53, -(2**31)]
DIMS = [-2, -1, 0, 1, 2, 5, None]
SHAPES = [[], [0], [3], [3, 4], [4, 3], [5, 1, 2], [4, 4], [2, 0, 3]]
HOSTILE_SHAPES = [
    [2**20], [2**12, 1], [1, 2**12], [2**22, 0], [0, 2**20], [2**19, 2], [2, 2**19], [1] * 12,
    [2**11, 2**11], [2**18, 2, 2], [2**23], [2**24],
]  # fmt: skip
EQUATIONS = ["i,i->", "i,j->ij", "ij,jk->ik", "ii->i", "ij->ji", "i,j", "ij,ij->", "bij,bjk->bik",
             "ij , kl", "a...->a", "ij,k->ijk"]  # fmt: skip

OPERATIONS: list[tuple[str, str, Signature]] = [
    *(("call_function", name, signature) for name, signature in sorted(FUNCTIONS.items())),
    *(("call_method", name, signature) for name, signature in sorted(METHODS.items())),
]


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


class RandomGraph:
    """One graph about one operation, as a client could upload it."""

    def __init__(self, seed: str, operation: tuple[str, str, Signature]) -> None:
        """The same seed and operation give the same graph."""
        self._rng = random.Random(seed)  # noqa: S311  (nothing secret)
        self._nodes: list[dict[str, Any]] = [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
        ]
        self._floats = [ref("logprobs")]
        self._integers: list[Any] = []
        self._masks: list[Any] = []
        self._tuples: list[Any] = []
        self._make_tensors()
        last = self._call(*operation)
        if self._rng.random() < 0.3:
            last = self._call(*self._rng.choice(OPERATIONS), about=last)
        self._finish(last)

    @property
    def graph(self) -> dict[str, Any]:
        return {"format": 1, "nodes": self._nodes}

    def _node(self, op: str, target: str, args: list[Any], **kwargs: Any) -> dict[str, str]:
        name = f"n{len(self._nodes)}"
        self._nodes.append({"op": op, "name": name, "target": target, "args": args,
                            "kwargs": kwargs})  # fmt: skip
        return ref(name)

    def _make_tensors(self) -> None:
        rng = self._rng
        for _ in range(3):
            shape = rng.choice(HOSTILE_SHAPES if rng.random() < 0.4 else SHAPES)
            dtype = {"dtype": rng.choice(["float32"] * 4 + ["float64", "bfloat16"])}
            tensor = self._node("call_function", "torch.full", [shape, rng.choice([0.3, 0.0, 1.5])],
                                dtype=dtype)  # fmt: skip
            if rng.random() < 0.4:  # then it has a gradient
                first = self._node("call_function", "operator.getitem", [ref("logprobs"), 0])
                tensor = self._node("call_function", "operator.mul", [tensor, first])
            self._floats.append(tensor)
            if rng.random() < 0.5:
                self._masks.append(self._node("call_function", "operator.gt", [tensor, 0.2]))
        size = rng.choice([1, 3, 4, 2**12, 2**20])
        index = self._node("call_function", "torch.arange", [size])
        self._integers.append(self._node("call_function", "operator.mod", [index, 3]))
        small = self._node("call_function", "torch.ones", [[rng.choice([2, 3, 2**10]), 2]])
        self._tuples.append(self._node("call_function", "torch.unbind", [small]))

    def _call(
        self, op: str, target: str, signature: Signature, about: Any = None
    ) -> dict[str, str]:
        rng = self._rng
        number_of = rng.randint(signature.min_args, min(signature.max_args, 5))
        kinds = PLACES.get(target.rpartition(".")[2]) or BY_COST.get(signature.cost, "TN")
        args = [self._argument(kinds[min(place, len(kinds) - 1)]) for place in range(number_of)]
        if about is not None and args:
            args[0] = about
        if op == "call_method" and not (isinstance(args[0], dict) and "ref" in args[0]):
            args[0] = ref("logprobs")
        if target == "getattr":
            args = [about or self._tensor(), rng.choice(["shape", "T", "values", "dtype", "ndim"])]
        if target.endswith("einsum"):
            args = [rng.choice(EQUATIONS), self._tensor(), self._tensor()]
        kwargs = {
            name: self._argument(NAMED.get(name, "N"))
            for name in sorted(signature.kwargs)
            if rng.random() < 0.15 and name != "device"
        }
        return self._node(op, target, args, **kwargs)

    def _finish(self, last: dict[str, str]) -> None:
        """Most losses depend on the graph's values, so that the gradient passes through them."""
        total = self._node("call_function", "torch.sum", [ref("logprobs")])
        if self._rng.random() < 0.7:
            piece = self._node("call_method", "sum", [last])
            total = self._node("call_function", "operator.add", [total, piece])
        self._nodes.append({"op": "output", "name": "output", "target": "output",
                            "args": [{"tuple": [total, {"dict": {}}]}]})  # fmt: skip

    def _tensor(self) -> Any:
        return self._rng.choice(self._floats if self._rng.random() < 0.9 else self._integers)

    def _argument(self, kind: str) -> Any:
        """A value of this kind, or sometimes of any kind."""
        if self._rng.random() < 0.05:
            kind = self._rng.choice(list(MAKERS))
        return MAKERS[kind](self)

    def _index(self) -> Any:
        rng = self._rng
        item = rng.choice([
            rng.choice(COUNTS[:6]), None, {"ellipsis": True}, {"slice": [None, rng.choice(COUNTS),
            rng.choice([None, 1, 2])]}, rng.choice(self._integers), [0, 1], [True, False], True,
        ])  # fmt: skip
        return {"tuple": [item, self._index()]} if rng.random() < 0.2 else item


MAKERS: dict[str, Callable[[RandomGraph], Any]] = {
    "T": lambda g: g._tensor(),
    "N": lambda g: g._tensor() if g._rng.random() < 0.6 else g._rng.choice([0, 1, 2, -1.5, 1e300]),
    "C": lambda g: g._rng.choice(COUNTS),
    "L": lambda g: [g._rng.choice(COUNTS) for _ in range(g._rng.randint(0, 4))],
    "S": lambda g: MAKERS[g._rng.choice("CL")](g),
    "D": lambda g: g._rng.choice(DIMS) if g._rng.random() < 0.8 else [0, 1],
    "B": lambda g: g._rng.random() < 0.5,
    "I": lambda g: g._rng.choice(g._integers),
    "M": lambda g: g._rng.choice(g._masks or g._floats),
    "J": lambda g: g._rng.choice([*g._tuples, [g._tensor(), g._tensor()], [g._floats[-1]] * 150]),
    "X": lambda g: g._rng.choice(g._masks) if g._masks and g._rng.random() < 0.2 else g._index(),
    "Y": lambda g: {"dtype": g._rng.choice(sorted(DTYPES))},
    "W": lambda g: g._rng.choice(["sum", "mean", "none", "floor", "trunc", "tanh", "x" * 50]),
    "F": lambda g: {"float": g._rng.choice(["inf", "-inf", "nan"])},
}
"""By the letter that stands for a kind of argument."""
BY_COST = {
    "reduction": "TDB", "norm": "TNDB", "extreme": "TDB", "scan": "TD", "differences": "TCD",
    "sorting": "TDB", "shifting": "TSD", "chunks": "TCD", "splits": "TSD", "rows": "TD",
    "shaping": "TS", "repeating": "TS", "spreading": "TS", "filling": "SC", "filling_like": "TSN",
    "range": "CCC", "points": "NNC", "square": "CC", "joining": "JD", "selection": "TM",
    "gathering": "TDI", "index_select": "TDI", "scattering": "TDIT", "indexing": "TX",
    "product": "TT", "outer": "TT", "view": "TDD", "conversion": "TY", "likeness": "TT",
}  # fmt: skip
PLACES = {
    "topk": "TCD", "narrow": "TDCC", "select": "TDC", "take_along_dim": "TID", "where": "MTT",
    "masked_fill": "TMN", "softmax": "TDY", "log_softmax": "TDY", "full": "SN", "flip": "TD",
    "cumsum": "TD", "cumprod": "TD", "logcumsumexp": "TD", "tril": "TC", "triu": "TC",
}  # fmt: skip
NAMED = {
    "dim": "D", "dims": "L", "n": "C", "m": "C", "k": "C", "chunks": "C", "split_size": "S",
    "shifts": "S", "size": "S", "shape": "S", "steps": "C", "length": "C", "start": "C", "end": "C",
    "step": "C", "index": "I", "indices": "I", "mask": "M", "dtype": "Y", "keepdim": "B",
    "reduction": "W", "approximate": "W", "rounding_mode": "W", "largest": "B", "sorted": "B",
    "descending": "B", "stable": "B", "diagonal": "C", "decimals": "C", "tensors": "J", "nan": "F",
}  # fmt: skip


@dataclass
class Tally:
    """The outcomes of some graphs."""

    patience_seconds: float = WALL_SECONDS + 1
    """Longer than a graph's time limit, with a margin for a busy machine."""
    outcomes: Counter[str] = field(default_factory=Counter)
    computed: set[str] = field(default_factory=set)
    """Operations in graphs that gave a loss."""
    longest_seconds: float = 0.0
    most_cpu_seconds: float = 0.0
    most_bytes: int = 0
    """Peak memory of the process that computes; Linux only."""
    faults: list[str] = field(default_factory=list)
    """Graphs that did what none may."""

    def add(self, seed: str, operation: tuple[str, str, Signature], run: CustomLossRunner) -> None:
        """Run one graph as a worker would."""
        op, target, _ = operation
        begin, work = time.monotonic(), Work()
        try:
            graph = check_graph("fuzz", INPUTS, RandomGraph(seed, operation).graph)
            data = [CustomLossInputs(logprobs=torch.tensor([-1.0, -2.0]), others={})]
            (outcome,) = run(graph, data, work)
        except InvalidRequest as refusal:
            outcome = refusal
        seconds = time.monotonic() - begin
        self.outcomes[type(outcome).__name__] += 1
        if isinstance(outcome, CustomLossOutput):
            self.computed.add(f"{op} {target}")
        self.longest_seconds = max(self.longest_seconds, seconds)
        self.most_cpu_seconds = max(self.most_cpu_seconds, work.cpu_seconds)
        if isinstance(run, CustomLossProcess) and run.child_pid:
            self.most_bytes = max(self.most_bytes, _peak_bytes(run.child_pid))
        ended = "its process ended" in str(outcome) or isinstance(outcome, OutOfMemory)
        if ended or seconds > self.patience_seconds or self.most_bytes > 1.25 * MEMORY_BYTES:
            self.faults.append(f"{seed} {op} {target}: {seconds:.1f} s, {outcome}")

    def __str__(self) -> str:
        return (
            f"{dict(self.outcomes)}; {len(self.computed)} of {len(OPERATIONS)} operations computed;"
            f" longest {self.longest_seconds:.1f} s, most processor time"
            f" {self.most_cpu_seconds:.1f} s of {CPU_SECONDS:g}, most memory"
            f" {self.most_bytes / 2**30:.2f} GiB; {len(self.faults)} faults {self.faults[:5]}"
        )


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main(number_of: int = 2000, seed: int = 0) -> int:
    tally, process = Tally(), CustomLossProcess()
    process.wait_until_ready()
    for number in range(number_of):
        tally.add(f"{seed}.{number}", OPERATIONS[number % len(OPERATIONS)], process)
        if number % 200 == 199:
            sys.stdout.write(f"{number + 1}: {tally}\n")
    process.close()
    sys.stdout.write(f"{tally}\n")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
