"""A sampler that asks a vLLM server for what it computes by our definitions, and the built-in
sampler, which shares the trainer's base model, for the rest.

Versions are published to the built-in sampler, where they cost nothing beside the trainer's own
weights, and reach the server with the first job that it is to sample from them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.engine.interface import CapturedAdapter, SampleJob, SampleOutput, Sampler
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.sampler.sequence import check_prompt, new_request
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.base_model import BaseModel
from training.engine.vllm.folders import VersionFolders
from training.engine.vllm.proof import EXPERTS, HEAD, LAYERS, expected_answers, parts_of
from training.engine.vllm.routes import why_built_in
from training.engine.vllm.server_jobs import Returned, ServerJobs
from training.engine.vllm.server_link import ServerLink, ServerVersion
from training.errors import InvalidRequest, TrainingError
from training.vllm_server import VllmConnection

Results = dict[str, SampleOutput | TrainingError]

SLICE_SECONDS = 0.02
"""Longest wait for one of the two while the other works, or between two signs of life."""


@dataclass(eq=False)
class _Version:
    server: ServerVersion | None = None
    """Made for the first job at the server."""
    num_jobs: int = 0
    """At the server."""
    is_retired: bool = False


class VllmSampler(Sampler):
    """See the module."""

    def __init__(
        self,
        built_in: ContinuousSampler,
        base_model: BaseModel,
        text: ChatRenderer,
        *,
        connection: Callable[[], VllmConnection | None],
        folder: Path,
        max_lora_rank: int,
        max_loras: int,
        max_sequences: int,
        wait_seconds: float,
        may_change: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            connection: Where the server listens now; None if it was not started yet.
            folder: For the files of versions; the server sees it under the same path.
            max_lora_rank: The largest rank that the server takes.
            max_loras: Adapters in one batch of the server.
            max_sequences: Sequences at the server at one time.
            wait_seconds: How long jobs wait for a server that is lost or starts.
            may_change: Whether another server may take the address unnoticed.
            clock: Seconds, for ``poll``.
        """
        self._built_in = built_in
        self._base_model = base_model
        self._text = text
        self._clock = clock
        self._max_lora_rank = max_lora_rank
        self._folders = VersionFolders(folder)
        self._link = ServerLink(
            connection=connection,
            folders=self._folders,
            expected=expected_answers(built_in, base_model, max_rank=max_lora_rank),
            num_slots=max_loras,
            wait_seconds=wait_seconds,
            may_change=may_change,
        )
        self._server = ServerJobs(
            self._link,
            text=text,
            info=base_model.info,
            owner=self._folders.owner,
            max_requests=max_sequences,
        )
        self._versions: dict[str, _Version] = {}
        self._jobs: dict[str, SampleJob] = {}
        """Those at the server."""
        self._on_progress: Callable[[], None] = lambda: None
        self._counts = Counter[str]()

    def report_progress(self, to: Callable[[], None]) -> None:
        self._on_progress = to
        self._built_in.report_progress(to)

    # -- versions --------------------------------------------------------------------------------

    def publish(self, version: str, weights: CapturedAdapter | Path) -> None:
        self._built_in.publish(version, weights)
        self._versions.setdefault(version, _Version()).is_retired = False

    def retire(self, version: str) -> None:
        if version in self._versions:
            self._versions[version].is_retired = True
            self._forget_if_over(version)

    def _forget_if_over(self, name: str) -> None:
        """Retire a version in both places as soon as the server does not need it; until then a job
        may come back from there."""
        version = self._versions[name]
        if not version.is_retired or version.num_jobs:
            return
        del self._versions[name]
        self._built_in.retire(name)
        if version.server is not None:
            self._server.retire(version.server)

    @property
    def versions(self) -> Mapping[str, int]:
        at_server = {name: version.num_jobs for name, version in self._versions.items()}
        return {
            name: num_jobs + at_server.get(name, 0)
            for name, num_jobs in self._built_in.versions.items()
        }

    # -- jobs ------------------------------------------------------------------------------------

    def submit(self, key: str, job: SampleJob) -> None:
        if key in self._jobs or self._built_in.is_active(key):
            raise ValueError(f"a job is active under the key {key!r}")
        version = None
        if job.version is not None:
            version = self._versions.get(job.version)
            if version is None or version.is_retired:
                raise InvalidRequest(f"No version of weights is published as {job.version}.")
        check_prompt(job, self._base_model.info)
        reason = self._why_built_in(job)
        if reason is not None:
            self._built_in.submit(key, job)
            self._counts[reason] += 1
            return
        request = new_request(
            key,
            job,
            max_tokens=self._max_tokens(job),
            text=self._text,
            info=self._base_model.info,
        )
        server_version = None
        if version is not None and job.version is not None:
            server_version = self._server_version(version, job.version)
            version.num_jobs += 1
        self._jobs[key] = job
        self._counts["server"] += 1
        self._server.submit(request, server_version, is_followed=job.is_followed)

    def _why_built_in(self, job: SampleJob) -> str | None:
        context_tokens = self._context_tokens
        reason = why_built_in(job, context_tokens=context_tokens)
        if reason is None and job.version is not None:
            weights = self._built_in.weights(job.version)
            reason = self._why_adapter_is_built_in(weights)
        asked = job.sampling_params.max_tokens
        if reason is None and asked and len(job.prompt) + asked > context_tokens:
            room = self._base_model.info.max_context_tokens - len(job.prompt)
            if min(asked, room) > context_tokens - len(job.prompt):
                reason = "more tokens than the server's context has"
        return reason

    @property
    def _context_tokens(self) -> int:
        ours = self._base_model.info.max_context_tokens
        return min(ours, self._link.context_tokens or ours)

    def _why_adapter_is_built_in(self, weights: AdapterTensors) -> str | None:
        layout = weights.layout
        if layout.rank > self._max_lora_rank:
            return "a rank above max_lora_rank"
        parts = parts_of(layout, self._base_model.head_name)
        if EXPERTS in parts:
            return "an adapter on experts"
        if self._link.life and not parts <= self._link.proof.parts:
            missing = HEAD if HEAD in parts - self._link.proof.parts else LAYERS
            return f"an adapter on {missing}, which the server computes otherwise"
        return None

    def _max_tokens(self, job: SampleJob) -> int:
        if job.num_samples < 1:
            raise InvalidRequest(f"num_samples: {job.num_samples} is less than 1")
        asked = job.sampling_params.max_tokens
        if asked is not None and asked < 0:
            raise InvalidRequest(f"max_tokens: {asked} is less than 0")
        room = self._context_tokens - len(job.prompt)
        return room if asked is None else min(room, asked)

    def _server_version(self, version: _Version, name: str) -> ServerVersion:
        if version.server is None:
            weights = self._built_in.weights(name)
            version.server = ServerVersion(
                layout=weights.layout,
                flat=weights.flat.cpu(),
                parts=parts_of(weights.layout, self._base_model.head_name),
                folder=self._folders.new(),
            )
        return version.server

    def poll(self, wait_seconds: float) -> Results:
        deadline = self._clock() + wait_seconds
        while True:
            finished = self._take()
            left = deadline - self._clock()
            if self._built_in.active:
                # Each call takes at least one step, which may be late by one.
                is_shared = finished or len(self._server)
                finished |= self._built_in.poll(min(left, SLICE_SECONDS) if is_shared else left)
            elif not finished and len(self._server) and left > 0:
                self._server.wait(min(left, SLICE_SECONDS))
                finished = self._take()
            self._on_progress()
            if finished or not self.active or self._clock() >= deadline:
                return finished

    def _take(self) -> Results:
        """What has come from the server; jobs that it returned go on here."""
        finished: Results = {}
        for key, result in self._server.take().items():
            job = self._jobs[key]
            if isinstance(result, Returned):
                self._counts["not answered by the server"] += 1
                try:
                    self._built_in.submit(key, job)
                except TrainingError as error:
                    finished[key] = error
            else:
                finished[key] = result
            self._end(key)
        return finished

    def _end(self, key: str) -> None:
        """A job has left the server."""
        job = self._jobs.pop(key)
        if job.version is not None:
            self._versions[job.version].num_jobs -= 1
            self._forget_if_over(job.version)

    def progress(self, key: str) -> list[str]:
        if key in self._jobs:
            return self._server.progress(key)
        return self._built_in.progress(key)

    def cancel(self, key: str) -> int:
        if key not in self._jobs:
            return self._built_in.cancel(key)
        num_tokens = self._server.cancel(key)
        self._end(key)
        return num_tokens

    def release_memory(self) -> None:
        self._built_in.release_memory()

    @property
    def needs_turns(self) -> bool:
        return self._built_in.active > 0

    @property
    def active(self) -> int:
        return len(self._jobs) + self._built_in.active

    def figures(self) -> Mapping[str, Any]:
        reasons = {name: number for name, number in self._counts.items() if name != "server"}
        return {
            **self._built_in.figures(),
            "vllm": {
                **self._link.figures(),
                "sampled_there": self._counts["server"],
                "sampled_here": dict(Counter(reasons).most_common(20)),
            },
        }

    def close(self) -> None:
        self._server.close()
        self._folders.unlock()
