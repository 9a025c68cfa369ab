"""How long a start takes: from a fresh clone to the first loss, and a restart.

Cold: the checkout is cloned (so nothing is compiled to bytecode), ``up`` runs on an empty data
folder, makes the default model's folder, the database cluster and the tables, and the quick
reference's first request is answered. Downloads are aside: the packages are installed already,
and their bytecode is compiled. Warm: ``up`` again on the same data folder. All times are
counted from the start of the first command. The processor time of all processes until the worker is
ready can also be compared on a machine that is busy with something else.

    python tests/benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.checkout import clone
from tests.benchmarks.report import Goal, Report, at_most, results_option
from tests.server import Server, free_port

FIRST_REQUEST = {
    "model_id": "user_123",
    "data": [[{"role": "user", "content": "test"}]],
    "loss_fn": "cross_entropy",
}


def start(server: Server, begin: float) -> dict[str, float]:
    """Start, wait for web, worker and a first loss; seconds since ``begin`` of each, and the
    processor time until the second."""
    reached = {}
    server.spawn()
    server.wait_until("/healthz")
    reached["web answers"] = time.monotonic() - begin
    server.wait_until("/readyz")
    reached["worker is ready"] = time.monotonic() - begin
    reached["processor time until then"] = server.processor_seconds()
    answer = server.post("/api/v1/forward_backward", **FIRST_REQUEST)
    answer.raise_for_status()
    reached["first loss"] = time.monotonic() - begin
    return reached


def clone_and_start(folder: Path, commit: str) -> tuple[Server, dict[str, float]]:
    """A new clone, on an empty data folder."""
    data_dir = folder / "var"
    data_dir.mkdir(parents=True)
    begin = time.monotonic()
    server = Server(data_dir, free_port(), root=clone(folder / "clone", commit))
    try:
        return server, start(server, begin)
    except BaseException:
        server.stop()
        raise


GOALS: dict[tuple[str, str], Goal] = {
    ("cold", "first loss"): at_most(60.0),
    ("warm", "web answers"): at_most(2.0),
    ("warm", "worker is ready"): at_most(10.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds of a cold and of a warm start")
    parser.add_argument("--cold", type=int, default=3, help="cold starts")
    parser.add_argument("--warm", type=int, default=3, help="restarts after each cold start")
    parser.add_argument("--before", help="another commit, started in turns with this one")
    results_option(parser)
    options = parser.parse_args()
    report = Report(
        benchmark="startup",
        settings={"cold_starts": options.cold, "restarts_each": options.warm},
    )
    commits = {"": "HEAD"}
    if options.before:
        commits[f"{options.before}: "] = options.before
    starts: dict[tuple[str, str], list[dict[str, float]]] = {
        (label, kind): [] for label in commits for kind in ("cold", "warm")
    }
    for _ in range(options.cold):
        with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder, ExitStack() as ends:
            servers: dict[str, Server] = {}
            for number, (label, commit) in enumerate(commits.items()):
                server, reached = clone_and_start(Path(folder) / str(number), commit)
                ends.callback(server.stop)
                starts[label, "cold"].append(reached)
                server.stop()
                servers[label] = server
            for _ in range(options.warm):
                for label, server in servers.items():
                    starts[label, "warm"].append(start(server, time.monotonic()))
                    server.stop()
    for (label, kind), measured in starts.items():
        for milestone in measured[0] if measured else ():
            report.add(
                f"{label}{kind} start: {milestone}",
                [reached[milestone] for reached in measured],
                unit="s",
                goal=None if label else GOALS.get((kind, milestone)),
            )
    report.finish(options.results)


if __name__ == "__main__":
    main()
