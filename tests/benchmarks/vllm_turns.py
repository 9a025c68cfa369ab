"""The same requests through us to a vLLM server and to it directly, in one turn."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from tests.benchmarks.vllm_processes import used_seconds
from tests.server import Server
from training.engine.interface import SampleJob
from training.engine.vllm.requests import request_body
from training.types import SamplingParams
from training.vllm_server import VllmConnection

REQUESTS = 64


@dataclass(frozen=True)
class Workload:
    """64 requests of one base model."""

    model: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    max_lora_rank: int
    """Of the server. The base model is sampled through an adapter of zeros, which costs vLLM more
    the larger this is, and then what we add counts for less."""

    def prompts(self, folder: Path, turn: int) -> list[list[int]]:
        """New ones for each turn: otherwise vLLM would know their keys and values."""
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        shape = (REQUESTS, self.prompt_tokens)
        found: list[list[int]] = np.random.default_rng(turn).integers(3, vocab_size, shape).tolist()
        return found

    def __str__(self) -> str:
        return f"{self.model} model, {self.prompt_tokens} + {self.new_tokens} tokens"


DEFAULT = Workload("default", "bfloat16", 64, 64, 1)
TINY = Workload("tiny", "float32", 32, 32, 8)


@dataclass(frozen=True)
class Turn:
    """The two ways of the same requests to one vLLM server. Each sends all at once and returns the
    seconds until the last is answered."""

    server: Server
    new_tokens: int
    prompts: list[list[int]]

    async def through_us(self) -> float:
        bodies = [
            {
                "base_model": "base",
                "prompt": prompt,
                "sampling_params": {
                    "max_tokens": self.new_tokens,
                    "seed": seed,
                    "stop": [],
                },
            }
            for seed, prompt in enumerate(self.prompts)
        ]
        answers, seconds = await self._send(f"{self.server.url}/api/v1/sample", bodies)
        self._check([answer["sequences"][0]["tokens"] for answer in answers])
        return seconds

    async def alone(self) -> float:
        connection = connection_of(self.server)
        model_name = name_of_base_model(connection)
        bodies = [
            request_body(
                SampleJob(
                    prompt=np.array(prompt, np.int32), sampling_params=SamplingParams(seed=seed)
                ),
                0,
                request_id=f"alone-{seed}",
                model=model_name,
                max_tokens=self.new_tokens,
                end_token_ids=(),
                salt="alone",
            )
            for seed, prompt in enumerate(self.prompts)
        ]
        answers, seconds = await self._send(
            f"{connection.address}/inference/v1/generate", bodies, connection.key
        )
        self._check([answer["choices"][0]["token_ids"] for answer in answers])
        return seconds

    async def _send(
        self, url: str, bodies: list[dict[str, Any]], key: str = ""
    ) -> tuple[list[Any], float]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx2.AsyncClient(timeout=None, trust_env=False, headers=headers) as http:
            begin = time.monotonic()
            answers = await asyncio.gather(*(http.post(url, json=body) for body in bodies))
            contents = [answer.json() for answer in answers]
            return contents, time.monotonic() - begin

    def _check(self, sampled: list[list[int]]) -> None:
        assert [len(tokens) for tokens in sampled] == REQUESTS * [self.new_tokens]


@dataclass(frozen=True)
class Measured:
    """One turn: wall seconds and processor seconds of both ways."""

    through_us: float
    alone: float
    used_through_us: dict[str, float]
    used_alone: dict[str, float]


def measured(server: Server, workload: Workload, folder: Path, number: int) -> Measured:
    """Turn ``number``; those with odd numbers begin with vLLM alone."""
    turn = Turn(server, workload.new_tokens, workload.prompts(folder, number))
    seconds: dict[str, float] = {}
    used: dict[str, dict[str, float]] = {}
    ways = {"through us": turn.through_us, "alone": turn.alone}
    for name in sorted(ways, reverse=number % 2 == 0):
        before = used_seconds(server)
        seconds[name] = asyncio.run(ways[name]())
        after = used_seconds(server)
        used[name] = {part: after[part] - before[part] for part in after}
    return Measured(seconds["through us"], seconds["alone"], used["through us"], used["alone"])


def connection_of(server: Server) -> VllmConnection:
    (file,) = (server.data_dir / "vllm").glob("*/server.*.json")
    content = json.loads(file.read_text())
    return VllmConnection(address=content["address"], key=content["key"])


def name_of_base_model(connection: VllmConnection) -> str:
    """The name by which the worker asks for the base model.

    On a CPU it is that of an adapter of zeros, the only adapter that is loaded (``docs/vllm.md``):
    asked for by its own name, the base model would be computed without an adapter, in a third of
    the time.
    """
    headers = {"Authorization": f"Bearer {connection.key}"}
    answer = httpx2.get(f"{connection.address}/v1/models", headers=headers, trust_env=False)
    adapters = [card["id"] for card in answer.json()["data"] if card.get("parent")]
    assert len(adapters) <= 1, adapters
    return adapters[0] if adapters else "base"
