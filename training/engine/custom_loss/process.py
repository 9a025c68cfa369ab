"""Runs custom losses in a separate process, so that a worker survives every graph.

A graph's cost is counted before it runs, and the graph is refused if it is too large. For costs
that counting does not foresee, the other process has a limit on memory and CPU time, and this side
limits the wait. If the other process ends for any reason, the request whose graph it was computing
fails with an error that says so. The next request finds another process ready within milliseconds.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from training.custom_loss_graph import CustomLossGraph
from training.custom_loss_limits import CPU_SECONDS, MEMORY_BYTES, REPLAY_FACTOR, WALL_SECONDS
from training.engine.custom_loss.run import CustomLossInputs, Outcome, Work
from training.engine.custom_loss.server import END, FORK, READY, STATUS
from training.engine.custom_loss.wire import (
    decode_reply,
    encode_limits,
    encode_request,
    receive,
    send,
)
from training.errors import InvalidRequest, LimitExceeded, OutOfMemory, TrainingError
from training.parent_death import parent_death_prefix

COMMAND = (sys.executable, "-m", "training.engine.custom_loss.server")
START_SECONDS = 120.0
"""Long enough for an import of torch on a busy machine."""
FORK_SECONDS = 20.0
UNUSED_SECONDS = 600.0
"""An unused process is ended after this time: it takes some 300 MB."""
MEMO_BYTES = 32 * 2**20
_PASSED_ON = ("LANG", "LC_", "LD_", "PATH", "TMPDIR", "MKL_", "ATEN_", "TORCH_", "DNNL_", "ONEDNN_")
"""Prefixes of the environment variables that it gets: those that torch reads, no secrets."""


class _Died(Exception):
    """The process ended during a request, but not by a limit; ``status`` says how."""

    def __init__(self, status: int) -> None:
        self.status = status


class CustomLossProcess:
    """A ``CustomLossRunner``, which starts its process when it is first needed.

    Starting takes seconds, because the process imports torch. ``prepare`` starts it and returns, so
    that other users' work continues meanwhile; a call without it waits.
    """

    def __init__(
        self,
        *,
        cpu_seconds: float = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The limits apply to one request: all calls with the same ``Work``."""
        self._cpu_seconds = cpu_seconds
        self._wall_seconds = wall_seconds
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._memo = _Memo()
        self._server: _Server | None = None
        self._used_at = clock()

    def __call__(
        self, graph: CustomLossGraph, data: Sequence[CustomLossInputs], work: Work
    ) -> list[Outcome]:
        """See ``CustomLossRunner``. If the process ends, every datum of the call fails."""
        self._used_at = self._clock()
        try:
            reply = decode_reply(self._reply(graph, data, work))
        except TrainingError as error:
            return [error] * len(data)
        work.num_elements = reply.work.num_elements
        work.num_steps = reply.work.num_steps
        work.num_multiplications = reply.work.num_multiplications
        work.cpu_seconds += reply.cpu_seconds
        return reply.outcomes

    def prepare(self) -> bool:
        """See ``CustomLossRunner``. Also True if the process does not start; a call then raises the
        reason."""
        self._used_at = self._clock()
        if self._server is not None and self._server.is_ready and not self._server.is_alive():
            self.close()  # it was ended from outside while it waited
        if self._server is None:
            try:
                self._server = _Server()
            except OSError:
                return True
        return self._server.answers_at_once

    def release(self) -> None:
        """End the process if it was not used for a long time."""
        if self._clock() - self._used_at > UNUSED_SECONDS:
            self.close()

    def wait_until_ready(self) -> None:
        """Wait until torch is imported, so that the first call need not wait.

        Raises:
            OutOfMemory: It does not start.
        """
        self._running()

    def close(self) -> None:
        """End the process. Another call would start a new one."""
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def child_pid(self) -> int | None:
        """The process that computes graphs, if there is one."""
        return self._server.child_pid if self._server is not None else None

    def _reply(self, graph: CustomLossGraph, data: Sequence[CustomLossInputs], work: Work) -> bytes:
        """The other process's answer.

        It is repeated once if the process ends for an unknown reason: it may have been
        ended from outside.
        """
        message = encode_request(graph, data, work)
        # A pass is repeated without its failed jobs. The graphs of the others must not
        # keep their batch-mates waiting a second time.
        key = hashlib.blake2b(message).digest()
        reply = self._memo.find(key)
        for attempt in range(2):
            if reply is not None:
                break
            try:
                reply = self._ask(graph, message, work)
            except _Died as death:
                if attempt:
                    raise _death(graph, death.status) from None
        assert reply is not None  # noqa: S101  (the second death has raised)
        self._memo.keep(key, reply)
        return reply

    def _ask(self, graph: CustomLossGraph, message: bytes, work: Work) -> bytes:
        factor = REPLAY_FACTOR if work.is_replay else 1
        cpu_left = factor * self._cpu_seconds - work.cpu_seconds
        wall_left = factor * self._wall_seconds - work.wall_seconds
        if cpu_left <= 0:
            raise self._out_of_time(graph, work, "processor time", self._cpu_seconds)
        memory = (2 if work.is_replay else 1) * self._memory_bytes
        server = self._running()
        connection = server.connection()
        begin = self._clock()

        def limit_wait() -> None:
            left = begin + wall_left - self._clock()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)

        try:
            limit_wait()
            send(connection, encode_limits(cpu_left, memory) + message)
            reply = receive(connection, limit_wait)
        except TimeoutError:
            server.end_child()
            raise self._out_of_time(graph, work, "time", self._wall_seconds) from None
        except OSError:
            reply = None
        finally:
            work.wall_seconds += self._clock() - begin
        if reply is not None:
            return reply
        status = server.end_child()
        if status == -signal.SIGPROF:
            raise self._out_of_time(graph, work, "processor time", self._cpu_seconds)
        raise _Died(status)

    def _running(self) -> _Server:
        """The server, started again if it has ended."""
        if self._server is not None and not self._server.is_alive():
            self.close()
        try:
            if self._server is None:
                self._server = _Server()
            self._server.wait_until_ready()
        except OSError as error:
            self.close()
            raise OutOfMemory(
                f"the process that computes custom losses does not start: {error}"
            ) from None
        return self._server

    def _out_of_time(
        self, graph: CustomLossGraph, work: Work, what: str, seconds: float
    ) -> TrainingError:
        if work.is_replay:  # it was fast enough once, so another attempt may be
            return OutOfMemory(f"custom loss {graph.name!r}: its replay took too much {what}")
        return LimitExceeded(
            f"custom loss {graph.name!r}: it took more than the {seconds:g} s of {what} that the "
            "custom loss of one request may take"
        )


def _death(graph: CustomLossGraph, status: int) -> TrainingError:
    """The error of a request whose graph ended the process twice."""
    if status == -signal.SIGKILL:
        return OutOfMemory(
            f"custom loss {graph.name!r}: the machine has no memory left for its process"
        )
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"
    return InvalidRequest(f"custom loss {graph.name!r}: its process ended {how}")


class _Server:
    """The process that forks, and its newest child."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [*parent_death_prefix("KILL"), *COMMAND],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )
        finally:
            theirs.close()
        self.is_ready = False
        self._begun_at = time.monotonic()
        self._connection: socket.socket | None = None
        self.child_pid: int | None = None

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait until it has loaded torch.

        Raises:
            OSError: It does not start.
        """
        if self.is_ready:
            return
        left = self._begun_at + START_SECONDS - time.monotonic()
        self._control.settimeout(max(left, 0.001))
        if self._control.recv(1) != READY:
            raise ConnectionError(f"it ended with exit code {self._process.wait()}")
        self.is_ready = True

    @property
    def answers_at_once(self) -> bool:
        """Whether ``wait_until_ready`` would not wait: it is ready, has ended or is overdue."""
        if self.is_ready or time.monotonic() > self._begun_at + START_SECONDS:
            return True
        readable = select.poll()
        readable.register(self._control, select.POLLIN)
        return bool(readable.poll(0))

    def connection(self) -> socket.socket:
        """The connection to the child, which is forked if there is none.

        Raises:
            OutOfMemory: It cannot be forked.
        """
        if self._connection is None:
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(self._control, [FORK], [theirs.fileno()])
                    self.child_pid = self._status()
            except OSError as error:
                ours.close()
                self.close()
                raise OutOfMemory(f"a custom loss gets no process: {error}") from None
            self._connection = ours
        return self._connection

    def end_child(self) -> int:
        """End the child, if it has not ended; return its exit code, or the negative signal."""
        if self._connection is not None:
            self._connection.close()
        self._connection = self.child_pid = None
        try:
            self._control.sendall(END)
            return self._status()
        except OSError:  # the server ended too, and the child with it
            self.close()
            return -signal.SIGKILL

    def close(self) -> None:
        """End both."""
        if self._connection is not None:
            self._connection.close()
        self._connection = self.child_pid = None
        self._control.close()
        self._process.kill()  # the child ends with it
        self._process.wait()

    def _status(self) -> int:
        self._control.settimeout(FORK_SECONDS)
        received = b""
        while len(received) < STATUS.size:
            piece = self._control.recv(STATUS.size - len(received))
            if not piece:
                raise ConnectionError("its server ended")
            received += piece
        status: int = STATUS.unpack(received)[0]
        return status


class _Memo:
    """The newest replies by request: graphs are pure functions."""

    def __init__(self) -> None:
        self._replies: OrderedDict[bytes, bytes] = OrderedDict()

    def find(self, key: bytes) -> bytes | None:
        return self._replies.get(key)

    def keep(self, key: bytes, reply: bytes) -> None:
        self._replies[key] = reply
        while sum(map(len, self._replies.values())) > MEMO_BYTES:
            self._replies.popitem(last=False)


def _environment() -> dict[str, str]:
    """The process's environment: torch's settings, and the path of our code."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    root = str(Path(__file__).resolve().parents[3])
    return {
        **passed,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
