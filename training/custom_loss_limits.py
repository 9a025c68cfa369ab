"""Every limit of custom losses, in one place: of a graph, of what it computes, of its process.

Sizes and steps are counted before an operation runs, so that the same graph on the same data
always ends the same way. Memory and time are measured as well, by the process that computes
graphs, for what counting does not foresee; what is counted takes about a third of that time on an
ordinary processor.
"""

from __future__ import annotations

MAX_INPUTS = 16
MAX_NODES = 400
MAX_DEPTH = 4
"""Of lists in lists in an argument."""
MAX_ITEMS = 200
"""Values in all arguments of one node."""
MAX_TEXT = 200
MAX_INTEGER = 2**53
MAX_NAME = 200

MAX_OPERATIONS = 25_000
"""Nodes of a custom loss times datums of one request; a node on a few numbers takes 30 to 60
microseconds."""
MAX_DIMENSIONS = 16
"""Of one tensor."""
MAX_ELEMENTS = 2**24
"""Of one intermediate value. A dimension of size 0 counts as one of size 1: a tensor without
elements costs time and memory all the same."""
MAX_TOTAL_ELEMENTS = 2**26
"""Of all intermediate values of one datum together; autograd keeps them."""
MAX_TENSORS = 2**14
"""That the operations on one datum may make, or read from lists."""
MAX_STEPS = 2**29
"""Of one request, forwards and backwards; a step is about a nanosecond of one processor."""
MAX_MULTIPLICATIONS = 2**31
"""Of all matrix products of one request together; half a second likewise. They count 32 times in
other dtypes than float32 and float64."""

CPU_SECONDS = 1.5
"""Processor time that the graph of one request may take, all datums together."""
WALL_SECONDS = 2.5
"""Time that a worker waits for it, and others for the worker, however busy the machine is."""
MEMORY_BYTES = 2 * 2**30
"""What it may allocate beyond what its process holds when it is idle."""
REPLAY_FACTOR = 10
"""A request that was computed once is computed again when its run is rebuilt. It must not fail
then because the machine is slower, so its replay gets so many times the time and twice the memory,
and nothing is counted."""
