"""Tiny random models of every family, and a judge of the engine's results for them.

The judge knows nothing of the engine's own proof: it trains and samples as clients do, and compares
with stock transformers and peft in float32, one sequence at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engine.peft_stacks import PeftStacks
from tests.engine.reference import TinyTrainer, peft_warnings_ignored
from tests.tiny_model import VOCAB_SIZE, make_tokenizer
from training.engine.interface import ForwardBackwardJob, SampleJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.errors import BaseModelNotFound
from training.types import Datum, ForwardBackwardOutput, LoraConfig, SamplingParams

CONTEXT_TOKENS = 64
LONGEST_JUDGED = 330
"""Tokens: recurrent families would take very long sequences."""

RIGHT = 2e-4
"""Largest difference, in nats or as a share of a gradient, that float32 explains: weights are drawn
wide, so that these models are steep, and oneDNN adds up a row in another order than torch.mm."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT_TOKENS),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), CONTEXT_TOKENS // 4),
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rotary_dim": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""Sizes under the names that families give them."""


def small_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A family's configuration with every size small that it has under a known name."""
    changes = deepcopy(changes)  # transformers completes such dictionaries in place
    cls = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    known |= set(getattr(cls, "attribute_map", {}))
    return cls(**{**{name: size for name, size in SMALL.items() if name in known}, **changes})


def save_random(config: PretrainedConfig, folder: Path) -> str:
    """A model folder with seeded weights and the tiny tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # a bias or a gate of zeros would hide itself
            if not parameter.any():
                parameter.data.normal_(std=0.1)
        model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def judge(
    folder: str,
    *,
    layout: str = "auto",
    device: str = "cpu",
    note: Callable[[BaseModel], None] = lambda base_model: None,
    **lora: Any,
) -> tuple[str, str, dict[str, float]]:
    """Judge the engine's results for a folder.

    Args:
        device: Of the engine; the stock model is on the CPU.
        note: Called with the base model, unless it is refused.
        lora: Of the adapter's config, if not its defaults.

    Returns:
        ``refused`` and the sentence, ``right``, or ``wrong``, what is; and by name the largest
        differences from stock transformers and peft.
    """
    try:
        base_model = load_base_model(folder, dtype="float32", device=device, layout=layout)
    except BaseModelNotFound as error:
        return "refused", str(error), {}
    note(base_model)
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(**{"rank": 4, "alpha": 8.0, **lora}))
    flat = trainer.adapter_state("a")["weights"]
    values = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
    trainer.set_weights("a", 0.05 * values)
    sampler = ContinuousSampler(
        base_model,
        ChatRenderer(base_model.tokenizer, base_model.info.vocab_size),
        cache_tokens=4096,
    )
    sampler.publish("a", trainer.capture_adapter("a"))
    stock = _PeftModel(folder, trainer, "a")
    longest = min(base_model.info.max_context_tokens, LONGEST_JUDGED)
    found = {
        **_training(trainer, stock, [min(9, longest), longest, min(5, longest)]),
        **_sampling(sampler, stock, longest),
        **_export(trainer, folder, stock, longest),
    }
    wrong = [name for name, difference in found.items() if not difference <= RIGHT]
    return ("wrong", ", ".join(wrong), found) if wrong else ("right", "", found)


class _PeftModel:
    """Stock transformers and peft, with one of the engine's adapters."""

    def __init__(self, folder: str, trainer: TinyTrainer, adapter_name: str) -> None:
        layout = trainer.layout_of(adapter_name)
        base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        dense = [name for name, place in layout.places.items() if not place.shape.num_experts]
        self._stacks = PeftStacks(base, layout)
        config = peft.LoraConfig(
            r=layout.rank,
            lora_alpha=layout.config.alpha,
            target_modules=[name for name in dense if not self._stacks.are_named(name)],
            **self._stacks.peft_arguments(n for n in dense if self._stacks.are_named(n)),
        )
        with peft_warnings_ignored():
            self._model = peft.get_peft_model(base, config).eval()
        self._layout = layout
        self._dense = dense
        self._depends_on_length = "longrope" in str(base.config.to_dict())
        flat = torch.from_numpy(trainer.adapter_state(adapter_name)["weights"])
        for name in dense:
            for parameter, value in zip(self._pair(name), layout.pair(flat, name), strict=True):
                parameter.data.copy_(value)
        self._stacks.set_weights(self._model, flat)

    def _pair(self, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        module = self._model.base_model.model.get_submodule(name)
        return module.lora_A["default"].weight, module.lora_B["default"].weight

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """(1, n, V)"""
        logits: torch.Tensor = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        return logits

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """(n - 1,) of each token but the first."""
        inputs, targets = torch.tensor([tokens[:-1]]), torch.tensor(tokens[1:])[:, None]
        logits = self._model(input_ids=inputs, use_cache=False).logits[0]
        return logits.float().log_softmax(-1).gather(1, targets)[:, 0]

    def sampled_logprobs(self, prompt: list[int], sampled: list[int]) -> NDArray[np.float32]:
        """(n,) of each sampled token; where a sequence's length changes what is said of its
        beginning, by a pass over what came before it, and no more."""
        tokens, split = [*prompt, *sampled], len(prompt)
        if not self._depends_on_length:
            return self.logprobs(tokens)[split - 1 :].numpy()
        ends = range(split, len(tokens))
        return np.array([self.logprobs(tokens[: end + 1])[-1].item() for end in ends], np.float32)

    def grad(self) -> NDArray[np.float32]:
        flat = torch.zeros(self._layout.num_parameters)
        for name in self._dense:
            pairs = zip(self._layout.pair(flat, name), self._pair(name), strict=True)
            for ours, parameter in pairs:
                if parameter.grad is not None:
                    ours.copy_(parameter.grad)
        self._stacks.read_grads(self._model, flat)
        return flat.numpy()


def _training(trainer: TinyTrainer, stock: _PeftModel, lengths: list[int]) -> Mapping[str, float]:
    rng = np.random.default_rng(1)
    data, worst = [], 0.0
    sequences = [rng.integers(3, VOCAB_SIZE, length + 1).tolist() for length in lengths]
    for tokens in sequences:
        inputs = {
            "target_tokens": np.array(tokens[1:]),
            "weights": rng.normal(size=len(tokens) - 1).astype(np.float32),
        }
        data.append(Datum(model_input=np.array(tokens[:-1]), loss_fn_inputs=inputs))
    job = ForwardBackwardJob(adapter_name="a", data=data, loss_fn="cross_entropy")
    (result,) = trainer.forward_backward([job])
    assert isinstance(result, ForwardBackwardOutput), result
    for datum, tokens, ours in zip(data, sequences, result.logprobs, strict=True):
        theirs = stock.logprobs(tokens)
        (-(theirs * torch.from_numpy(datum.loss_fn_inputs["weights"])).sum()).backward()
        worst = max(worst, float(np.abs(ours - theirs.detach().numpy()).max()))
    expected = stock.grad()
    difference = np.linalg.norm(trainer.grad("a") - expected) / np.linalg.norm(expected)
    return {"training": worst, "gradient": float(difference)}


def _sampling(sampler: ContinuousSampler, stock: _PeftModel, longest: int) -> Mapping[str, float]:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, VOCAB_SIZE, n).tolist() for n in (3, longest // 2)]
    for i, prompt in enumerate(prompts):
        sampler.submit(
            str(i),
            SampleJob(
                prompt=np.array(prompt, np.int32),
                version="a",
                sampling_params=SamplingParams(max_tokens=longest, seed=i, stop=()),
                prompt_logprobs=True,
            ),
        )
    done: dict[str, Any] = {}
    while sampler.active:
        done |= sampler.poll(0)
    sampled = scored = 0.0
    for i, prompt in enumerate(prompts):
        output = done[str(i)]
        assert isinstance(output, SampleOutput), output
        assert output.prompt_logprobs is not None
        sequence = output.sequences[0]
        with torch.no_grad():
            of_prompt = stock.logprobs(prompt).numpy()
            of_sampled = stock.sampled_logprobs(prompt, sequence.tokens)
        scored = max(scored, float(np.abs(output.prompt_logprobs[1:] - of_prompt).max()))
        sampled = max(sampled, float(np.abs(sequence.logprobs - of_sampled).max()))
    return {"scoring": scored, "sampling": sampled}


def _export(
    trainer: TinyTrainer, folder: str, stock: _PeftModel, longest: int
) -> Mapping[str, float]:
    """The adapter's export in stock peft: loaded, and merged into the model."""
    tokens = np.random.default_rng(3).integers(3, VOCAB_SIZE, longest).tolist()
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with TemporaryDirectory() as directory, peft_warnings_ignored(), torch.no_grad():
        trainer.save_peft("a", Path(directory) / "export")
        loaded = peft.PeftModel.from_pretrained(base, str(Path(directory) / "export"))
        inputs = torch.tensor([tokens])
        answers = {"export": loaded(input_ids=inputs, use_cache=False).logits}
        if base.get_output_embeddings().weight is not base.get_input_embeddings().weight:
            merged = loaded.merge_and_unload()
            answers["merged export"] = merged(input_ids=inputs, use_cache=False).logits
    expected = stock.logits(tokens)
    size = max(1.0, float(expected.abs().max()))  # merging rounds in proportion to it
    return {name: float((ours - expected).abs().max()) / size for name, ours in answers.items()}
