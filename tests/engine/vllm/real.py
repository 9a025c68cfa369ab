"""vLLM itself, in the environment that TINKERAPI_TEST_VLLM_PYTHON names.

It is started by the command that ``up`` uses. ``tests/vllm_suite.sh`` makes the environment and
runs all tests that need it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tinkerapi.server.up_process import free_port
from training.base_model_config import VllmConfig
from training.vllm_server import VllmConnection, server_command, server_environment

READY_SECONDS = 600.0
NAME = "tiny"
CPU_ARGUMENTS = ("--enforce-eager",)
CPU_ENVIRONMENT = (
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ("OMP_NUM_THREADS", "1"),
)


def vllm_python() -> str:
    """The Python of vLLM's environment."""
    python = os.environ.get("TINKERAPI_TEST_VLLM_PYTHON", "")
    if not python:
        pytest.fail("TINKERAPI_TEST_VLLM_PYTHON names no Python; run tests/vllm_suite.sh")
    return python


def tiny_config(python: str) -> VllmConfig:
    """The server's configuration for tiny models on a CPU."""
    return VllmConfig(
        python=python,
        arguments=CPU_ARGUMENTS,
        environment=CPU_ENVIRONMENT,
        max_loras=2,
        max_lora_rank=8,
        max_sequences=64,
    )


class RealServer:
    """One model folder, and the server that serves it now."""

    def __init__(self, model: Path, folder: Path, *, dtype: str = "float32") -> None:
        """``folder``: for its log."""
        self._model = model
        self.log = folder / "vllm.log"
        self._dtype = dtype
        self._process: subprocess.Popen[bytes] | None = None
        self.connection: VllmConnection | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        config = tiny_config(vllm_python())
        port = free_port()
        self.connection = VllmConnection(address=f"http://127.0.0.1:{port}", key="the key")
        command = server_command(
            config, name=NAME, folder=self._model, dtype=self._dtype, context_tokens=512, port=port
        )
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=server_environment(config, os.environ, self.connection.key),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        assert self.connection is not None
        try:
            url = f"{self.connection.address}/health"
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except OSError:
            return False

    def engine_pid(self) -> int:
        """The process of its engine."""
        assert self._process is not None
        listing = subprocess.run(
            ["/bin/ps", "-e", "-o", "pid=,pgid=,args="], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            pid, group, args = line.split(None, 2)
            if int(group) == self._process.pid and "EngineCore" in args:
                return int(pid)
        raise AssertionError(f"no engine among\n{listing}")

    def kill_engine(self) -> None:
        os.kill(self.engine_pid(), signal.SIGKILL)

    def stop(self) -> None:
        """End all of its processes."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
