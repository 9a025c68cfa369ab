"""Adapters on experts in a trainer: parameters, memory, bits, checkpoints, exports."""

from __future__ import annotations

import json
import math

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.families import save_random, small_config
from tests.engine.reference import TinyTrainer, peft_warnings_ignored
from tests.engine.sampling_jobs import job as sample_job
from tests.engine.sampling_jobs import run_all
from training.engine.interface import ForwardBackwardJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.engine.torch.target_modules import select_modules
from training.errors import InvalidRequest
from training.types import AdamParams, LoraConfig

NUM_EXPERTS, HIDDEN, INNER, LAYERS, SHARED_INNER = 4, 16, 16, 2, 24
EXPERTS_ONLY = {"train_attn": False, "train_unembed": False}
OWN = {"share_across_experts": False}
SHAPES = {"shared": {}, "own": OWN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    config = small_config("qwen2_moe", shared_expert_intermediate_size=SHARED_INNER)
    return save_random(config, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def base_model(folder: str) -> BaseModel:
    return load_base_model(folder, dtype="float32", device="cpu")


@pytest.fixture
def trainer(base_model: BaseModel) -> TinyTrainer:
    return randomised(base_model)


@pytest.mark.parametrize("form", SHAPES.values(), ids=SHAPES)
def test_an_experts_only_adapter_has_the_parameters_that_the_documentation_says(
    base_model: BaseModel, form: dict[str, bool]
) -> None:
    targets = tuple(f"experts.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    config = LoraConfig(rank=3, target_modules=targets, **form)
    num_outer = NUM_EXPERTS if form else 1
    per_layer = 3 * (num_outer * HIDDEN + NUM_EXPERTS * INNER)
    assert TinyTrainer(base_model).adapter_bytes(config) == 16 * 3 * LAYERS * per_layer


def test_train_mlp_adapts_experts_and_shared_experts_but_no_router(base_model: BaseModel) -> None:
    chosen = select_modules(
        LoraConfig(**EXPERTS_ONLY), base_model.linear_shapes, base_model.head_name
    )
    leaves = {name.removeprefix("model.layers.0.mlp.") for name in chosen if ".0." in name}
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert leaves == {f"{part}.{leaf}" for part in ("experts", "shared_expert") for leaf in mlp}


@pytest.mark.parametrize("router", ["gate", "shared_expert_gate", "experts.gate_up_proj"])
def test_routers_and_stacked_parameters_are_no_targets(base_model: BaseModel, router: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{router!r} matches nothing; known: down_proj"):
        TinyTrainer(base_model).create_adapter("x", LoraConfig(target_modules=(router,)))


def test_a_setting_of_experts_is_refused_for_an_adapter_without_any(base_model: BaseModel) -> None:
    config = LoraConfig(train_mlp=False, share_across_experts=False)
    with pytest.raises(InvalidRequest, match="share_across_experts: false, but the adapter would"):
        TinyTrainer(base_model).create_adapter("x", config)


@pytest.mark.parametrize("form", SHAPES.values(), ids=SHAPES)
def test_initial_matrices_differ_between_experts_and_change_nothing(
    base_model: BaseModel, form: dict[str, bool], make_datum
) -> None:
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("x", LoraConfig(rank=8, seed=1, **form))
    layout = trainer.layout_of("x")
    flat = torch.from_numpy(trainer.adapter_state("x")["weights"])
    for name, place in layout.places.items():
        a, b = layout.pair(flat, name)
        assert not b.any()
        assert len(a.unique()) == a.numel()
        assert a.abs().max() <= 1 / math.sqrt(place.shape.in_features)
    trainer.create_adapter("other", LoraConfig(rank=2, seed=7, train_mlp=False))
    datum = make_datum(20)
    ours, others = (trainer.train_one(name, [datum]).logprobs[0] for name in ("x", "other"))
    np.testing.assert_array_equal(ours, others)


FAMILIES = {
    "qwen2_moe": {"num_experts": 6},
    "glm4_moe": {"n_routed_experts": 6},
    "gpt_oss": {"num_local_experts": 5},
    "llama4_text": {"intermediate_size_mlp": 32, "attn_temperature_tuning": False},
}
"""Routers by softmax and by sigmoid, whose numbers of experts fill no vector of a CPU."""


def randomised(base_model: BaseModel) -> TinyTrainer:
    """Adapters of both forms and of ranks whose products are computed in different ways."""
    trainer = TinyTrainer(base_model)
    for seed, (name, rank, form) in enumerate(
        [("a", 8, {}), ("b", 8, {}), ("c", 5, OWN), ("d", 16, OWN)]
    ):
        trainer.create_adapter(name, LoraConfig(rank=rank, alpha=4.0, seed=seed, **form))
        flat = trainer.adapter_state(name)["weights"]
        values = np.random.default_rng(seed).normal(size=flat.shape).astype(np.float32)
        trainer.set_weights(name, 0.1 * values)
    return trainer


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_shares_a_pass_changes_no_bit_of_a_run(
    dtype: str, model_type: str, make_datum, tmp_path
) -> None:
    folder = save_random(small_config(model_type, **FAMILIES[model_type]), tmp_path)
    trainer = randomised(load_base_model(folder, dtype=dtype, device="cpu"))
    jobs = [
        ForwardBackwardJob(
            adapter_name=name,
            data=[make_datum(length, seed) for seed, length in enumerate(lengths)],
            loss_fn="cross_entropy",
        )
        for name, lengths in [
            ("a", (9, 30)),
            ("b", (3,)),
            ("c", (41,)),
            ("a", (17, 5)),
            ("d", (8,)),
        ]
    ]
    together = trainer.forward_backward(jobs)
    grads = {name: trainer.grad(name) for name in trainer.adapter_names()}
    for name in trainer.adapter_names():
        trainer.drop_gradient(name)
    alone = [trainer.forward_backward([job])[0] for job in jobs]
    for ours, theirs in zip(together, alone, strict=True):
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_array_equal(mine, other)
    for name in trainer.adapter_names():
        np.testing.assert_array_equal(grads[name], trainer.grad(name))


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sampled_beside_it_changes_no_bit_of_a_sample(
    dtype: str, model_type: str, tmp_path
) -> None:
    folder = save_random(small_config(model_type, **FAMILIES[model_type]), tmp_path)
    base_model = load_base_model(folder, dtype=dtype, device="cpu")
    trainer = TinyTrainer(base_model)
    sampler = ContinuousSampler(base_model, ChatRenderer(base_model.tokenizer, 256))
    for seed, (name, form) in enumerate([("a", {}), ("c", OWN), ("d", {})]):
        trainer.create_adapter(name, LoraConfig(rank=8, alpha=4.0, **form))
        flat = trainer.adapter_state(name)["weights"]
        values = np.random.default_rng(seed).normal(size=flat.shape).astype(np.float32)
        trainer.set_weights(name, 0.1 * values)
        sampler.publish(name, trainer.capture_adapter(name, with_optimizer=False))
    jobs = {
        "a": sample_job([1] * 9, version="a", num_samples=3),
        "c": sample_job([7, 8], version="c", prompt_logprobs=True),
        "d": sample_job([5, 77, 130], version="d", temperature=0.7),
        "base": sample_job([250, 3]),
    }
    together = run_all(sampler, jobs)
    for name, job in jobs.items():
        ours, alone = together[name], run_all(sampler, {name: job})[name]
        assert isinstance(ours, SampleOutput)
        assert isinstance(alone, SampleOutput)
        for mine, other in zip(ours.sequences, alone.sequences, strict=True):
            assert mine.tokens == other.tokens
            np.testing.assert_array_equal(mine.logprobs, other.logprobs)


def test_a_step_from_a_checkpoint_is_the_step_without_it(
    trainer: TinyTrainer, base_model: BaseModel, make_datum, tmp_path
) -> None:
    for name in ("a", "c"):
        trainer.train_one(name, [make_datum(20)])
        trainer.capture_adapter(name).write(tmp_path / name)
        restored = TinyTrainer(base_model)
        restored.load_adapter(name, tmp_path / name)
        for engine in (trainer, restored):
            engine.optim_step(name, AdamParams(learning_rate=1e-2))
        expected = trainer.adapter_state(name)
        for key, values in restored.adapter_state(name).items():
            np.testing.assert_array_equal(values, expected[key])


def test_a_checkpoint_of_another_number_of_experts_is_refused(
    trainer: TinyTrainer, base_model: BaseModel, tmp_path
) -> None:
    trainer.capture_adapter("a").write(tmp_path / "a")
    path = tmp_path / "a" / "meta.json"
    meta = json.loads(path.read_text())
    name = next(name for name, shape in meta["modules"].items() if len(shape) == 4)
    assert meta["modules"][name] == [HIDDEN, INNER, NUM_EXPERTS, "A"]
    meta["modules"][name][2] = 8
    del meta["sha256"]["meta.json"]
    path.write_text(json.dumps(meta))
    with pytest.raises(InvalidRequest, match=r"experts\.gate_proj this base model does not have"):
        trainer.load_adapter("x", tmp_path / "a")


def test_a_checkpoint_without_experts_says_nothing_of_them(engine, tmp_path) -> None:
    engine.create_adapter("a", LoraConfig(rank=2))
    engine.capture_adapter("a").write(tmp_path / "a")
    assert "experts" not in (tmp_path / "a" / "meta.json").read_text()


@pytest.mark.parametrize("name", ["a", "c"], ids=["shared", "own"])
def test_an_export_of_experts_alone_loads_in_stock_peft(
    name: str, trainer: TinyTrainer, folder: str, make_datum, tmp_path
) -> None:
    layout = trainer.layout_of(name)
    config = LoraConfig(rank=4, alpha=2.0, **EXPERTS_ONLY, **({} if name == "a" else OWN))
    trainer.create_adapter("x", config)
    trainer.set_weights("x", trainer.adapter_state(name)["weights"][: _size(trainer, "x")])
    assert layout.has_experts
    datum = make_datum(30)
    expected = trainer.train_one("x", [datum]).logprobs[0]
    trainer.save_peft("x", tmp_path / "export")
    with peft_warnings_ignored():
        model = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder), tmp_path / "export"
        )
    tokens = torch.from_numpy(datum.model_input.astype(np.int64))[None]
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])[:, None]
    with torch.no_grad():
        logprobs = model(input_ids=tokens).logits[0].log_softmax(-1).gather(1, targets)
    np.testing.assert_allclose(expected, logprobs[:, 0], rtol=1e-5, atol=1e-5)


def _size(trainer: TinyTrainer, name: str) -> int:
    return trainer.layout_of(name).num_parameters


def test_in_bfloat16_a_model_of_experts_is_served_and_near_float32(
    folder: str, trainer: TinyTrainer, make_datum
) -> None:
    narrow = TinyTrainer(load_base_model(folder, dtype="bfloat16", device="cpu"))
    narrow.create_adapter("a", LoraConfig(rank=8, alpha=4.0))
    narrow.set_weights("a", trainer.adapter_state("a")["weights"])
    datum = make_datum(40)
    ours, exact = (engine.train_one("a", [datum]).logprobs[0] for engine in (narrow, trainer))
    assert np.abs(ours - exact).mean() < 0.3
    a, b = narrow.grad("a"), trainer.grad("a")
    assert a @ b > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize("form", SHAPES.values(), ids=SHAPES)
def test_the_hosted_services_form_merges_into_each_experts_own_weights(
    form: dict[str, bool], folder: str, base_model: BaseModel, make_datum, tmp_path
) -> None:
    """Merged as tinker-cookbook does it: w1, w3 and w2 are gate, up and down; a first dimension of
    1 stands for all experts."""
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("x", LoraConfig(rank=4, alpha=6.0, train_unembed=False, **form))
    trainer.randomise("x")
    datum = make_datum(30)
    expected = trainer.train_one("x", [datum]).logprobs[0]
    trainer.save_peft("x", tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "tinker_adapter.safetensors")
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    places = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
    for name in [name for name in tensors if ".lora_A." in name]:
        module, _, leaf = name.removesuffix(".lora_A.weight").rpartition(".")
        update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        parameter, half = places.get(leaf, (f"{leaf}.weight", 0))
        weight = model.get_parameter(f"{module.removeprefix('base_model.model.')}.{parameter}")
        start = half * update.shape[-2]
        weight.data[..., start : start + update.shape[-2], :] += (
            update * config["lora_alpha"] / config["r"]
        )
    tokens = torch.from_numpy(datum.model_input.astype(np.int64))[None]
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])[:, None]
    with torch.no_grad():
        logprobs = model(input_ids=tokens).logits[0].log_softmax(-1).gather(1, targets)
    np.testing.assert_allclose(expected, logprobs[:, 0], rtol=1e-4, atol=1e-4)
