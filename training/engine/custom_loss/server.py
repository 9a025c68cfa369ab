"""The process that computes custom losses: ``python -m training.engine.custom_loss.server``.

It imports torch once and computes nothing itself. For its worker it forks a child that does, and
forks another when that one has ended: a fork takes milliseconds, but an import of torch takes
seconds, during which everybody would wait. No device and no second thread is used before the fork.

A child answers requests on a socket of its own until that is closed. It has one thread, the kernel
limits its memory and CPU time, it ends when its parent ends, and the kernel ends it first if the
machine runs out of memory. It never sees a database, a key or a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import struct
import sys
import time
import warnings
from pathlib import Path

import torch

from training.engine.custom_loss.run import Outcome, run_custom_loss
from training.engine.custom_loss.wire import (
    Reply,
    Request,
    decode_request,
    encode_reply,
    receive,
    send,
)
from training.engine.torch.out_of_memory import is_out_of_memory
from training.errors import LimitExceeded, TrainingError

READY, FORK, END = b"+", b"f", b"e"
STATUS = struct.Struct("<q")
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Fork children on request, until standard input is closed."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl+C goes to the parents, which stop us in order
    torch.set_num_threads(1)
    # A few derivatives are written in Python and import this on first use. That takes seconds, in
    # every child again, and would be charged to a request.
    importlib.import_module("torch._dynamo")
    warnings.simplefilter("ignore")  # torch's warnings for the author of a loss
    control = socket.socket(fileno=0)
    control.sendall(READY)
    child = 0
    while True:
        command, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if command == FORK:
            child = os.fork()
            if child == 0:
                _become_child(control, descriptors[0])
            os.close(descriptors[0])
            control.sendall(STATUS.pack(child))
        elif command == END:
            control.sendall(STATUS.pack(_end(child)))
            child = 0
        else:
            _end(child)
            return


def _end(child: int) -> int:
    """End the child if it has not ended; return its exit code, or the negative signal."""
    if not child:
        return 0
    os.kill(child, signal.SIGKILL)  # its process number is not reused until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become_child(control: socket.socket, descriptor: int) -> None:
    """Serve, and leave the process; never returns."""
    status = 1
    try:
        control.close()
        _stay_behind()
        _serve(socket.socket(fileno=descriptor))
        status = 0
    finally:
        os._exit(status)


def _stay_behind() -> None:
    """End when the parent ends, and before other processes if memory is short."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended during the call
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _serve(connection: socket.socket) -> None:
    idle_bytes = _data_bytes()
    while (message := receive(connection)) is not None:
        request = decode_request(message)
        del message
        _limit_memory(idle_bytes, request.memory_bytes)
        signal.setitimer(signal.ITIMER_PROF, max(request.cpu_seconds, 0.001))
        try:
            reply = _answer(request)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            _limit_memory(idle_bytes, None)
        send(connection, encode_reply(reply))


def _answer(request: Request) -> Reply:
    begin = time.process_time()
    outcomes: list[Outcome] = []
    for inputs in request.data:
        try:
            outcomes.append(
                run_custom_loss(request.graph, inputs.logprobs, inputs.others, request.work)
            )
        except TrainingError as error:
            outcomes.append(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            limit = LimitExceeded(
                f"custom loss {request.graph.name!r}: it needs more memory than the "
                f"{request.memory_bytes / 2**30:g} GiB that a custom loss may take"
            )
            outcomes.append(limit)
    return Reply(
        outcomes=outcomes,
        work=request.work,
        cpu_seconds=time.process_time() - begin,
    )


def _data_bytes() -> int:
    """The memory of this process that RLIMIT_DATA counts."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def _limit_memory(idle_bytes: int, more: int | None) -> None:
    """Limit this process's allocations beyond those when it was idle; None removes the limit.

    RLIMIT_DATA counts allocations, but not mapped libraries. Linux only.
    """
    if sys.platform == "linux":
        import resource

        limit = resource.RLIM_INFINITY if more is None else idle_bytes + more
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
