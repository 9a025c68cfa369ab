"""The proof at the start sees what would be computed wrongly, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.families import CONTEXT_TOKENS, save_random, small_config
from tests.engine.test_model_families import LONGROPE
from training.engine.probe import stock_answers
from training.engine.probe.few_layers import FewLayers
from training.engine.probe.near_switches import near_switches
from training.engine.torch import loading, lora_linear
from training.engine.torch.attention import backend
from training.engine.torch.attention.paged import PagedAttention
from training.engine.torch.attention.variants import PLAIN
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.errors import BaseModelNotFound


def load(folder, layout="packed"):
    return load_base_model(str(folder), dtype="float32", device="cpu", layout=layout)


@pytest.fixture(scope="module")
def longrope_folder(tmp_path_factory):
    """Rotary factors change from 32 tokens on, for every sequence of the pass."""
    config = small_config("phi3", **LONGROPE, original_max_position_embeddings=32)
    return save_random(config, tmp_path_factory.mktemp("longrope"))


def test_factors_that_follow_the_longest_sequence_bound_the_context(longrope_folder, monkeypatch):
    """If sequences cannot have their own factors."""
    monkeypatch.setattr(loading, "rotary_switch_of", lambda model: None)
    assert load(longrope_folder).info.max_context_tokens == 32


def test_a_sequence_that_changes_with_those_beside_it_is_seen(longrope_folder, monkeypatch):
    """As if the configuration named the switch in an unknown way."""
    monkeypatch.setattr(loading, "rotary_switch_of", lambda model: None)
    monkeypatch.setattr(loading, "usable_context_tokens", lambda config, **_: CONTEXT_TOKENS)
    with pytest.raises(BaseModelNotFound, match="sequences packed beside each other differ"):
        load(longrope_folder)


def test_a_cache_that_loses_a_key_is_seen(tied_folder, monkeypatch):
    attend = PagedAttention.attend

    def forgetful(self, layer_idx, query, key, *others):
        return attend(self, layer_idx, query, key * (layer_idx != 1), *others)

    monkeypatch.setattr(PagedAttention, "attend", forgetful)
    with pytest.raises(BaseModelNotFound, match="sampling over a cache differ by"):
        load(tied_folder)


def test_a_difference_at_one_token_of_the_vocabulary_is_seen(tied_folder, monkeypatch):
    """The mean over the vocabulary would hide it: 2e-5 nats."""
    logits = BaseModel.logits

    def shifted(self, hidden, segments):
        result = logits(self, hidden, segments)
        result[:, 7] += 0.005
        return result

    monkeypatch.setattr(BaseModel, "logits", shifted)
    with pytest.raises(BaseModelNotFound, match=r"beside each other differ by 0\.00"):
        load(tied_folder)


def test_a_gradient_that_is_not_autograds_is_seen(tied_folder, monkeypatch):
    add_product = lora_linear.add_product
    monkeypatch.setattr(
        lora_linear, "add_product", lambda t, a, b, s=1.0: add_product(t, a, b, 1.01 * s)
    )
    with pytest.raises(BaseModelNotFound, match=r"gradient of LoRA's A at model\.layers\.0\."):
        load(tied_folder)


def test_a_last_layer_of_another_kind_takes_part(tmp_path):
    """Layers alike stand for each other; one that differs in a setting or a shape does not."""
    config = small_config(
        "smollm3", num_hidden_layers=6, no_rope_layers=[1, 1, 1, 1, 1, 0], layer_types=None
    )
    model = AutoModelForCausalLM.from_config(config)
    few = FewLayers(model)
    layers = list(model.model.layers)
    with few.alone():
        assert list(model.model.layers) == [layers[0], layers[1], layers[5]]
    assert list(model.model.layers) == layers
    assert few.num_layers == 3


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_a_window_that_our_attention_forgets_is_seen(model_type, tmp_path, monkeypatch):
    """However long it is: the proof brings it near, for transformers and for us."""
    config = small_config(model_type, sliding_window=40)
    folder = save_random(config, tmp_path)
    load(folder)
    monkeypatch.setattr(backend, "_variant", lambda module, **arguments: PLAIN)
    with pytest.raises(BaseModelNotFound, match="sequences packed beside each other differ"):
        load(folder)


def test_switches_are_far_again_after_the_proof(tmp_path):
    folder = save_random(small_config("mistral", sliding_window=40), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with near_switches(model) as has_far:
        assert has_far
        assert model.config.sliding_window == 8
    assert model.config.sliding_window == 40
    with near_switches(AutoModelForCausalLM.from_config(small_config("qwen2"))) as has_far:
        assert not has_far


def test_a_window_that_transformers_does_not_use_bounds_the_context(tmp_path, monkeypatch):
    """Then nothing shows whether our attention would compute it."""
    folder = save_random(small_config("mistral", sliding_window=40), tmp_path)
    assert load(folder).info.max_context_tokens == CONTEXT_TOKENS
    monkeypatch.setattr(stock_answers, "_differs", lambda *arguments: False)
    assert load(folder).info.max_context_tokens == 40


def test_layers_of_each_kind_keep_their_masks_when_they_are_few(tmp_path):
    """Layer 5, the first that sees everything, is the third of those that are left."""
    config = small_config("gemma3_text", num_hidden_layers=8, sliding_window=16)
    load(save_random(config, tmp_path))
    model = AutoModelForCausalLM.from_config(config)
    types = list(config.layer_types)
    with FewLayers(model).alone():
        assert model.config.layer_types[:3] == ["sliding_attention"] * 2 + ["full_attention"]
    assert model.config.layer_types == types


def test_the_proof_of_a_bfloat16_model_is_in_float32_and_its_weights_stay(tied_folder, monkeypatch):
    seen = []
    answer = stock_answers._answer

    def noting(model, passage):
        seen.append(model.dtype)
        return answer(model, passage)

    monkeypatch.setattr(stock_answers, "_answer", noting)
    base_model = load_base_model(str(tied_folder), dtype="bfloat16", device="cpu")
    assert seen == [torch.float32] * 3 + [torch.bfloat16]
    assert base_model.head_weight.dtype == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(str(tied_folder), dtype=torch.bfloat16)
    assert torch.equal(base_model.head_weight, stock.lm_head.weight)


def test_a_model_of_very_short_sequences_is_refused(tmp_path):
    folder = save_random(small_config("mistral", max_position_embeddings=4), tmp_path)
    with pytest.raises(BaseModelNotFound, match="takes sequences of at most 4 tokens"):
        load(folder)


def test_stages_are_named_as_they_begin(tied_folder):
    stages = []
    load_base_model(str(tied_folder), dtype="float32", device="cpu", on_stage=stages.append)
    assert stages == ["read", "prove"]
