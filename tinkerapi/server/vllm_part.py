"""A base model's vLLM server as a part of a supervisor: started with a new port and key, watched by
its health route, killed if it does not answer.

The API process of vLLM outlives its engine in some faults, and a hung engine answers the health
route. So this asks two things: whether the route says that the engine runs, and, while requests are
running, whether the server's own counters of tokens move.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http import HTTPStatus

from django.conf import settings

from tinkerapi.server.guard import guard_prefix
from tinkerapi.server.supervisor import Child
from tinkerapi.server.up_process import HOST, free_port
from tinkerapi.server.worker_part import log_path
from training.base_models import ServedBaseModel
from training.parent_death import parent_death_prefix
from training.vllm_server import (
    VllmConnection,
    server_command,
    server_environment,
    write_connection,
)

STOP_SECONDS = 20.0
LOOK_SECONDS = 2.0
ANSWER_SECONDS = 10.0
FAILED_LOOKS = 3
"""So many failed ones in a row end a server that has been ready."""

_FIGURE = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", re.MULTILINE)
_RUNNING = "num_requests_running"
_COUNTERS = ("prompt_tokens_total", "generation_tokens_total")


class VllmPart:
    """See the module."""

    stop_rank = 2
    """After the workers, which end their requests themselves."""

    def __init__(
        self,
        base_model: ServedBaseModel,
        environment: Mapping[str, str],
        *,
        log_name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            environment: Of the supervisor.
            log_name: Of its log file, without ending.
            clock: Seconds.
        """
        if base_model.config.vllm is None or not base_model.config.vllm.python:
            raise ValueError(f"{base_model.name} has no vLLM server to start")
        self.name = f"vLLM of {base_model.name}"
        self._base_model = base_model
        self._config = base_model.config.vllm
        self._environment = environment
        self.log = log_path(log_name or f"{base_model.queue}.vllm")
        self._clock = clock
        self._child: Child | None = None
        self._looker: _Looker | None = None

    def start(self) -> None:
        connection = VllmConnection(
            address=f"http://{HOST}:{free_port()}", key=secrets.token_urlsafe(32)
        )
        base_model = self._base_model
        self._child = Child(
            self.name,
            [
                *guard_prefix(STOP_SECONDS),
                *parent_death_prefix("TERM"),
                *server_command(
                    self._config,
                    name=base_model.name,
                    folder=base_model.folder,
                    dtype=base_model.config.dtype,
                    context_tokens=base_model.configured_context_tokens,
                    port=int(connection.address.rpartition(":")[2]),
                ),
            ],
            server_environment(self._config, self._environment, connection.key),
            self.log,
            STOP_SECONDS,
            parent_death_signal="TERM",  # it has an engine process to stop
            stop_rank=self.stop_rank,
        )
        write_connection(base_model.server_folder, connection)
        self._child.start()
        self._looker = _Looker(connection.address, self._clock)
        self._looker.start()

    def ended(self) -> str | None:
        if self._child is None or self._looker is None:
            return "was not started"
        how = self._child.ended()
        if how is None and self._looker.fault is not None:
            self._child.stop(lambda: True)
            how = f"{self._looker.fault} and was killed"
        if how is not None:
            self._looker.over.set()
            if not self._looker.has_been_ready:
                how += f"; see {self.log}"
            self._child = self._looker = None
        return how

    @property
    def is_ready(self) -> bool:
        """Whether the server has answered that its engine runs, since its last start."""
        return self._looker is not None and self._looker.has_been_ready

    def ask_to_stop(self) -> None:
        if self._looker is not None:
            self._looker.over.set()
        if self._child is not None:
            self._child.ask_to_stop()

    def stop(self, hurry: Callable[[], bool]) -> None:
        if self._child is not None:
            self._child.stop(hurry)


class _Looker(threading.Thread):
    """Asks a server for its health every few seconds, until ``over``."""

    def __init__(self, address: str, clock: Callable[[], float]) -> None:
        super().__init__(name="vllm health", daemon=True)
        self._address = address
        self._clock = clock
        self.over = threading.Event()
        self.has_been_ready = False
        self.fault: str | None = None
        """Why the server must be killed; None while it need not."""
        self._failed = 0
        self._counted: tuple[float, ...] = ()
        self._moved_at = clock()

    def run(self) -> None:
        while self.fault is None and not self.over.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Ask once, and judge."""
        status, _ = self._get("/health")
        if status == HTTPStatus.OK:
            self.has_been_ready, self._failed = True, 0
            self._look_at_counters()
        elif self.has_been_ready:  # loading a model may take any time
            self._failed += 1
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                self.fault = "said that its engine is dead"
            elif self._failed == FAILED_LOOKS:
                self.fault = "did not answer its health route"

    def _look_at_counters(self) -> None:
        status, text = self._get("/metrics")
        figures: dict[str, float] = {}
        for name, value in _FIGURE.findall(text if status == HTTPStatus.OK else ""):
            figures[name] = figures.get(name, 0.0) + float(value)
        counted = tuple(figures.get(name, 0.0) for name in _COUNTERS)
        if not figures.get(_RUNNING) or counted != self._counted:
            self._counted, self._moved_at = counted, self._clock()
        elif self._clock() - self._moved_at > settings.HANG_SECONDS:
            self.fault = f"sampled no token for {settings.HANG_SECONDS:g} s"

    def _get(self, path: str) -> tuple[int, str]:
        """Status and content; status 0 without an answer."""
        try:
            # The address is ours, on the loopback interface.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(self._address + path, timeout=ANSWER_SECONDS) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""


def vllm_problem(base_model: ServedBaseModel) -> str | None:
    """Why a base model's vLLM server can never start, as a sentence; None if it may."""
    config = base_model.config.vllm
    if config is None or not config.python or os.access(config.python, os.X_OK):
        return None
    return (
        f"base model {base_model.name}: vllm.python: {config.python} is no program; expected the "
        "Python of vLLM's own environment, which tinkerapi/docs/vllm.md says how to make"
    )
