"""The double as a program that ``up`` can start in the place of vLLM's Python.

``double_python`` makes the file to name as ``vllm.python``; ``up`` calls it with vLLM's arguments.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
from pathlib import Path

import torch

from tests.engine.vllm.double import BASE, VllmDouble
from tests.server import ROOT
from training.engine.torch.loading import load_base_model


def double_python(path: Path) -> Path:
    """Write the program's file there; it takes the arguments of a Python."""
    python = shlex.join([sys.executable, "-m", "tests.engine.vllm.double_program"])
    path.write_text(f'#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {python} "$@"\n')
    path.chmod(0o755)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("folder")
    parser.add_argument("--served-model-name", choices=[BASE], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-loras", type=int, required=True)
    parser.add_argument("--max-cpu-loras", type=int, required=True)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    base_model = load_base_model(options.folder, dtype=options.dtype, device="cpu")
    VllmDouble(
        base_model,
        max_loras=options.max_loras,
        max_cpu_loras=options.max_cpu_loras,
        port=options.port,
        key=os.environ["VLLM_API_KEY"],
    )
    threading.Event().wait()


if __name__ == "__main__":
    main()
