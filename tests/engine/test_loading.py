"""Which models can be served, and that a model which would be computed wrongly is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    JetMoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny_model import VOCAB_SIZE, make_tokenizer
from training.engine.torch.attention.sequences import SequenceAttention
from training.engine.torch.loading import load_base_model
from training.engine.torch.packing.ranges import whole_sequences
from training.engine.torch.packing.stream import PackedContext, uniform_segments
from training.errors import BaseModelNotFound

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def save(config, folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "config",
    [Qwen2Config(**SHAPE), Qwen3Config(**SHAPE), Phi3Config(**SHAPE)],
    ids=lambda config: config.model_type,
)
def test_packed_sequences_of_other_architectures_are_each_alone(config, tmp_path):
    folder = save(config, tmp_path)
    base_model = load_base_model(folder, dtype="float32", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    lengths = [9, 5, 5, 1]
    tokens = torch.randint(0, VOCAB_SIZE, (sum(lengths),), generator=torch.Generator())
    positions = torch.cat([torch.arange(n) for n in lengths])
    segments = uniform_segments(len(tokens), None)
    context = PackedContext(
        segments=segments, attention=SequenceAttention(whole_sequences(lengths))
    )
    with torch.no_grad():
        hidden = base_model.hidden_states(tokens, positions, context)
        logits = base_model.logits(hidden, segments)
        for ours, row in zip(logits.split(lengths), tokens.split(lengths), strict=True):
            torch.testing.assert_close(ours, stock(row[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_a_folder_that_is_no_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BaseModelNotFound, match=r"There is no folder .*/nowhere\."):
        load_base_model(str(tmp_path / "nowhere"))
    with pytest.raises(BaseModelNotFound, match=r"it has no config\.json"):
        load_base_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelNotFound, match="has no weights"):
        load_base_model(str(tmp_path))


def test_a_model_says_what_it_is(tied_base_model, untied_base_model, tied_folder):
    info = tied_base_model.info
    assert info.name == str(tied_folder)
    assert (info.vocab_size, info.max_context_tokens) == (VOCAB_SIZE, 512)
    assert (info.device, info.dtype) == ("cpu", "float32")
    head = VOCAB_SIZE * 16
    assert untied_base_model.info.num_parameters == info.num_parameters + head
    assert tied_base_model.end_token_ids == (2,)


@pytest.mark.parametrize(
    "lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_a_folder_that_lacks_weights_is_refused(lost, untied_folder, tmp_path):
    folder = shutil.copytree(untied_folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelNotFound, match=f"its files lack {lost}, or"):
        load_base_model(str(folder), dtype="float32", device="cpu")


def test_a_tied_head_is_no_missing_weight(tied_folder):
    assert "lm_head.weight" not in load_file(tied_folder / "model.safetensors")
    assert load_base_model(str(tied_folder)).head_name == "lm_head"


def test_a_weight_of_another_shape_is_refused(untied_folder, tmp_path):
    folder = shutil.copytree(untied_folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelNotFound, match=r"model\.norm\.weight"):
        load_base_model(str(folder), dtype="float32", device="cpu")


def test_an_encoder_is_refused_as_incomplete(tmp_path):
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BaseModelNotFound, match="is not a complete causal language model"):
        load_base_model(str(tmp_path), dtype="float32", device="cpu")


def test_layers_that_no_adapter_could_reach_are_refused_by_name(tmp_path):
    experts = JetMoeConfig(**SHAPE, num_local_experts=2)
    with pytest.raises(BaseModelNotFound, match="adapters are for linear layers"):
        load_base_model(save(experts, tmp_path / "experts"), dtype="float32", device="cpu")
