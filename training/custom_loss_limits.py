"""Every limit of custom losses, in one place: of a graph, its computation, its process.

Sizes and steps are counted before an operation runs, so that the same graph on the same data
always ends the same way. Memory and time are measured as well, by the process that computes
graphs, for costs that the counts do not cover; the counted limits take about a third of that time
on an ordinary processor.
"""

from __future__ import annotations

MAX_INPUTS = 16
MAX_NODES = 400
MAX_DEPTH = 4
"""Nesting of lists in an argument."""
MAX_ITEMS = 200
"""Values in all arguments of one node."""
MAX_TEXT = 200
MAX_INTEGER = 2**53
MAX_NAME = 200

MAX_OPERATIONS = 25_000
"""Nodes of a custom loss times datums of one request; a node on a few numbers takes 30 to 60
microseconds."""
MAX_DIMENSIONS = 16
"""Dimensions of one tensor."""
MAX_ELEMENTS = 2**24
"""Elements of one intermediate value. A dimension of size 0 counts as size 1: a tensor without
elements also costs time and memory."""
MAX_TOTAL_ELEMENTS = 2**26
"""Elements of all intermediate values of one datum; autograd keeps them."""
MAX_TENSORS = 2**14
"""Tensors that the operations on one datum may make, or read from lists."""
MAX_STEPS = 2**29
"""Steps of one request, forwards and backwards; a step is about a nanosecond of one processor."""
MAX_MULTIPLICATIONS = 2**31
"""Multiplications in all matrix products of one request; also half a second. They count 32 times in
dtypes other than float32 and float64."""

CPU_SECONDS = 1.5
"""CPU time of one request's graph for all datums together."""
WALL_SECONDS = 2.5
"""Time that the worker, and so all other users, wait for it, however busy the machine is."""
MEMORY_BYTES = 2 * 2**30
"""Memory that it may allocate beyond that of the idle process."""
REPLAY_FACTOR = 10
"""A request that was computed once is computed again when its run is rebuilt. It must not fail
then because the machine is slower, so its replay gets this many times the time and twice the
memory, and nothing is counted."""
