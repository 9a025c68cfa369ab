"""Families and sizes that a worker over several devices cannot serve are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.engine.families import small_config
from training.base_model_config import BaseModelConfig
from training.engine.torch.sharding.own_parts import require_plan
from training.errors import BaseModelNotFound


def require(model_type: str, sizes: dict[str, int], **changes: Any) -> None:
    require_plan(
        small_config(model_type, **changes),
        AutoModelForCausalLM,
        name="tiny",
        sizes=BaseModelConfig(name="tiny", path="tiny", **sizes),
    )


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("gpt2", {"tp_size": 2}, "the gpt2 family stores its layers transposed"),
        ("gpt2", {"fsdp_size": 2}, "the gpt2 family stores its layers transposed"),
        ("gpt_neo", {"tp_size": 2}, "transformers has no plan to split the gpt_neo family's"),
        ("qwen3", {"tp_size": 2, "ep_size": 2}, "no plan to divide experts of qwen3"),
        ("qwen3", {"tp_size": 3}, "the outputs of .*q_proj are 16, which is no multiple of 3"),
        ("gpt_oss", {"tp_size": 2}, "plan for the gpt_oss family splits no layer"),
        ("granite_swa", {"tp_size": 2}, "the granite_swa family's plan has the style local_params"),
        ("deepseek_v2", {"tp_size": 2}, "the deepseek_v2 family's plan has the style mla_kv_a"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(
    model_type: str, sizes: dict[str, int], reason: str
) -> None:
    changes: dict[str, Any] = {}
    if model_type == "gpt_neo":
        changes["attention_types"] = [[["global", "local"], 1]]
    if model_type.startswith("deepseek"):
        changes["num_key_value_heads"] = 4
    asked = next(iter(sizes))
    with pytest.raises(BaseModelNotFound, match=f"tiny cannot be served with {asked}.*{reason}"):
        require(model_type, sizes, **changes)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BaseModelNotFound, match="num_key_value_heads are 1, which is no multiple"):
        require("llama", {"tp_size": 2}, num_key_value_heads=1)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_a_family_with_a_plan_is_not_refused(model_type: str) -> None:
    require(model_type, {"tp_size": 2})
    require(model_type, {"fsdp_size": 3})
