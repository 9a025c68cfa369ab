"""The connection to one server through its lives: found, checked, lost, found again.

A life begins when a server has passed the check and ends when it does not answer. Adapters are
loaded once in each life, when the first job needs them. Everything here belongs to the event loop
of ``server_jobs``, except what says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from training.engine.torch.adapters import AdapterLayout
from training.engine.vllm.adapter_files import write_adapter
from training.engine.vllm.client import (
    ServedModel,
    ServerLost,
    ServerRefuses,
    VllmClient,
    WrongAnswer,
)
from training.engine.vllm.folders import VersionFolders
from training.engine.vllm.proof import Expected, Proof, Prover
from training.engine.vllm.requests import request_body
from training.vllm_server import VllmConnection

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Between two looks for a server that is not there."""

HEALTH_SECONDS = 5.0
"""Between two checks of one that is."""

FAILED_CHECKS = 3
"""So many failed ones in a row end its life."""

REFUSED_SECONDS = 60.0
"""Until a server that failed the check is checked again."""

ABANDONED_SECONDS = 60.0
"""Until the folders of dead samplers are deleted: the server aborts their requests as soon as it
sees that their connections have ended."""


class ServerGone(Exception):
    """There is no server to wait for."""


@dataclass(kw_only=True, eq=False)
class ServerVersion:
    """A published version as the server knows it."""

    layout: AdapterLayout
    flat: Tensor
    """(P,) float32, in the host's memory; nobody writes into it."""
    parts: frozenset[str]
    """The parts of the model that it adapts."""
    folder: Path
    """Its last part is the adapter's name at the server."""
    is_written: bool = False
    loaded_in: int = 0
    """The life in which the server has it; 0 if it has it not."""
    jobs: int = 0
    """Those that may still ask the server for it."""
    is_retired: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ServerLink:
    """See the module."""

    def __init__(
        self,
        *,
        connection: Callable[[], VllmConnection | None],
        folders: VersionFolders,
        expected: Expected,
        num_slots: int,
        wait_seconds: float,
        may_change: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            connection: Where the server listens now, if anywhere; may raise OSError.
            expected: What it must answer before it gets a job.
            num_slots: Adapters in one batch of the server.
            wait_seconds: After this time without a server, nobody waits for it.
            may_change: Whether another server may take its address unnoticed. Then the base model
                is asked for by a name of ours, too, which that server does not know.
        """
        self._connection = connection
        self._folders = folders
        self._expected = expected
        self._prover = Prover(expected, folders, num_slots=num_slots, may_change=may_change)
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._unavailable_since = clock()
        self._ready = asyncio.Event()
        self._lost = asyncio.Event()
        self._client: VllmClient | None = None
        self._client_of: VllmConnection | None = None
        self._served: ServedModel | None = None
        self._removals: asyncio.Queue[ServerVersion] = asyncio.Queue()
        self.life = 0
        """The number of the current life, or of the last one."""
        self.proof = Proof()
        """Of the current life, or of the last one. Other threads may read it."""
        self.state = "no server yet"
        """In a few words, for people. Other threads may read it."""

    @property
    def client(self) -> VllmClient | None:
        """That of the current life, or of the last one; None if there is none."""
        return self._client

    @property
    def context_tokens(self) -> int | None:
        """The server's longest sequence; None before the first life. Other threads may read it."""
        return None if self._served is None else self._served.context_tokens

    def figures(self) -> dict[str, Any]:
        """For people; other threads may call it."""
        return {
            "state": self.state,
            "life": self.life,
            "differences": {
                what: value if math.isfinite(value) else None
                for what, value in self.proof.differences.items()
            },
            "adapters": sorted(self.proof.parts),
        }

    # -- lives -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a server, until the task is cancelled."""
        removing = asyncio.create_task(self._remove_retired())
        try:
            while True:
                try:
                    await self._live()
                except Exception:  # a fault of ours must not end sampling
                    logger.exception("the connection to the vLLM server")
                    self._ended("a fault of the sampler; see the worker's log")
                    await asyncio.sleep(HEALTH_SECONDS)
        finally:
            removing.cancel()
            if self._client is not None:
                await self._client.close()

    async def _live(self) -> None:
        """Find a server, check it, and watch it until it is lost."""
        client = await self._find()
        try:
            served = await client.served_model()
            proof = await self._prover.prove(client, served)
        except (ServerLost, ServerRefuses, WrongAnswer) as error:
            self.state = f"it does not answer as expected: {error}"
            await asyncio.sleep(LOOK_SECONDS)
            return
        self.proof = proof
        self._served = replace(served, name=proof.base_name)
        if proof.fault is not None:
            self.state = f"not used: {proof.fault}"
            self._unavailable_since = -float("inf")  # there is nothing to wait for
            logger.error("the vLLM server is not used: %s", proof.fault)
            await asyncio.sleep(REFUSED_SECONDS)
            return
        self.life += 1
        self._lost.clear()
        self.state = "ready"
        logger.info("the vLLM server is ready: %s", _in_words(proof))
        tidying = asyncio.create_task(self._remove_abandoned(client, served))
        self._ready.set()
        try:
            await self._watch(client)
        finally:
            tidying.cancel()

    async def _find(self) -> VllmClient:
        """A client of a server whose engine runs."""
        while True:
            try:
                connection = self._connection()
            except OSError as error:
                connection, self.state = None, f"its key cannot be read: {error}"
            if connection is not None:
                client = await self._client_for(connection)
                if await client.is_healthy():
                    return client
            await asyncio.sleep(LOOK_SECONDS)

    async def _client_for(self, connection: VllmConnection) -> VllmClient:
        if self._client is not None and self._client_of == connection:
            return self._client
        if self._client is not None:
            await self._client.close()  # ends what still waits for a server that is no more
        self._client, self._client_of = VllmClient(connection), connection
        return self._client

    async def _watch(self, client: VllmClient) -> None:
        """Return when the server is lost."""
        failed = 0
        while not self._lost.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), HEALTH_SECONDS)
                return
            failed = 0 if await client.is_healthy() else failed + 1
            if failed == FAILED_CHECKS or self._has_moved():
                self._ended("it does not answer")
                await client.close()
                self._client = None

    def _has_moved(self) -> bool:
        try:
            return self._connection() != self._client_of
        except OSError:
            return False

    def lost(self, life: int, reason: str) -> None:
        """Record that the server of a life does not answer."""
        if life == self.life and self._ready.is_set():
            self._ended(reason)

    def _ended(self, reason: str) -> None:
        if self._ready.is_set():
            logger.warning("the vLLM server is lost: %s", reason)
            self._unavailable_since = self._clock()
        self.state = f"lost: {reason}"
        self._ready.clear()
        self._lost.set()

    async def ready(self) -> tuple[int, VllmClient, ServedModel]:
        """The current life, its client and the served model; waits for one.

        Raises:
            ServerGone: None has come for ``wait_seconds``, or it failed the check.
        """
        while not self._ready.is_set():
            left = self._unavailable_since + self._wait_seconds - self._clock()
            if left <= 0:
                raise ServerGone(self.state)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), min(left, 1.0))
        if self._client is None or self._served is None:
            raise ServerGone(self.state)
        return self.life, self._client, self._served

    # -- versions --------------------------------------------------------------------------------

    async def name_of(self, version: ServerVersion, life: int, client: VllmClient) -> str:
        """The version's name at the server, which has it now.

        Raises:
            ServerLost, ServerRefuses: It could not be loaded.
            ServerGone: Its files could not be written.
        """
        async with version.lock:
            if not version.is_written:
                try:
                    await asyncio.to_thread(self._write, version)
                except OSError as error:
                    raise ServerGone(f"{version.folder}: {error}") from error
                version.is_written = True
            if version.loaded_in != life:
                await client.ensure_loaded(version.folder.name, str(version.folder))
                version.loaded_in = life
        return version.folder.name

    def _write(self, version: ServerVersion) -> None:
        self._folders.remove(version.folder)  # parts of a try that failed
        name = self._expected.base_model_name
        write_adapter(version.folder, version.layout, version.flat, name)

    def release(self, version: ServerVersion) -> None:
        """A job of the version has ended; none of its requests runs any more, or it was aborted."""
        version.jobs -= 1
        self._remove_if_over(version)

    def retire(self, version: ServerVersion) -> None:
        """No new job will use the version."""
        version.is_retired = True
        self._remove_if_over(version)

    def _remove_if_over(self, version: ServerVersion) -> None:
        if version.is_retired and not version.jobs:
            self._removals.put_nowait(version)

    async def _remove_retired(self) -> None:
        """Unload retired versions and delete their files.

        The engine reads an adapter's files when a request that names it is scheduled, also one that
        was aborted just now. It takes messages in their order, so an answered request that was sent
        after the abort proves that no earlier one can still be scheduled.
        """
        while True:
            version = await self._removals.get()
            while version.is_written:
                try:
                    _, client, served = await self.ready()
                    await client.forget(version.folder.name)
                    await self._pass_once(client, served)
                except (ServerLost, ServerGone, ServerRefuses, WrongAnswer):
                    await asyncio.sleep(HEALTH_SECONDS)  # a later life says whether it has it
                    continue
                break
            self._folders.remove(version.folder)

    async def _pass_once(self, client: VllmClient, served: ServedModel) -> None:
        """Have the engine answer a request of one token."""
        body = request_body(
            self._expected.job,
            1,
            request_id=f"{self._folders.owner}-pass",
            model=served.name,
            max_tokens=1,
            end_token_ids=(),
            salt="check",
        )
        await client.generate(body)

    async def _remove_abandoned(self, client: VllmClient, served: ServedModel) -> None:
        """Unload the versions of samplers that have died, and delete their files."""
        folders = self._folders.abandoned()
        try:
            for name, path in served.adapters.items():
                if Path(path).parent in folders:
                    await client.forget(name)
            await asyncio.sleep(ABANDONED_SECONDS)
            await self._pass_once(client, served)
        except (ServerLost, ServerRefuses, WrongAnswer) as error:
            logger.warning("folders of former samplers are kept: %s", error)
            return
        for folder in folders:
            self._folders.remove(folder)


def _in_words(proof: Proof) -> str:
    differences = ", ".join(f"{what} {value:.2g}" for what, value in proof.differences.items())
    return f"differences from ours in nats: {differences}"
