"""Models with images, against stock transformers and peft in float32: one sequence at a time, with
what the model's own processor makes of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText

from tests.engine.families import RIGHT
from tests.engine.reference import TinyTrainer, peft_warnings_ignored
from tests.engine.vision_families import IMAGE_TOKEN, save_vision_model
from tests.pictures import picture
from tests.tiny_model import VOCAB_SIZE
from training.engine.factory import engine_over
from training.engine.interface import ForwardBackwardJob, SampleJob, SampleOutput
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.images import Chunks, Image
from training.types import (
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    SamplingParams,
    TokenPrompt,
)

READ = ["llava", "mistral3", "glm46v", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
"""Families whose images are read."""

NO_MARKS = tuple((IMAGE_TOKEN + n, -100.0) for n in range(8))
"""transformers would take a sampled one for an image."""

FIRST = Image(data=picture(24, 16), format="png")
SECOND = Image(data=picture(17, 30, format="jpeg", seed=1), format="jpeg")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_that_see_themselves_in_both_directions_are_refused_and_text_is_served(
    tmp_path: Path, dtype: str
) -> None:
    """In bfloat16 too, where the difference of a tiny model could pass for rounding."""
    folder = save_vision_model("gemma3", tmp_path)
    base_model = load_base_model(folder, dtype=dtype, device="cpu")
    renderer = engine_over(base_model).renderer

    assert base_model.vision is None
    assert renderer.image_fault is not None
    assert "see each other in both directions" in renderer.image_fault
    assert len(renderer.render_prompt([{"role": "user", "content": "hi"}])) > 2


@pytest.fixture(scope="module", params=READ)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model(request.param, tmp_path_factory.mktemp(request.param))


class Seen:
    """A base model, its engine with one random adapter, and stock transformers and peft."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.base_model = load_base_model(folder, dtype="float32", device="cpu")
        self.engine = engine_over(self.base_model)
        self.trainer = TinyTrainer(self.base_model)
        self.trainer.create_adapter("a", LoraConfig(rank=4, alpha=8.0))
        flat = self.trainer.adapter_state("a")["weights"]
        values = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
        self.trainer.set_weights("a", 0.05 * values)
        self.layout = self.trainer.layout_of("a")
        base = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
        config = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=list(self.layout.places))
        with peft_warnings_ignored():
            self.peft = peft.get_peft_model(base, config).eval()
        flat = torch.from_numpy(self.trainer.adapter_state("a")["weights"])
        for name in self.layout.places:
            for parameter, value in zip(self.pair(name), self.layout.pair(flat, name), strict=True):
                parameter.data.copy_(value)

    def pair(self, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        module = self.peft.base_model.model.get_submodule(name)
        return module.lora_A["default"].weight, module.lora_B["default"].weight

    def placed(self, *chunks: Sequence[int] | Image) -> TokenPrompt:
        parts = [c if isinstance(c, Image) else np.array(c, np.int32) for c in chunks]
        return self.engine.renderer.place_images(Chunks(chunks=tuple(parts)))

    def logprobs(self, prompt: TokenPrompt, targets: Sequence[int], model: Any = None) -> Any:
        """(n,) of each target, which follow each token of the prompt, by transformers."""
        logits = stock_logits(model or self.peft, self.base_model, prompt)
        return logits.log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0]

    def grad(self) -> NDArray[np.float32]:
        flat = torch.zeros(self.layout.num_parameters)
        for name in self.layout.places:
            for ours, parameter in zip(self.layout.pair(flat, name), self.pair(name), strict=True):
                if parameter.grad is not None:
                    ours.copy_(parameter.grad)
        return flat.numpy()


def stock_logits(model: Any, base_model: BaseModel, prompt: TokenPrompt) -> torch.Tensor:
    """(T, V) of one sequence, by its own forward with its own processor's inputs."""
    ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
    inputs: dict[str, Any] = {}
    assert base_model.vision is not None
    read = [base_model.vision.reader.read(placed.image).inputs for placed in prompt.images]
    for name in read[0] if read else ():
        rows = [torch.from_numpy(np.asarray(each[name])) for each in read]
        if name == "pixel_values" and rows[0].ndim == 4:  # of different sizes: padded
            high, wide = (max(r.shape[axis] for r in rows) for axis in (2, 3))
            rows = [
                torch.nn.functional.pad(r, (0, wide - r.shape[3], 0, high - r.shape[2]))
                for r in rows
            ]
        inputs[name] = torch.cat(rows)
    if "image_grid_thw" in inputs:
        kinds = torch.zeros_like(ids, dtype=torch.int)
        for placed in prompt.images:
            kinds[0, placed.start : placed.end] = 1
        inputs["mm_token_type_ids"] = kinds
    if hasattr(base_model, "token_types"):
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return model(input_ids=ids, use_cache=False, **inputs).logits[0]


@pytest.fixture(scope="module")
def seen(folder: str) -> Seen:
    return Seen(folder)


def text(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, count).tolist()


def test_losses_and_gradients_are_those_of_transformers_and_peft(seen: Seen) -> None:
    """Among other sequences: with two images, with a shared beginning, and without an image."""
    rng = np.random.default_rng(1)
    start = text(6, 2)
    prompts = [
        seen.placed(start, FIRST, text(14, 3)),
        seen.placed(start, FIRST, text(14, 3)),
        seen.placed(start, SECOND, text(14, 3)),
        seen.placed(text(2, 4), SECOND, text(3, 5), FIRST, text(4, 6)),
        seen.placed(FIRST, text(5, 7)),
        TokenPrompt(tokens=np.array(text(20, 8), np.int32)),
    ]
    data = [
        Datum(
            model_input=prompt.tokens,
            loss_fn_inputs={
                "target_tokens": rng.integers(3, VOCAB_SIZE, len(prompt.tokens)),
                "weights": rng.normal(size=len(prompt.tokens)).astype(np.float32),
            },
            images=prompt.images,
        )
        for prompt in prompts
    ]

    job = ForwardBackwardJob(adapter_name="a", data=data, loss_fn="cross_entropy")
    (result,) = seen.trainer.forward_backward([job])

    assert isinstance(result, ForwardBackwardOutput), result
    total = 0.0
    seen.peft.zero_grad()
    for prompt, datum, ours in zip(prompts, data, result.logprobs, strict=True):
        inputs = datum.loss_fn_inputs
        theirs = seen.logprobs(prompt, inputs["target_tokens"].tolist())
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=RIGHT, rtol=0)
        loss = -(theirs * torch.from_numpy(inputs["weights"])).sum()
        loss.backward()
        total += loss.item()
    assert result.loss == pytest.approx(total, rel=1e-4)
    expected = seen.grad()
    difference = np.linalg.norm(seen.trainer.grad("a") - expected) / np.linalg.norm(expected)
    assert difference < RIGHT
    seen.trainer.drop_gradient("a")


def test_the_vision_tower_is_frozen(seen: Seen) -> None:
    assert all("language_model" in name or name == "lm_head" for name in seen.layout.places)


def test_samples_and_prompt_scores_are_those_of_transformers(seen: Seen) -> None:
    sampler = seen.engine.sampler
    sampler.publish("v", seen.trainer.capture_adapter("a"))
    prompts = [
        seen.placed(text(6, 2), FIRST, text(3, 3)),
        TokenPrompt(tokens=np.array(text(9, 8), np.int32)),
        seen.placed(text(2, 4), SECOND, text(2, 5), FIRST),
    ]
    for number, prompt in enumerate(prompts):
        job = SampleJob(
            prompt=prompt.tokens,
            images=prompt.images,
            version="v",
            num_samples=2,
            sampling_params=SamplingParams(max_tokens=9, seed=number, stop=(), logit_bias=NO_MARKS),
            prompt_logprobs=True,
        )
        sampler.submit(str(number), job)
    done: dict[str, Any] = {}
    while sampler.active:
        done |= sampler.poll(0)
    for number, prompt in enumerate(prompts):
        output = done[str(number)]
        assert isinstance(output, SampleOutput), output
        assert output.prompt_logprobs is not None
        for sequence in output.sequences:
            tokens = np.concatenate([prompt.tokens, sequence.tokens]).astype(np.int32)
            whole = TokenPrompt(tokens=tokens[:-1], images=prompt.images)
            with torch.no_grad():
                theirs = seen.logprobs(whole, tokens[1:].tolist()).numpy()
            split = len(prompt.tokens) - 1
            np.testing.assert_allclose(
                output.prompt_logprobs[1:], theirs[:split], atol=RIGHT, rtol=0
            )
            np.testing.assert_allclose(sequence.logprobs, theirs[split:], atol=RIGHT, rtol=0)


def test_bits_do_not_depend_on_what_shares_a_pass(seen: Seen) -> None:
    def logprobs(*prompts: TokenPrompt) -> NDArray[np.float32]:
        data = [
            Datum(
                model_input=p.tokens,
                loss_fn_inputs={"target_tokens": p.tokens.astype(np.int64)},
                images=p.images,
            )
            for p in prompts
        ]
        jobs = [
            ForwardBackwardJob(
                adapter_name="a", data=[d], loss_fn="cross_entropy", forward_only=True
            )
            for d in data
        ]
        first, *_ = seen.trainer.forward_backward(jobs)
        assert isinstance(first, ForwardBackwardOutput), first
        return first.logprobs[0]

    prompt = seen.placed(text(6, 2), FIRST, text(14, 3))
    others = [seen.placed(SECOND, text(5, 7)), TokenPrompt(tokens=np.array(text(20, 8), np.int32))]
    alone = logprobs(prompt)
    assert seen.base_model.vision is not None
    seen.base_model.vision.forget()

    np.testing.assert_array_equal(alone, logprobs(prompt, *others))


def test_an_export_has_the_same_logits_in_stock_peft(seen: Seen, tmp_path: Path) -> None:
    seen.trainer.save_peft("a", tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(seen.folder, attn_implementation="eager")
    with peft_warnings_ignored():
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    prompt = seen.placed(text(6, 2), FIRST, text(14, 3))
    with torch.no_grad():
        ours = stock_logits(seen.peft, seen.base_model, prompt)
        theirs = stock_logits(loaded, seen.base_model, prompt)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
