"""The messages between a worker and its process for custom losses, as bytes.

Messages are msgpack, which has plain values only: nothing is unpickled or evaluated on either
side. An array is sent as dtype, shape and bytes, so that no bit changes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.custom_loss_graph import CustomLossGraph, GraphInput, GraphNode
from training.engine.custom_loss.run import CustomLossInputs, CustomLossOutput, Outcome, Work
from training.errors import InvalidRequest, LimitExceeded, NonFiniteResult, TrainingError

_LENGTH = struct.Struct("<Q")
_LIMITS = struct.Struct("<dQ")
_ERRORS: Mapping[str, type[TrainingError]] = {
    error.__name__: error for error in (InvalidRequest, LimitExceeded, NonFiniteResult)
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Some datums of one request, and their limits."""

    graph: CustomLossGraph
    data: Sequence[CustomLossInputs]
    work: Work
    cpu_seconds: float
    """The remaining CPU time of the request."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """The outcomes of a request's datums, in order."""

    outcomes: list[Outcome]
    work: Work
    """The request's counted cost so far."""
    cpu_seconds: float
    """The CPU time of these datums."""


def encode_limits(cpu_seconds: float, memory_bytes: int) -> bytes:
    """The limits, sent before a request."""
    return _LIMITS.pack(cpu_seconds, memory_bytes)


def encode_request(graph: CustomLossGraph, data: Sequence[CustomLossInputs], work: Work) -> bytes:
    """Equal requests give equal bytes."""
    return _packed(
        {
            "name": graph.name,
            "inputs": [[item.name, item.rank] for item in graph.inputs],
            "nodes": [
                [node.name, node.op, node.target, list(node.args), dict(node.kwargs)]
                for node in graph.nodes
            ],
            "loss": graph.loss,
            "metrics": dict(graph.metrics),
            "data": [
                {"logprobs": _array(item.logprobs)}
                | {name: _array(value) for name, value in item.others.items()}
                for item in data
            ],
            "counts": _counts(work),
            "is_replay": work.is_replay,
        }
    )


def decode_request(message: bytes) -> Request:
    """A request with the limits before it."""
    cpu_seconds, memory_bytes = _LIMITS.unpack_from(message)
    said = msgpack.unpackb(memoryview(message)[_LIMITS.size :])
    nodes = (
        GraphNode(name=name, op=op, target=target, args=args, kwargs=kwargs)
        for name, op, target, args, kwargs in said["nodes"]
    )
    data = ({name: _tensor(array) for name, array in item.items()} for item in said["data"])
    return Request(
        graph=CustomLossGraph(
            name=said["name"],
            inputs=tuple(GraphInput(name, rank) for name, rank in said["inputs"]),
            nodes=tuple(nodes),
            loss=said["loss"],
            metrics=said["metrics"],
        ),
        data=[CustomLossInputs(logprobs=item.pop("logprobs"), others=item) for item in data],
        work=Work(**said["counts"], is_replay=said["is_replay"]),
        cpu_seconds=cpu_seconds,
        memory_bytes=memory_bytes,
    )


def encode_reply(reply: Reply) -> bytes:
    return _packed(
        {
            "outcomes": [
                {"error": type(outcome).__name__, "message": str(outcome)}
                if isinstance(outcome, TrainingError)
                else {
                    "loss": outcome.loss,
                    "grad": _array(outcome.grad),
                    "metrics": outcome.metrics,
                }
                for outcome in reply.outcomes
            ],
            "counts": _counts(reply.work),
            "cpu_seconds": reply.cpu_seconds,
        }
    )


def decode_reply(message: bytes) -> Reply:
    said = msgpack.unpackb(message)
    return Reply(
        outcomes=[
            _ERRORS[item["error"]](item["message"])
            if "error" in item
            else CustomLossOutput(
                loss=item["loss"], grad=_tensor(item["grad"]), metrics=item["metrics"]
            )
            for item in said["outcomes"]
        ],
        work=Work(**said["counts"]),
        cpu_seconds=said["cpu_seconds"],
    )


def send(connection: socket.socket, message: bytes) -> None:
    """Send one message whole."""
    connection.sendall(_LENGTH.pack(len(message)) + message)


def receive(connection: socket.socket, before: Callable[[], None] = lambda: None) -> bytes | None:
    """One message; None if the other side has closed.

    Args:
        before: Called before each wait for more, for example to set the connection's timeout.
    """
    head = _exactly(connection, _LENGTH.size, before)
    return None if head is None else _exactly(connection, _LENGTH.unpack(head)[0], before)


def _exactly(connection: socket.socket, length: int, before: Callable[[], None]) -> bytes | None:
    received = bytearray()
    while len(received) < length:
        before()
        piece = connection.recv(min(length - len(received), 2**20))
        if not piece:
            return None
        received += piece
    return bytes(received)


def _counts(work: Work) -> dict[str, int]:
    return {
        "num_elements": work.num_elements,
        "num_steps": work.num_steps,
        "num_multiplications": work.num_multiplications,
    }


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _array(tensor: Tensor) -> list[Any]:
    array: NDArray[Any] = tensor.detach().contiguous().numpy()
    return [array.dtype.str, list(array.shape), array.tobytes()]


def _tensor(array: Sequence[Any]) -> Tensor:
    dtype, shape, content = array
    # A copy: a tensor may not share read-only memory.
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())
