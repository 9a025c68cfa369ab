"""Continuous batching: sampling jobs of many adapters share the passes over the base model.

A step is one pass over the base model, of one of two kinds. A prefill pass reads the next chunk
of some new prompts; a decode pass reads the newest token of every active sequence and samples
the next one. If there is work of both kinds they alternate, so that a long prompt delays
nobody and a busy sampler still starts new jobs.

A job's tokens depend on its prompt, its weights and (seed, sequence number), and not on its
batch-mates (``model_runner``): each sequence has its own random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.engine.interface import CapturedAdapter, SampleJob, SampleOutput, Sampler
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.admission import Admission
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.logit_changes import changed_logits, changes_logits
from training.engine.sampler.logits import choose_tokens
from training.engine.sampler.model_runner import ModelRunner, Row
from training.engine.sampler.packed_runner import PackedRunner
from training.engine.sampler.padded.runner import PaddedRunner
from training.engine.sampler.sequence import ActiveRequest, check_prompt, new_request
from training.engine.sampler.turns import Turns
from training.engine.sampler.versions import Versions
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS
from training.engine.torch.base_model import BaseModel
from training.engine.torch.checkpoint_io import CapturedTensors, load_weights
from training.engine.torch.out_of_memory import out_of_memory_by_name
from training.engine.torch.to_device import to_device
from training.errors import NonFiniteResult, TrainingError

Results = dict[str, SampleOutput | TrainingError]


class ContinuousSampler(Sampler):
    """Samples from a trainer's base model, in the trainer's process and thread."""

    def __init__(
        self,
        base_model: BaseModel,
        text: ChatRenderer,
        *,
        cache_tokens: int = 32_768,
        max_sequences: int = 256,
        max_tokens_limit: int | None = None,
        prefill_chunk_tokens: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            cache_tokens: Prompt and sampled tokens, of all sequences, that the cache holds.
            max_sequences: Sequences decoded at one time.
            max_tokens_limit: Most tokens of a job without ``max_tokens``.
            prefill_chunk_tokens: Most prompt tokens in one step.
            clock: Seconds, for ``poll``.
        """
        self._base_model = base_model
        self._text = text
        self._clock = clock
        self._on_progress: Callable[[], None] = lambda: None
        self._runner: ModelRunner = (
            PaddedRunner(base_model, cache_tokens=cache_tokens, chunk_tokens=prefill_chunk_tokens)
            if base_model.is_padded
            else PackedRunner(
                base_model,
                KvCache(cache_tokens // BLOCK_TOKENS, base_model.device),
                chunk_tokens=prefill_chunk_tokens,
            )
        )
        self._versions: Versions[AdapterTensors] = Versions()
        self._active: dict[str, ActiveRequest] = {}
        """All requests; each is either waiting in the admission or running."""
        self._admission = Admission(
            base_model.info,
            self._runner,
            max_sequences=max_sequences,
            max_tokens_limit=max_tokens_limit,
        )
        self._running: list[ActiveRequest] = []
        self._turns = Turns()
        self._prefilled_last = False

    def report_progress(self, to: Callable[[], None]) -> None:
        self._on_progress = to

    def publish(self, version: str, weights: CapturedAdapter | Path) -> None:
        self._versions.publish(version, lambda: self._load(weights))

    def _load(self, weights: CapturedAdapter | Path) -> AdapterTensors:
        if isinstance(weights, Path):
            with out_of_memory_by_name():
                return load_weights(
                    weights, self._base_model.linear_shapes, self._base_model.device
                )
        if not isinstance(weights, CapturedTensors):
            raise TypeError(f"{type(weights).__name__} was not captured by this base model")
        return weights.weights

    def weights(self, version: str) -> AdapterTensors:
        """The weights of a version that is held."""
        return self._versions.weights(version)

    def retire(self, version: str) -> None:
        self._versions.retire(version)
        self._forget_if_over(version)

    def _forget_if_over(self, version: str | None) -> None:
        if version is not None and version not in self._versions.num_jobs:
            self._runner.retire(version)

    @property
    def versions(self) -> Mapping[str, int]:
        return self._versions.num_jobs

    def submit(self, key: str, job: SampleJob) -> None:
        if key in self._active:
            raise ValueError(f"a job is active under the key {key!r}")
        check_prompt(job, self._base_model.info)
        request = new_request(
            key,
            job,
            max_tokens=self._admission.max_tokens(job),
            text=self._text,
            info=self._base_model.info,
        )
        if job.images:
            request.skipped_positions = self._base_model.skipped_positions(job.prompt, job.images)
        request.weights = self._versions.begin_job(job.version)
        self._active[key] = request
        self._admission.add(request)

    def poll(self, wait_seconds: float) -> Results:
        deadline = self._clock() + wait_seconds
        finished: Results = {}
        while self._active and not finished:
            finished = self.step()
            self._on_progress()
            if self._clock() >= deadline:
                break
        return finished

    def progress(self, key: str) -> list[str]:
        if key not in self._active:
            raise ValueError(f"no job is active under the key {key!r}")
        request = self._active[key]
        return [sequence.progress(self._text, request.prompt_end) for sequence in request.sequences]

    def cancel(self, key: str) -> int:
        request = self._active.get(key)
        if request is None:
            return 0
        self._end(request)
        return sum(len(sequence.tokens) for sequence in request.sequences)

    def figures(self) -> dict[str, int]:
        return {
            "cache_tokens": self._runner.most_tokens(1),
            "cache_tokens_held": self._runner.num_held,
            "preemptions": self._runner.num_preempted,
        }

    def release_memory(self) -> None:
        if not self._active:
            self._runner.clear()

    def is_active(self, key: str) -> bool:
        """Whether a job of this key is active."""
        return key in self._active

    @property
    def active(self) -> int:
        return len(self._active)

    def _end(self, request: ActiveRequest) -> None:
        """Free all resources of a request, in every state."""
        del self._active[request.key]
        self._versions.end_job(request.job.version)
        if request in self._running:
            self._running.remove(request)
            self._runner.forget(request)
        else:
            self._admission.remove(request.key)
        self._forget_if_over(request.job.version)

    @torch.no_grad()
    def step(self) -> Results:
        """Make one pass, if a job is active; the jobs that this finished."""
        self._running += self._admission.start(self._running)
        reading = [request for request in self._running if request.needs_reading]
        decoding = [request for request in self._running if any(request.decodable())]
        if reading and not (decoding and self._prefilled_last):
            self._prefilled_last = True
            return self._read_prompts(reading)
        self._prefilled_last = False
        if not decoding:
            return {}
        taking = self._turns.decoding(decoding, pass_keys=self._runner.pass_keys)
        return self._sample(*self._runner.decode(taking))

    def _read_prompts(self, reading: Sequence[ActiveRequest]) -> Results:
        """Read the next chunk of some prompts; after the last one, sample the first tokens."""
        read = self._runner.read_prompts(self._turns.reading(reading))
        finished: Results = {
            request.key: request.output(self._text) for request in read if not request.max_tokens
        }
        for key in finished:
            self._end(self._active[key])
        return finished | self._sample_first(
            {request: row for request, row in read.items() if request.max_tokens}
        )

    def _sample_first(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Results:
        """Begin decoding the requests whose prompt's last row (H,) is given."""
        if not last_hidden:
            return {}
        logits = self._runner.first_logits(last_hidden)  # (n, V)
        rows: list[Row] = []
        logits_rows: list[int] = []
        for i, request in enumerate(last_hidden):
            rows += [(request, sequence) for sequence in request.sequences]
            logits_rows += [i] * len(request.sequences)
        return self._sample(rows, logits[to_device(logits_rows, logits.device)])

    def _sample(self, rows: Sequence[Row], logits: Tensor) -> Results:
        """Append the next token to each row's sequence; return the jobs that this finished."""
        if not rows:
            return {}
        choices = choose_tokens(
            logits,
            [request.job.sampling_params for request, _ in rows],
            [sequence.uniforms.next() for _, sequence in rows],
            [request.job.scoring.topk_sample_logprobs for request, _ in rows],
            {
                i: changed_logits(
                    logits[i], request.job.sampling_params, request.job.prompt, sequence.tokens
                )
                for i, (request, sequence) in enumerate(rows)
                if changes_logits(request.job.sampling_params)
            },
        )
        failed: set[str] = set()
        for (request, sequence), choice in zip(rows, choices, strict=True):
            if choice.is_finite:
                request.append(sequence, choice)
                if sequence.stop_reason is not None:
                    self._runner.end(request, sequence)
            else:
                failed.add(request.key)
        finished: Results = {}
        for request in {request.key: request for request, _ in rows}.values():
            if request.key in failed:
                finished[request.key] = NonFiniteResult()
            elif not any(request.unfinished()):
                finished[request.key] = request.output(self._text)
        for key in finished:
            self._end(self._active[key])
        return finished
