"""Decode throughput of the sampler beside transformers' generate(), same model, same machine.

    python -m tests.benchmarks.sampling_throughput MODEL_FOLDER

Both continue the same prompts by the same number of tokens, drawn at temperature 1, in turns, so
that a busy machine slows both. Two loads: ``prompts`` is n jobs with prompts of n lengths
(generate pads them on the left), ``samples`` is one job with n samples of one prompt. Times are
medians; CPU seconds of the process say more than the clock where other programs run. Writes
``results/sampling_throughput.json``. ``ratio`` above 1: we are faster.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.engine.interface import SampleJob
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.loading import load_base_model
from training.types import SamplingParams

NUM_TOKENS = 24
PROMPT_TOKENS = 32
NUM_REPEATS = 3
COUNTS = (1, 8, 32)
RESULT = Path(__file__).parent / "results" / "sampling_throughput.json"


def prompts_for(load: str, count: int) -> list[list[int]]:
    """Token ids from the middle of the vocabulary; ``prompts`` differ in length by one each."""
    if load == "samples":
        return [list(range(1000, 1000 + PROMPT_TOKENS))]
    return [list(range(1000 + i, 1000 + 2 * i + PROMPT_TOKENS)) for i in range(count)]


def with_generate(
    model: transformers.PreTrainedModel, prompts: list[list[int]], count: int, pad_id: int
) -> None:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        num_return_sequences=count // len(prompts),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        pad_token_id=pad_id,
    )
    if output.shape != (count, longest + NUM_TOKENS):
        raise AssertionError(f"generate returned {tuple(output.shape)}")


def with_sampler(sampler: ContinuousSampler, prompts: list[list[int]], count: int) -> None:
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=NUM_TOKENS, seed=i, stop=())
        job = SampleJob(
            prompt=np.array(prompt, np.int32),
            sampling_params=params,
            num_samples=count // len(prompts),
        )
        sampler.submit(str(i), job)
    num_sequences = 0
    while sampler.active:
        for output in sampler.poll(0).values():
            if isinstance(output, Exception):
                raise output
            num_sequences += sum(len(s.tokens) == NUM_TOKENS for s in output.sequences)
    if num_sequences != count:
        raise AssertionError(f"{num_sequences} full sequences for {count}")


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """CPU and clock seconds."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def compare(folder: str, dtype: str) -> list[dict[str, object]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    pad_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    base_model = load_base_model(folder, device="cpu", dtype=dtype)
    text = ChatRenderer(base_model.tokenizer, base_model.info.vocab_size)
    sampler = ContinuousSampler(base_model, text)
    rows: list[dict[str, object]] = []
    for count in COUNTS:
        for load in ("prompts", "samples")[: 1 if count == 1 else 2]:
            prompts = prompts_for(load, count)
            works: dict[str, Callable[[], None]] = {
                "generate": lambda p=prompts, c=count: with_generate(model, p, c, pad_id),
                "sampler": lambda p=prompts, c=count: with_sampler(sampler, p, c),
            }
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
            for repeat in range(NUM_REPEATS + 1):
                for name, work in works.items():
                    measured = seconds(work)
                    if repeat:  # the first round warms caches and allocators
                        times[name].append(measured)
            row: dict[str, object] = {"dtype": dtype, "sequences": count, "load": load}
            for n, unit in enumerate(("cpu", "wall")):
                medians = {
                    name: statistics.median(pair[n] for pair in pairs)
                    for name, pairs in times.items()
                }
                for name, median in medians.items():
                    row[f"{name}_tokens_per_{unit}_second"] = round(count * NUM_TOKENS / median, 1)
                row[f"ratio_{unit}"] = round(medians["generate"] / medians["sampler"], 2)
            print(json.dumps(row))
            rows.append(row)
    return rows


def main() -> None:
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    rows = [row for dtype in ("bfloat16", "float32") for row in compare(sys.argv[1], dtype)]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {
                "model": Path(sys.argv[1]).name,
                "tokens_per_sequence": NUM_TOKENS,
                "repeats": NUM_REPEATS,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "threads": torch.get_num_threads(),
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
