"""The routes of a vLLM server over an engine of ours, for the faults that a real one cannot be made
to show. It keeps to what version 0.32.0 of vLLM does, traps included.

Adapters come from their files by our import of peft's format. At most ``max_cpu_loras`` stay in
memory; a request for another one reads its files again, and if they are gone the engine dies: from
then on everything answers 500, until ``restart``.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from training.engine.factory import engine_over
from training.engine.interface import SampleJob, SampleOutput
from training.engine.sampler.prompt_logprobs import top_logprobs
from training.engine.torch.base_model import BaseModel
from training.errors import TrainingError
from training.types import SampledSequence, SamplingParams, ScoringParams
from training.vllm_server import VllmConnection

BASE, KEY = "tiny", "the key"
PREFIX = "generate-tokens-"


class EngineDead(Exception):
    """Answered with 500."""


class Refused(Exception):
    """Answered with 4xx."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class VllmDouble:
    """A server on a port of its own; ``close`` ends it."""

    def __init__(
        self,
        base_model: BaseModel,
        *,
        max_loras: int = 2,
        max_cpu_loras: int = 4,
        is_on_cpu: bool = True,
        port: int = 0,
        key: str = KEY,
    ) -> None:
        """
        Args:
            is_on_cpu: The base model gets the adapter in the last slot, as on vLLM's CPU if another
                request with an adapter is in the batch.
            port: 0: each life has another one.
            key: That clients must send.
        """
        self._port = port
        self._life = 0
        self.key = key
        self._max_loras = max_loras
        self._is_on_cpu = is_on_cpu
        self._base_model = base_model
        self._max_cpu_loras = max_cpu_loras
        self._lock = threading.Lock()
        self._stepped = threading.Condition()
        self.requests: list[dict[str, Any]] = []
        """The bodies of all requests for tokens, in order of their arrival."""
        self.aborted: list[str] = []
        self.loaded = Counter[str]()
        """How often each name was loaded."""
        self.change: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = (
            lambda body, answer: answer
        )
        """Changes whole answers before they are sent."""
        self.hold = threading.Event()
        """Cleared: no step is made."""
        self.hold.set()
        self.holds = threading.Event()
        """Set when a request has begun to be computed."""
        self._http: ThreadingHTTPServer | None = None
        self.start()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve, on a new port and without any adapter."""
        self._begin_life()
        handler = type("Handler", (_Handler,), {"double": self})
        self._http = _Server(("127.0.0.1", self._port), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def _begin_life(self) -> None:
        self._life += 1
        self._engine = engine_over(self._base_model)
        self.is_dead = False
        self.adapters: dict[str, str] = {}
        self._in_memory: OrderedDict[str, None] = OrderedDict()
        self._slots: list[str | None] = [None] * self._max_loras
        self._used: list[str] = []
        self._results: dict[str, SampleOutput | TrainingError] = {}

    def kill(self) -> None:
        """End the process: connections break and the port is closed."""
        self.is_dead = True
        with self._stepped:
            self._stepped.notify_all()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None
        self._thread.join()

    def die(self) -> None:
        """End the engine only; the port still answers."""
        self.is_dead = True
        with self._stepped:
            self._stepped.notify_all()

    def restart(self) -> None:
        if self._http is not None:
            self.kill()
        self.start()

    close = kill

    def become(self, base_model: BaseModel) -> None:
        """Let another server take the place of this one at its address, at once."""
        with self._lock:
            self._base_model = base_model
            self._begin_life()

    @property
    def connection(self) -> VllmConnection | None:
        if self._http is None:
            return VllmConnection(address="http://127.0.0.1:9", key=self.key)
        return VllmConnection(address=f"http://127.0.0.1:{self._http.server_port}", key=self.key)

    # -- routes ----------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        cards: list[dict[str, Any]] = [
            {
                "id": BASE,
                "root": "/somewhere",
                "parent": None,
                "max_model_len": self._base_model.info.max_context_tokens,
            }
        ]
        cards += [{"id": n, "root": path, "parent": BASE} for n, path in self.adapters.items()]
        return {"data": cards}

    def load(self, body: dict[str, Any]) -> str:
        self._require_life()
        name, path = body["lora_name"], body["lora_path"]
        if body.get("load_inplace"):
            raise AssertionError("load_inplace makes every step read the disk")
        if name in self.adapters:
            raise Refused(400, "has already been loaded")
        if not Path(path).is_dir():
            raise Refused(404, "No adapter found")
        with self._lock:
            self._bring(name, path)
        self.adapters[name] = path
        self.loaded[name] += 1
        return "Success"

    def unload(self, body: dict[str, Any]) -> str:
        if body["lora_name"] not in self.adapters:
            raise Refused(404, "cannot be found")
        del self.adapters[body["lora_name"]]  # the engine keeps it
        return "Success"

    def _bring(self, name: str, path: str) -> None:
        """Have an adapter in memory, under the lock."""
        if name not in self._in_memory:
            if not Path(path).is_dir():
                self.is_dead = True
                raise EngineDead(f"the files of {name} are gone")
            trainer, sampler = self._engine.trainer, self._engine.sampler
            trainer.import_adapter(name, Path(path))
            sampler.publish(name, trainer.capture_adapter(name, with_optimizer=False))
            trainer.drop_adapter(name)
        self._in_memory[name] = None
        self._in_memory.move_to_end(name)
        while len(self._in_memory) > self._max_cpu_loras:
            oldest, _ = self._in_memory.popitem(last=False)
            self._engine.sampler.retire(oldest)

    def _has_company(self) -> bool:
        """Whether a request with an adapter is running."""
        active: Any = self._engine.sampler
        return any(request.job.version is not None for request in active._active.values())

    def _activate(self, name: str) -> None:
        """Have an adapter in a slot: a free one, or that of the least recently used."""
        self._used = [each for each in self._used if each != name] + [name]
        if name in self._slots:
            return
        if None in self._slots:
            self._slots[self._slots.index(None)] = name
            return
        oldest = next(each for each in self._used if each in self._slots)
        self._slots[self._slots.index(oldest)] = name

    def _require_life(self, key: str = "") -> None:
        """Of the engine, and of that which has begun the request of this key."""
        if self.is_dead or not key.startswith(f"{self._life} "[: len(key)]):
            raise EngineDead("EngineCore encountered an issue")

    def begin(self, body: dict[str, Any]) -> str:
        """Start a request; returns its key."""
        self._require_life()
        self.requests.append(body)
        model, params = body.get("model") or BASE, body["sampling_params"]
        if model != BASE and model not in self.adapters:
            raise Refused(404, f"The model `{model}` does not exist.")
        assert params["n"] == 1
        num_top = params.get("logprobs") or 0
        ask_prompt = params.get("prompt_logprobs")
        job = SampleJob(
            prompt=np.array(body["token_ids"], np.int32),
            sampling_params=SamplingParams(
                max_tokens=params["max_tokens"],
                seed=params["seed"],
                temperature=params["temperature"],
                stop=tuple(params["stop_token_ids"]),
            ),
            version=None if model == BASE else model,
            prompt_logprobs=ask_prompt is not None,
            scoring=ScoringParams(
                topk_sample_logprobs=num_top, topk_prompt_logprobs=ask_prompt or 0
            ),
            group=body.get("cache_salt", ""),
        )
        key = f"{self._life} {body['request_id']} {len(self.requests)}"
        with self._lock:
            if model != BASE:
                self._bring(model, self.adapters[model])
                self._activate(model)
            elif self._is_on_cpu and self._slots[-1] in self._in_memory and self._has_company():
                job = replace(job, version=self._slots[-1])
            self._engine.sampler.submit(key, job)
        return key

    def step(self, key: str) -> SampledSequence | SampleOutput:
        """Compute until the request has more tokens; its sequence so far, or its output."""
        self.holds.set()
        while not self.hold.wait(0.01):
            self._require_life(key)
        with self._lock:
            self._require_life(key)
            if key not in self._results:
                sampler: Any = self._engine.sampler
                if not sampler.is_active(key):
                    raise Refused(499, "aborted")
                self._results |= sampler.poll(0)
            if key in self._results:
                result = self._results.pop(key)
                if isinstance(result, TrainingError):
                    raise result
                return result
            request = sampler._active[key]
            sequence = request.sequences[0]
            return SampledSequence(
                tokens=list(sequence.tokens),
                logprobs=list(sequence.logprobs),
                stop_reason="",
                top=top_logprobs(sequence.top, request.job.scoring.topk_sample_logprobs),
            )

    def end(self, key: str) -> None:
        with self._lock:
            self._engine.sampler.cancel(key)
            self._results.pop(key, None)

    def abort(self, body: dict[str, Any]) -> str:
        self.aborted += body["request_ids"]
        return ""


def _choice(
    sequence: SampledSequence, since: int, num_top: int, finish: str | None
) -> dict[str, Any]:
    """The tokens from ``since`` on. Of the likely tokens and the sampled one the first
    ``max(num_top, 1)`` are sent, the sampled one first."""
    content = []
    for at in range(since, len(sequence.tokens)):
        token, logprob = sequence.tokens[at], sequence.logprobs[at]
        entries = {token: logprob}
        if sequence.top is not None:
            ids, values = sequence.top.token_ids[at], sequence.top.logprobs[at]
            entries |= dict(zip(ids.tolist(), values.tolist(), strict=True))
        sent = list(entries.items())[: max(num_top, 1)]
        content.append(
            {
                "token_id": token,
                "logprob": logprob,
                "top_logprobs": [{"token_id": t, "logprob": v} for t, v in sent],
            }
        )
    return {
        "index": 0,
        "token_ids": sequence.tokens[since:],
        "logprobs": {"content": content},
        "finish_reason": finish,
    }


def _prompt_rows(body: dict[str, Any], output: SampleOutput) -> list[dict[str, Any] | None]:
    rows: list[dict[str, Any] | None] = [None]
    assert output.prompt_logprobs is not None
    top = output.scores.top
    for at in range(1, len(body["token_ids"])):
        row = {}
        if top is not None:
            ids, values = top.token_ids[at].tolist(), top.logprobs[at].tolist()
            row = dict(zip(ids, values, strict=True))
        row[body["token_ids"][at]] = output.prompt_logprobs[at]
        rows.append({str(token): {"logprob": max(v, -9999.0)} for token, v in row.items()})
    return rows


def whole_answer(double: VllmDouble, body: dict[str, Any]) -> dict[str, Any]:
    key = double.begin(body)
    while not isinstance(result := double.step(key), SampleOutput):
        pass
    (sequence,) = result.sequences
    num_top = body["sampling_params"].get("logprobs") or 0
    answer = {
        "model": body.get("model") or BASE,
        "choices": [_choice(sequence, 0, num_top, sequence.stop_reason)],
        "prompt_logprobs": _prompt_rows(body, result)
        if body["sampling_params"].get("prompt_logprobs") is not None
        else None,
        "usage": {"prompt_tokens_details": {"cached_tokens": result.cached_prompt_tokens}},
    }
    return double.change(body, answer)


def chunks(double: VllmDouble, body: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    num_top, told = body["sampling_params"].get("logprobs") or 0, 0
    try:
        while True:
            result = double.step(key)
            is_over = isinstance(result, SampleOutput)
            sequence = result.sequences[0] if isinstance(result, SampleOutput) else result
            if is_over or len(sequence.tokens) > told:
                finish = sequence.stop_reason if is_over else None
                yield {"choices": [_choice(sequence, told, num_top, finish)]}
                told = len(sequence.tokens)
            if isinstance(result, SampleOutput):
                details = {"cached_tokens": result.cached_prompt_tokens}
                yield {"choices": [], "usage": {"prompt_tokens_details": details}}
                return
    except EngineDead as error:
        yield {"error": {"message": str(error), "code": 500}}
    finally:
        double.end(key)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is no error."""


class _Handler(BaseHTTPRequestHandler):
    double: VllmDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(503 if self.double.is_dead else 200, b"")
        elif self._may():
            self._send(200, json.dumps(self.double.models()).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may():
            return
        try:
            if self.path == "/inference/v1/generate" and body.get("stream"):
                self._stream(body)
                return
            if self.path == "/inference/v1/generate":
                content = json.dumps(whole_answer(self.double, body)).encode()
            else:
                route = {
                    "/v1/load_lora_adapter": self.double.load,
                    "/v1/unload_lora_adapter": self.double.unload,
                    "/inference/v1/abort_requests": self.double.abort,
                }[self.path]
                content = route(body).encode()
        except EngineDead as error:
            self._send(500, json.dumps({"error": {"message": str(error)}}).encode())
        except Refused as error:
            self._send(error.status, json.dumps({"error": {"message": str(error)}}).encode())
        else:
            self._send(200, content)

    def _may(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.double.key}":
            return True
        self._send(401, b'{"error": "Unauthorized"}')
        return False

    def _stream(self, body: dict[str, Any]) -> None:
        key = self.double.begin(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for chunk in chunks(self.double, body, key):
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
