"""Continuous batching: sampling jobs of many adapters share the passes over the base model.

A step is one pass over the base model, of one of two kinds. A prefill pass reads the next chunk
of some new prompts; a decode pass reads the newest token of every active sequence and samples
the next one. With both kinds of work at hand they take turns, so that a long prompt holds up
nobody and a busy sampler still lets new jobs in.

A job's tokens depend on its prompt, its weights and (seed, sequence number), and on nothing that
shares its steps: where a prompt is cut into chunks depends on the prompt only; a pass computes
every row on its own; random numbers belong to a sequence. On a CPU the log-probabilities are
equal to the bit (``ROWS_MULTIPLE`` and ``kv_cache.ALIGNMENT_TOKENS`` see to it; float32 adapters
of rank 1 are the exception that was found). A GPU chooses its matrix kernels by the number of
rows, so there the last bits may differ.

Waiting jobs start when the cache and the decode pass have room for all of a job. Groups share the
places; within a group the order is that of admission.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.engine.interface import SampleJob, SampleOutput, Sampler
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.logit_changes import changed_logits, changes_logits
from training.engine.sampler.logits import choose_tokens
from training.engine.sampler.sequence import (
    ActiveRequest,
    ActiveSequence,
    check_prompt,
    new_request,
)
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.attention.cached import (
    DecodeAttention,
    DecodeRun,
    PrefillAttention,
    PrefillChunk,
)
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.stream import (
    Attention,
    PackedContext,
    Segment,
    fewest_rows,
    uniform_segments,
)
from training.errors import InvalidRequest, LimitExceeded, NonFiniteResult, TrainingError

ROWS_MULTIPLE = {torch.float32: 4, torch.bfloat16: 2}
"""The rows of each segment of a pass are padded to a multiple of this. CPU matrix kernels take
rows in such blocks and sum what is left over in another order (measured with MKL and oneDNN, one
thread and several), so without padding a row's last bits would depend on how many share it."""

LOGITS_ROWS = 64
"""Rows of a prompt whose logits exist at one time, (64, V) float32."""

Row = tuple[ActiveRequest, ActiveSequence]
"""Whose newest token a row of a decode pass is."""


class ContinuousSampler(Sampler):
    """Samples from one base model under any of its resident adapters."""

    def __init__(
        self,
        base_model: BaseModel,
        text: ChatRenderer,
        find_weights: Callable[[str], AdapterTensors],
        *,
        cache_tokens: int = 32_768,
        max_sequences: int = 256,
        max_tokens_limit: int | None = None,
        prefill_chunk_tokens: int = 256,
    ) -> None:
        """
        Args:
            find_weights: An adapter's weights as of now, or an error that refuses the name.
            cache_tokens: Prompt and sampled tokens, of all sequences, that the cache holds.
            max_sequences: Sequences decoded at one time.
            max_tokens_limit: What a job that names no ``max_tokens`` may sample at most.
            prefill_chunk_tokens: Most prompt tokens in one step.
        """
        self._base_model = base_model
        self._text = text
        self._find_weights = find_weights
        self._cache = KvCache(cache_tokens, base_model.device)
        self._max_sequences = max_sequences
        self._max_tokens_limit = max_tokens_limit
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._rows_multiple = ROWS_MULTIPLE.get(base_model.dtype, 1)
        smallest = min(s.in_features * s.out_features for s in base_model.linear_shapes.values())
        self._fewest_rows = fewest_rows(base_model.device, base_model.dtype, smallest)
        self._keys: set[str] = set()
        self._waiting: deque[ActiveRequest] = deque()
        self._prefilling: deque[ActiveRequest] = deque()
        self._decoding: list[ActiveRequest] = []
        self._prefilled_last = False
        self._num_started = 0
        self._last_started: dict[str, int] = {}
        """Group to which job of all, by number, its last one to start was."""

    def admit(self, key: str, job: SampleJob) -> None:
        if key in self._keys:
            raise ValueError(f"a job is active under the key {key!r}")
        check_prompt(job, self._base_model.info)
        request = new_request(
            key,
            job,
            weights=None if job.adapter_name is None else self._find_weights(job.adapter_name),
            max_tokens=self._max_tokens(job),
            text=self._text,
            info=self._base_model.info,
        )
        self._keys.add(key)
        self._waiting.append(request)

    def progress(self, key: str) -> list[str]:
        for request in (*self._waiting, *self._prefilling, *self._decoding):
            if request.key == key:
                return [
                    sequence.progress(self._text, request.job.prompt)
                    for sequence in request.sequences
                ]
        raise ValueError(f"no job is active under the key {key!r}")

    def cancel(self, key: str) -> int:
        if key not in self._keys:
            return 0
        self._keys.remove(key)
        num_sampled = 0
        for request in (*self._prefilling, *self._decoding):
            if request.key == key:
                num_sampled += sum(len(sequence.tokens) for sequence in request.sequences)
                if request.region is not None:
                    self._cache.release(request.region)
        self._waiting = deque(r for r in self._waiting if r.key != key)
        self._prefilling = deque(r for r in self._prefilling if r.key != key)
        self._decoding = [r for r in self._decoding if r.key != key]
        return num_sampled

    @property
    def active(self) -> int:
        return len(self._keys)

    @torch.no_grad()
    def step(self) -> dict[str, SampleOutput | TrainingError]:
        self._start_waiting()
        if self._prefilling and not (self._decoding and self._prefilled_last):
            self._prefilled_last = True
            return self._prefill()
        self._prefilled_last = False
        return self._decode() if self._decoding else {}

    def _max_tokens(self, job: SampleJob) -> int:
        """Tokens that each sequence may sample: never more than the context leaves room for.

        Raises:
            InvalidRequest: ``max_tokens`` is less than 0, or ``num_samples`` less than 1.
            LimitExceeded: The job asks for more than could ever run at one time.
        """
        if job.num_samples < 1:
            raise InvalidRequest(f"num_samples: {job.num_samples} is less than 1")
        if job.num_samples > self._max_sequences:
            raise LimitExceeded(
                f"num_samples: {job.num_samples} is more than the {self._max_sequences} sequences "
                "that this server samples at one time"
            )
        asked = job.sampling_params.max_tokens
        if asked is not None and asked < 0:
            raise InvalidRequest(f"max_tokens: {asked} is less than 0")
        room = self._base_model.info.max_context_tokens - len(job.prompt)
        # What the cache could hold for each sequence, were it empty.
        cached = self._cache.tokens_each(job.num_samples) - len(job.prompt) + 1
        if asked is None:
            asked = max(min(room, cached, self._max_tokens_limit or room), 1)
        max_tokens = min(room, asked)
        if max(max_tokens, 1) > cached:
            raise LimitExceeded(
                f"{job.num_samples} sequences of {len(job.prompt)} prompt and {max_tokens} sampled "
                f"tokens are more than the {self._cache.capacity_tokens} tokens that this server "
                "holds for sampling: ask for fewer samples or a smaller max_tokens"
            )
        return max_tokens

    def _start_waiting(self) -> None:
        """Let waiting jobs start while the cache and the decode pass have room.

        The next is the oldest of the group that has the fewest sequences under way, and among such
        groups of the one that has waited longest. It is not passed by when it does not fit, so
        that a large one comes to its turn as well.
        """
        started = Counter[str]()
        for request in (*self._prefilling, *self._decoding):
            started[request.job.group] += request.job.num_samples
        while self._waiting and started.total() < self._max_sequences:
            request = min(
                self._waiting,
                key=lambda r: (started[r.job.group], self._last_started.get(r.job.group, 0)),
            )
            num_samples = request.job.num_samples
            if started.total() + num_samples > self._max_sequences:
                break
            request.region = self._cache.reserve(num_samples, request.rows_each)
            if request.region is None:
                break
            started[request.job.group] += num_samples
            self._num_started += 1
            self._last_started[request.job.group] = self._num_started
            self._waiting.remove(request)
            self._prefilling.append(request)

    # -- prefill -----------------------------------------------------------------------------------

    def _prefill(self) -> dict[str, SampleOutput | TrainingError]:
        """Read the next chunk of some prompts; where it was the last, sample the first tokens."""
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        chunks: list[tuple[ActiveRequest, PrefillChunk]] = []
        for request in self._prefilling:
            chunk = self._next_chunk(request, first_row=len(tokens))
            padding = [0] * (-chunk.num_tokens % self._rows_multiple)
            num_rows = chunk.num_tokens + len(padding)
            if chunks and len(tokens) + num_rows > self._prefill_chunk_tokens:
                break
            chunks.append((request, chunk))
            tokens += [*request.job.prompt[chunk.start : chunk.end], *padding]
            positions += [*range(chunk.start, chunk.end), *padding]
            segments.append(
                Segment(start=chunk.first_row, end=len(tokens), weights=request.weights)
            )
        missing = [0] * self._pad(segments)
        tokens += missing
        positions += missing
        attention = PrefillAttention(self._cache, [chunk for _, chunk in chunks])
        hidden = self._hidden_states(tokens, positions, segments, attention)  # (T, H)
        for request, chunk in chunks:
            request.num_prefilled = chunk.end
            self._score(request, chunk, hidden)
        read = {
            request: hidden[chunk.first_row + chunk.num_tokens - 1]
            for request, chunk in chunks
            if chunk.end == len(request.job.prompt)
        }
        finished: dict[str, SampleOutput | TrainingError] = {
            request.key: request.output(self._text) for request in read if not request.max_tokens
        }
        for key in finished:
            self.cancel(key)
        return finished | self._sample_first(
            {request: row for request, row in read.items() if request.max_tokens}
        )

    def _next_chunk(self, request: ActiveRequest, *, first_row: int) -> PrefillChunk:
        """Cut at multiples of the chunk size, whatever shares the pass."""
        assert request.region is not None  # noqa: S101 - reserved before prefilling
        start = request.num_prefilled
        end = min(start + self._prefill_chunk_tokens, len(request.job.prompt))
        return PrefillChunk(
            first_row=first_row, region=request.region, start=start, num_tokens=end - start
        )

    def _sample_first(
        self, last_hidden: Mapping[ActiveRequest, Tensor]
    ) -> dict[str, SampleOutput | TrainingError]:
        """Begin decoding the requests whose prompt's last row (H,) is given."""
        if not last_hidden:
            return {}
        segments = [
            Segment(start=i, end=i + 1, weights=request.weights)
            for i, request in enumerate(last_hidden)
        ]
        padding = -len(last_hidden) % self._rows_multiple
        hidden = pad(torch.stack(list(last_hidden.values())), (0, 0, 0, padding))  # (n, H)
        logits = self._base_model.logits(hidden, segments)  # (n, V)
        rows: list[Row] = []
        logits_rows: list[int] = []
        for i, request in enumerate(last_hidden):
            assert request.region is not None  # noqa: S101 - reserved before prefilling
            self._prefilling.remove(request)
            self._decoding.append(request)
            self._cache.share_prompt(request.region, len(request.job.prompt))
            rows += [(request, sequence) for sequence in request.sequences]
            logits_rows += [i] * len(request.sequences)
        return self._sample(rows, logits[logits_rows])

    def _score(self, request: ActiveRequest, chunk: PrefillChunk, hidden: Tensor) -> None:
        """Tell the request's scorer what its chunk's rows of ``hidden`` (T, H) say of the prompt;
        the row of position i speaks of the token at i + 1."""
        end = min(chunk.end, len(request.job.prompt) - 1)
        for start in range(max(chunk.start, request.scorer.first_position - 1), end, LOGITS_ROWS):
            first = chunk.first_row + start - chunk.start
            rows = hidden[first : first + min(LOGITS_ROWS, end - start)]  # (n, H)
            segments = uniform_segments(len(rows), request.weights)
            request.scorer.add(start + 1, self._base_model.logits(rows, segments))  # (n, V)

    # -- decode ------------------------------------------------------------------------------------

    def _decode(self) -> dict[str, SampleOutput | TrainingError]:
        """Read the newest token of every active sequence and sample the next one."""
        rows: list[Row | None] = []  # None is padding
        segments: list[Segment] = []
        # Jobs of one adapter next to each other, otherwise in the order in which they started.
        groups: dict[int, list[ActiveRequest]] = {}
        for request in self._decoding:
            groups.setdefault(id(request.weights), []).append(request)
        for requests in groups.values():
            start = len(rows)
            rows += [(request, s) for request in requests for s in request.unfinished()]
            rows += [None] * (-(len(rows) - start) % self._rows_multiple)
            segments.append(Segment(start=start, end=len(rows), weights=requests[0].weights))
        rows += [None] * self._pad(segments)
        attention = DecodeAttention(self._cache, _decode_runs(rows), len(rows))
        tokens = [0 if row is None else row[1].tokens[-1] for row in rows]
        positions = [
            0 if row is None else len(row[0].job.prompt) + len(row[1].tokens) - 1 for row in rows
        ]
        hidden = self._hidden_states(tokens, positions, segments, attention)  # (T, H)
        logits = self._base_model.logits(hidden, segments)  # (T, V)
        if attention.real_rows is not None:
            logits = logits[attention.real_rows]
        return self._sample([row for row in rows if row is not None], logits)

    # -- both --------------------------------------------------------------------------------------

    def _pad(self, segments: list[Segment]) -> int:
        """Add a segment of the rows that a pass still needs; say how many those are."""
        start = segments[-1].end
        missing = max(0, self._fewest_rows - start)
        if missing:
            segments.append(Segment(start=start, end=start + missing, weights=None))
        return missing

    def _hidden_states(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        segments: Sequence[Segment],
        attention: Attention,
    ) -> Tensor:
        device = self._base_model.device
        return self._base_model.hidden_states(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, device=device),
            PackedContext(segments=segments, attention=attention),
        )  # (T, H)

    def _sample(
        self, rows: Sequence[Row], logits: Tensor
    ) -> dict[str, SampleOutput | TrainingError]:
        """Append the next token to each row's sequence; return the jobs that this finished."""
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
            else:
                failed.add(request.key)
        finished: dict[str, SampleOutput | TrainingError] = {}
        for request in {request.key: request for request, _ in rows}.values():
            if request.key in failed:
                finished[request.key] = NonFiniteResult()
            elif not any(request.unfinished()):
                finished[request.key] = request.output(self._text)
        for key in finished:
            self.cancel(key)
        return finished


def _decode_runs(rows: Sequence[Row | None]) -> list[DecodeRun]:
    """Rows of one job whose sequences are neighbours in the cache too, taken together."""
    stretches: list[list[tuple[int, Row]]] = []
    for index, row in enumerate(rows):
        if row is None:
            continue
        request, sequence = row
        if stretches:
            last_index, (last_request, last_sequence) = stretches[-1][-1]
            if (
                last_index == index - 1
                and last_request is request
                and last_sequence.number == sequence.number - 1
            ):
                stretches[-1].append((index, row))
                continue
        stretches.append([(index, row)])
    runs = []
    for stretch in stretches:
        index, (request, sequence) = stretch[0]
        assert request.region is not None  # noqa: S101 - reserved before prefilling
        runs.append(
            DecodeRun(
                first_row=index,
                region=request.region,
                first_sequence=sequence.number,
                count=len(stretch),
                length=len(request.job.prompt) + len(sequence.tokens),
            )
        )
    return runs
