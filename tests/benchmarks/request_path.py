"""Which of the project's functions the data of one forward_backward_async passes, and which run.

Everything runs in this process, on a real Postgres and a tiny real model: the web application
takes the request, a work loop computes it, the application answers ``retrieve_future``. The model
and its adapter were used before, so nothing is counted that a process does once. A function counts
once, however often it is called; what Python makes of an expression (comprehensions, lambdas) does
not count.

Data passes a function that is given it: the numbers of the datum are found in one of its arguments
(``self`` aside), as JSON, as stored bytes, in a list, an array, a tensor or in what holds one.

    python tests/benchmarks/request_path.py --list
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np
import torch

from tests.benchmarks.report import Report, at_most, results_option

OURS = ("tinkerapi", "training", "futures")
ROOMS = tuple(f"{ROOT / name}{os.sep}" for name in OURS)
TOKENS = [11, 7, 5, 13, 3, 17, 2]
"""The datum's tokens; nothing else in the process has these numbers in this order."""

PATTERNS = (
    json.dumps(TOKENS).encode()[1:-1],
    json.dumps(TOKENS, separators=(",", ":")).encode()[1:-1],
    bytes(TOKENS),  # as msgpack writes small whole numbers
    np.asarray(TOKENS, "<i4").tobytes(),
    np.asarray(TOKENS, "<i8").tobytes(),
)
MAX_DEPTH = 6
MAX_ITEMS = 64


def carries(value: Any, depth: int = 0) -> bool:
    """Whether the datum's numbers are in this value, or inside it."""
    if value is None or isinstance(value, bool | int | float | type) or depth > MAX_DEPTH:
        return False
    if isinstance(value, str | bytes | bytearray | memoryview):
        content = value.encode() if isinstance(value, str) else bytes(value)
        return any(pattern in content for pattern in PATTERNS)
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray):
        return value.size < MAX_ITEMS**2 and _in_order(value.ravel().tolist())
    if isinstance(value, dict):
        return any(carries(item, depth + 1) for item in list(value.values())[:MAX_ITEMS])
    if isinstance(value, list | tuple):
        return _in_order(value) or any(carries(item, depth + 1) for item in value[:MAX_ITEMS])
    held = getattr(value, "__dict__", None)
    if held is None and is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
    if not held or not type(value).__module__.startswith(OURS):
        return False
    return any(carries(item, depth + 1) for item in list(held.values())[:MAX_ITEMS])


def _in_order(numbers: Sequence[Any]) -> bool:
    if not numbers or not isinstance(numbers[0], int | float):
        return False
    size = len(TOKENS)
    ends = range(size, len(numbers) + 1)
    return any(list(numbers[end - size : end]) == TOKENS for end in ends)


class Trace:
    """The project's functions that ran in any thread, in the order of their first calls.

    To be made before there are threads: a profile function is given to a thread as it starts.
    """

    def __init__(self) -> None:
        self._is_on = False
        self._codes: dict[CodeType, bool] = {}
        """Whether the data was among its arguments in one of its calls."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not self._is_on or event != "call" or self._codes.get(code):
            return
        if code.co_filename.startswith(ROOMS) and code.co_name[0] != "<":
            self._codes[code] = self._is_given(frame)

    def _is_given(self, frame: FrameType) -> bool:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self._is_on = False  # what looking calls does not count
        try:
            return any(carries(frame.f_locals.get(name)) for name in names if name != "self")
        finally:
            self._is_on = True

    def names_during(self, act: Callable[[], Any]) -> dict[str, bool]:
        """The functions that ran during ``act()``, and whether they were given the data."""
        self._codes.clear()
        self._is_on = True
        try:
            act()
        finally:
            self._is_on = False
        return {
            f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_qualname}": given
            for code, given in self._codes.items()
        }


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request of a program on this machine; its 200 answer."""
    from tests.api.test_asgi import call

    content = json.dumps(body).encode()
    length = {"content-length": str(len(content))}
    status, _, answer = call(path, headers=length, body=[content, b""])
    if status != 200:
        raise RuntimeError(f"{path}: {status}: {answer.decode()}")
    return dict(json.loads(answer))


@contextmanager
def work_loop(folder: Path) -> Iterator[Callable[[], None]]:
    """A function that runs all waiting futures, on the engine of this folder."""
    from futures.workers import worker_live, worker_start, worker_stop
    from tests.benchmarks.served_model import bare_engine
    from training.base_models import base_model_get
    from training.worker.loop import WorkLoop

    engine = bare_engine(folder)
    figures: dict[str, Any] = {}
    worker = worker_start(queue=base_model_get(None).queue, figures=figures)
    loop = WorkLoop(
        engine,
        worker,
        stopping=lambda: False,
        bell_rang=lambda seconds: 0,  # type: ignore[arg-type, return-value]  # silence
        figures=figures,
    )
    worker_live(worker, figures)
    yield loop.run_until_idle
    worker_stop(worker)


def stages(data_dir: Path, trace: Trace) -> dict[str, dict[str, bool]]:
    """The functions by the part of the request's life in which they first ran."""
    import django
    from django.core.management import call_command

    from tests.tiny_model import make_tiny_model

    folder = make_tiny_model(data_dir / "tiny")
    os.environ["TINKERAPI_BASE_MODEL"] = str(folder)
    django.setup()
    call_command("migrate", verbosity=0)
    datum = {
        "model_input": TOKENS,
        "loss_fn_inputs": {"target_tokens": TOKENS, "weights": [1.0] * 7},
    }
    body = {"model_id": "m", "data": [datum], "loss_fn": "cross_entropy"}
    answer: dict[str, Any] = {}

    def submit() -> None:
        answer.update(post("/api/v1/forward_backward_async", body))

    def retrieve() -> None:
        wanted = {"request_id": answer["request_id"]}
        post("/api/v1/retrieve_future", wanted)

    with work_loop(folder) as work:
        parts = {"submit": submit, "work": work, "retrieve": retrieve}
        for act in parts.values():  # the model is made, every cache filled
            act()
        return {name: trace.names_during(act) for name, act in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="functions that a request passes")
    parser.add_argument("--list", action="store_true", help="print their names")
    results_option(parser)
    options = parser.parse_args()
    report = Report(benchmark="request_path", settings={})
    trace = Trace()
    os.environ["DJANGO_SETTINGS_MODULE"] = "tinkerapi.settings"
    with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder:
        os.environ["TINKERAPI_DATA_DIR"] = folder
        from tinkerapi.server.postgres import EmbeddedPostgres

        with EmbeddedPostgres(Path(folder)):
            found = stages(Path(folder), trace)
    passed: dict[str, bool] = {}
    for name, functions in found.items():
        new = {key: given for key, given in functions.items() if given and not passed.get(key)}
        for key, given in functions.items():
            passed[key] = passed.get(key, False) or given
        report.add(f"{name}: functions that are given the data", [len(new)], unit="functions")
        if options.list:
            print(f"\n{name}", *new, sep="\n  ")
    carriers = [key for key, given in passed.items() if given]
    files = {key.partition(":")[0] for key in carriers}
    report.add(
        "functions that are given the data", [len(carriers)], unit="functions", goal=at_most(40)
    )
    report.add("files that they are in", [len(files)], unit="files")
    report.add("functions that run", [len(passed)], unit="functions")
    report.finish(options.results)


if __name__ == "__main__":
    main()
