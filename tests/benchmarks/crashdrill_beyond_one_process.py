"""The crash drill with two workers, a bucket, two ranks and a vLLM server, with its table stored.

    python tests/benchmarks/crashdrill_beyond_one_process.py [--kills N] [NAME ...]

The vLLM server is the tests' double, which has vLLM's routes and traps: a real one takes minutes to
start after each of its kills. The table is stored after each drill, beside those of other drills.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.crashdrill import beside_earlier, drill, side_by_side
from tests.benchmarks.report import results_option
from tests.engine.vllm.double_program import double_python
from tests.storage.s3_server import KEYS, s3_server


@contextmanager
def bucket() -> Iterator[tuple[object, ...]]:
    """The arguments of a drill whose files are in a bucket of an S3 server of this machine."""
    with s3_server() as server:
        server.make_bucket("drill")
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": server.url}
        yield "--storage", "s3://drill/files"


@contextmanager
def vllm() -> Iterator[tuple[object, ...]]:
    """The arguments of a drill with the double of a vLLM server."""
    with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder:
        yield "--vllm-python", double_python(Path(folder) / "python")


BEYOND: dict[str, Callable[[], AbstractContextManager[tuple[object, ...]]]] = {
    "two workers": lambda: nullcontext(("--workers", 2)),
    "a bucket": bucket,
    "two ranks, tp_size": lambda: nullcontext(("--tp-size", 2)),
    "two ranks, fsdp_size": lambda: nullcontext(("--fsdp-size", 2)),
    "a vLLM server (double)": vllm,
}
"""By name of the column."""


def main() -> None:
    parser = argparse.ArgumentParser(description="the crash drill beyond one process, stored")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    results_option(parser)
    options = parser.parse_args()
    drills = {}
    for name in options.names or BEYOND:
        with BEYOND[name]() as arguments:
            drills[name] = drill("--kills", options.kills, "--adapters", 4, *arguments)
        path = options.results / "crashdrill_beyond_one_process.json"
        table = beside_earlier(side_by_side(drills), path)
        path.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
