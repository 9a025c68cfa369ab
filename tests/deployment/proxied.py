"""What must work through a TLS proxy in front of a server: the same checks for every proxy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import requests

from tests.acceptance.official_sdk import api_key, run_script
from tests.environment import clean_environment
from tests.server import Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS

FILES = Path(__file__).resolve().parents[2] / "tinkerapi" / "docs" / "deployment"

DATUM = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TRAIN = {"data": [DATUM], "loss_fn": "cross_entropy"}

_SCRIPT = """
model = new_model()
losses = []
for _ in range(2):
    future = model.forward_backward([datum([5, 6, 7, 8, 9])], "cross_entropy")
    model.optim_step(types.AdamParams(learning_rate=5e-2)).result()
    losses.append(future.result().metrics["loss:sum"])
path = model.save_weights_for_sampler("kept").result().path
sampler = service.create_sampling_client(model_path=path)
result = sampler.sample(
    prompt=types.ModelInput.from_ints([5, 6]), num_samples=2,
    sampling_params=types.SamplingParams(max_tokens=4, seed=3, stop=[]),
).result()
report(losses=losses, tokens=[list(item.tokens) for item in result.sequences], path=path)
"""


class Proxied:
    """A running server, and the address of the proxy in front of it."""

    def __init__(self, server: Server, url: str, certificate: Path) -> None:
        self.server = server
        self.url = url
        self.certificate = certificate
        """The authority that signed the proxy's certificate."""
        self.tls = ssl.create_default_context(cafile=str(certificate))
        self.key = api_key(server)

    def post(self, path: str, body: bytes | Mapping[str, Any], **more: Any) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(
            self.url + path,
            data=data,
            headers={"X-API-Key": self.key, "Content-Type": "application/json"},
            verify=str(self.certificate),
            timeout=LONG_SECONDS,
            **more,
        )

    def check_keys(self) -> None:
        """A request from the proxy needs a key, though the proxy is on this machine."""
        answer = requests.post(
            f"{self.url}/api/v1/add_lora",
            json={"model_id": "nobodys"},
            verify=str(self.certificate),
            timeout=LONG_SECONDS,
        )
        assert answer.status_code == 401, answer.text

    def check_sdk(self) -> None:
        """The tinker SDK trains, saves, samples and gets a link that works outside."""
        facts = run_script(
            self.server,
            _SCRIPT,
            TINKER_BASE_URL=self.url,
            SSL_CERT_FILE=str(self.certificate),
        )
        assert facts["losses"][1] < facts["losses"][0]
        assert [len(tokens) for tokens in facts["tokens"]] == [4, 4]
        run, _, name = facts["path"].removeprefix("tinker://").split("/")
        link = requests.get(
            f"{self.url}/api/v1/training_runs/{run}/checkpoints/sampler_weights/{name}/archive",
            headers={"X-API-Key": self.key},
            verify=str(self.certificate),
            timeout=LONG_SECONDS,
        ).json()["url"]
        assert link.startswith(self.url)
        archive = requests.get(link, verify=str(self.certificate), timeout=LONG_SECONDS)
        assert archive.status_code == 200
        assert len(archive.content) > 1000

    def check_stream(self) -> None:
        """Text arrives while it is sampled: a stream that the proxy collects would begin when
        its request is finished."""
        with openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=self.tls),
        ) as client:
            chunks = iter(
                client.chat.completions.create(
                    model=client.models.list().data[0].id,
                    messages=[{"role": "user", "content": "a"}],
                    seed=1,
                    max_tokens=400,
                    stream=True,
                    extra_body={"stop": ["never"]},
                )
            )
            first = next(chunks)
            asked = self.post("/retrieve_future", {"request_id": first.id})
            assert asked.status_code == 202, asked.text
            assert len(list(chunks)) > 3

    def check_large_bodies(self, folder: Path) -> None:
        """A body of almost 32 MiB is trained on; an import of 40 MiB reaches the server, which
        says what is wrong with it."""
        body = json.dumps({"model_id": "large", **TRAIN}).encode()
        answer = self.post("/api/v1/forward_backward", body.ljust(33_000_000))
        assert answer.status_code == 200, answer.text
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(bytes(40 * 2**20))
        with weights.open("rb") as file:
            answer = requests.post(
                f"{self.url}/api/v1/import_adapter",
                headers={"X-API-Key": self.key},
                data={"model_id": "import"},
                files={"adapter_config": b'{"peft_type": "LORA"}', "adapter_model": file},
                verify=str(self.certificate),
                timeout=LONG_SECONDS,
            )
        assert answer.status_code == 400, answer.text
        assert "adapter" in answer.json()["detail"]

    def check_long_polls(self, seconds: float) -> None:
        """A call that waits is answered, though the server sends nothing for ``seconds``."""
        worker = self.server.worker_pid()
        os.kill(worker, signal.SIGSTOP)
        goes_on = threading.Timer(seconds, os.kill, (worker, signal.SIGCONT))
        goes_on.start()
        try:
            future = self.post("/api/v1/forward_backward_async", {"model_id": "large", **TRAIN})
            parked = {"request_id": future.json()["request_id"], "wait": 1}
            assert self.post("/retrieve_future", parked).status_code == 202
            answer = self.post("/api/v1/forward_backward", {"model_id": "large", **TRAIN})
            assert answer.status_code == 200, answer.text
            assert not goes_on.is_alive()
            assert self.post("/retrieve_future", parked).status_code == 200
        finally:
            goes_on.join()

    def check_all(self, folder: Path, *, seconds: float) -> None:
        self.check_keys()
        self.check_sdk()
        self.check_stream()
        self.check_large_bodies(folder)
        self.check_long_polls(seconds)


@contextlib.contextmanager
def proxied_server(folder: Path, port: int) -> Iterator[Server]:
    """A server on a tiny model that knows of the proxy on this port."""
    server = Server(
        folder / "server",
        free_port(),
        {
            "TINKERAPI_BASE_MODEL": str(make_tiny_model(folder / "tiny")),
            "TINKERAPI_NUM_THREADS": "1",
            "TINKERAPI_PUBLIC_URL": f"https://localhost:{port}",
        },
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, **environment: str) -> Iterator[None]:
    """A program that runs until the end of the block; its output is in ``log``."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait()


def adapted(name: str, changes: Mapping[str, str]) -> str:
    """A file of the manual with what differs here put in; each change must occur in it."""
    text = (FILES / name).read_text()
    for old, new in changes.items():
        assert old in text, (name, old)
        text = text.replace(old, new)
    return text


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def speaks_tls(port: int, certificate: Path) -> bool:
    """Whether a proxy for localhost on this port has its certificate, signed by this one."""
    try:
        context = ssl.create_default_context(cafile=str(certificate))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            context.wrap_socket(connection, server_hostname="localhost").close()
    except OSError:
        return False
    return True
