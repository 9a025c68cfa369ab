"""The jobs at the server: one event loop in a thread of its own, so that the caller never waits for
the network.

Each sequence is a request. If the server is lost, its unfinished sequences are asked for again from
their beginning, with the same seeds; a job is returned once. A job that the server cannot answer
comes back as ``Returned``, for the built-in sampler.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import count
from typing import Any

from training.engine.interface import BaseModelInfo, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.sequence import ActiveRequest, new_request
from training.engine.vllm.answers import (
    cached_tokens,
    check_model,
    only_choice,
    read_choices,
    read_scores,
)
from training.engine.vllm.client import ServerLost, ServerRefuses, VllmClient, WrongAnswer
from training.engine.vllm.gate import FairGate
from training.engine.vllm.requests import asks_for_scores, request_body
from training.engine.vllm.server_link import ServerGone, ServerLink, ServerVersion
from training.errors import NonFiniteResult, TrainingError
from training.types import PromptScores

logger = logging.getLogger(__name__)

MOST_TRIES = 3
"""So often a request is sent; it may itself be what ends the server."""


@dataclass(frozen=True)
class Returned:
    """A job that the server did not answer."""

    reason: str


class _NotAnswered(Exception):
    """The server will not answer a request; the message says why."""


@dataclass(kw_only=True, eq=False)
class _Job:
    request: ActiveRequest
    version: ServerVersion | None
    is_streamed: bool
    """Whether its tokens come one by one."""
    told: dict[int, str] = field(default_factory=dict)
    """The text of each sequence that was told; another try may say something else at first."""
    scores: PromptScores = field(default_factory=PromptScores)
    """Those of the prompt that were asked for."""
    cached_tokens: dict[int, int] = field(default_factory=dict)
    """Of the prompt, for each sequence of which the server told them."""
    running: set[str] = field(default_factory=set)
    """Ids of its requests at the server."""
    task: asyncio.Task[None] | None = None
    has_left: bool = False
    """Whether nothing of it runs at the server any more."""


class ServerJobs:
    """See the module. One thread calls it."""

    def __init__(
        self,
        link: ServerLink,
        *,
        text: ChatRenderer,
        info: BaseModelInfo,
        owner: str,
        max_requests: int,
    ) -> None:
        """
        Args:
            owner: Begins the ids of requests, and separates the prompts of samplers.
            max_requests: Requests at the server at one time.
        """
        self._link = link
        self._text = text
        self._info = info
        self._owner = owner
        self._numbers = count(1)
        self._jobs: dict[str, _Job] = {}
        self._finished: dict[str, tuple[_Job, SampleOutput | TrainingError | Returned]] = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._gate = FairGate(max_requests)
        self._thread = threading.Thread(target=self._run_loop, name="vllm", daemon=True)
        self._thread.start()
        self._background: set[Future[None]] = set()
        """What runs in the loop; the loop itself keeps no reference."""
        self._soon(link.run())

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _soon(self, coroutine: Coroutine[Any, Any, None]) -> None:
        running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._background.add(running)
        running.add_done_callback(self._background.discard)

    # -- the caller's thread ---------------------------------------------------------------------

    def submit(
        self, request: ActiveRequest, version: ServerVersion | None, *, is_followed: bool
    ) -> None:
        """Start a job; its key is the request's."""
        has_stop_strings = request.sequences[0].stop_watch is not None
        job = _Job(request=request, version=version, is_streamed=is_followed or has_stop_strings)
        self._jobs[request.key] = job
        if version is not None:
            version.jobs += 1
        self._soon(self._start(job))

    def take(self) -> dict[str, SampleOutput | TrainingError | Returned]:
        """The jobs that have finished since the last call."""
        with self._changed:
            finished, self._finished = self._finished, {}
        results = {}
        for key, (job, result) in finished.items():
            if self._jobs.get(key) is job:
                del self._jobs[key]
                results[key] = result
        return results

    def wait(self, seconds: float) -> None:
        """Return as soon as a job has finished, or when the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._finished), seconds)

    def progress(self, key: str) -> list[str]:
        """The text of each of a job's sequences, as far as it is known and certain."""
        job = self._jobs[key]
        for sequence in list(job.request.sequences):
            text = sequence.progress(self._text, job.request.prompt_end)
            if text.startswith(job.told.get(sequence.number, "")):
                job.told[sequence.number] = text
        return [job.told.get(number, "") for number in range(len(job.request.sequences))]

    def cancel(self, key: str) -> int:
        """Forget a job; the number of its tokens that have come."""
        job = self._jobs.pop(key)
        self._soon(self._cancel(job))
        return sum(len(sequence.tokens) for sequence in job.request.sequences)

    def retire(self, version: ServerVersion) -> None:
        """Have the server forget a version as soon as no job uses it."""
        self._loop.call_soon_threadsafe(self._link.retire, version)

    def __contains__(self, key: str) -> bool:
        return key in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """End the thread. Requests at the server end with their connections."""
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- the loop's thread -----------------------------------------------------------------------

    async def _end_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    async def _start(self, job: _Job) -> None:
        job.task = asyncio.create_task(self._run(job))

    async def _run(self, job: _Job) -> None:
        try:
            result = await self._answered(job)
        except asyncio.CancelledError:
            return  # _cancel does the rest
        except Exception as error:
            logger.exception("a job at the vLLM server")
            result = Returned(f"a fault of the sampler: {error!r}")
        await self._leave(job)
        with self._changed:
            self._finished[job.request.key] = (job, result)
            self._changed.notify()

    async def _leave(self, job: _Job) -> None:
        """Abort what may still run for a job at the server, and release its version."""
        if job.has_left:
            return
        job.has_left = True
        try:
            if job.running and (client := self._link.client) is not None:
                with suppress(ServerLost, ServerRefuses):  # then no request of it is left
                    await client.abort(list(job.running))
        finally:
            if job.version is not None:
                self._link.release(job.version)

    async def _cancel(self, job: _Job) -> None:
        if job.task is not None:
            job.task.cancel()
            await asyncio.wait([job.task])
        await self._leave(job)

    async def _answered(self, job: _Job) -> SampleOutput | TrainingError | Returned:
        request = job.request
        num_asked = len(request.sequences) if request.max_tokens else 1
        tasks = [asyncio.create_task(self._sequence(job, number)) for number in range(num_asked)]
        try:
            await asyncio.gather(*tasks)
        except (_NotAnswered, ServerGone) as error:
            logger.warning("the built-in sampler takes a job of the vLLM server: %s", error)
            return Returned(str(error))
        except NonFiniteResult as error:
            return error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # Whichever sequence the server began first stored the prompt for the others.
        request.cached_tokens = min(job.cached_tokens.get(number, 0) for number in range(num_asked))
        return request.output(self._text, job.scores)

    async def _sequence(self, job: _Job, number: int) -> None:
        """Fill one sequence, in several tries if the server is lost.

        Raises:
            _NotAnswered, ServerGone: The built-in sampler must.
            NonFiniteResult: A log-probability is not finite.
        """
        reason = ""
        async with self._gate.place(job.request.job.group):
            for _ in range(MOST_TRIES):
                life, client, served = await self._link.ready()
                if job.version is not None and not job.version.parts <= self._link.proof.parts:
                    raise _NotAnswered("the server computes such adapters otherwise")
                self._begin_again(job, number)
                model = None
                try:
                    if job.version is None:
                        model = served.name
                    else:
                        model = await self._link.name_of(job.version, life, client)
                    await self._ask(job, number, client, model)
                    return
                except ServerLost as error:
                    reason = str(error)
                    self._link.lost(life, reason)
                except ServerRefuses as error:
                    reason = str(error)
                    if error.status != HTTPStatus.NOT_FOUND or model is None:
                        break
                    # Only another server, or one that was started again, does not know the name.
                    self._link.lost(life, f"it has lost {model}: {reason}")
                except WrongAnswer as error:
                    logger.error("the vLLM server: %s", error)
                    reason = str(error)
                    self._link.lost(life, reason)
        raise _NotAnswered(reason)

    def _begin_again(self, job: _Job, number: int) -> None:
        """Give a sequence a new beginning, if it has got any token."""
        request = job.request
        if request.sequences[number].tokens:
            again = new_request(
                request.key,
                request.job,
                max_tokens=request.max_tokens,
                text=self._text,
                info=self._info,
            )
            request.sequences[number] = again.sequences[number]

    async def _ask(self, job: _Job, number: int, client: VllmClient, model: str) -> None:
        """Ask for one sequence, and for the prompt's scores with the first."""
        request = job.request
        asks_scores = number == 0 and asks_for_scores(request.job)
        if request.max_tokens == 0 or (asks_scores and job.is_streamed):
            if asks_scores:
                content = await self._whole(job, client, self._body(job, number, model, 1))
                job.scores = read_scores(content, request.job)
            if request.max_tokens == 0:
                return
            asks_scores = False
        body = self._body(job, number, model, request.max_tokens)
        if job.is_streamed:
            body["sampling_params"].pop("prompt_logprobs", None)
            await self._stream(job, number, client, body)
            return
        content = await self._whole(job, client, body)
        if asks_scores:
            job.scores = read_scores(content, request.job)
        job.cached_tokens[number] = cached_tokens(content)
        self._append(job, number, only_choice(content))
        if request.sequences[number].stop_reason is None:
            raise WrongAnswer("it ended a sequence before its end")

    def _body(self, job: _Job, number: int, model: str, max_tokens: int) -> dict[str, Any]:
        return request_body(
            job.request.job,
            number,
            request_id=f"{self._owner}-{next(self._numbers)}",
            model=model,
            max_tokens=max_tokens,
            end_token_ids=job.request.end_token_ids,
            salt=f"{self._owner}:{job.request.job.group}",
        )

    async def _whole(
        self, job: _Job, client: VllmClient, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The answer to a request, which is of the model that was asked for."""
        request_id = body["request_id"]
        job.running.add(request_id)
        content = await client.generate(body)
        job.running.discard(request_id)  # otherwise it is unknown whether the server still has it
        check_model(content, body["model"])
        return content

    async def _stream(
        self, job: _Job, number: int, client: VllmClient, body: dict[str, Any]
    ) -> None:
        """Read tokens until the sequence has ended; leaving ends the server's request."""
        request, request_id = job.request, body["request_id"]
        body["stream_options"] = {"include_usage": True}
        job.running.add(request_id)
        async with client.stream(body) as chunks:
            async for chunk in chunks:
                if not chunk.get("choices"):
                    job.cached_tokens[number] = cached_tokens(chunk)
                    continue
                choice = only_choice(chunk)
                self._append(job, number, choice)
                is_over = request.sequences[number].stop_reason is not None
                if is_over and choice.get("finish_reason") is None:
                    break  # a stop string, which only we look for
                if not is_over and choice.get("finish_reason") is not None:
                    raise WrongAnswer("it ended a sequence before its end")
            else:
                job.running.discard(request_id)
        if request_id in job.running:
            with suppress(ServerLost, ServerRefuses):  # its connection has ended in any case
                await client.abort([request_id])
            job.running.discard(request_id)

    def _append(self, job: _Job, number: int, choice: Mapping[str, Any]) -> None:
        request = job.request
        sequence = request.sequences[number]
        for each in read_choices(choice, request.job.scoring.topk_sample_logprobs):
            if not each.is_finite:
                raise NonFiniteResult
            request.append(sequence, each)
            if sequence.stop_reason is not None:
                return
