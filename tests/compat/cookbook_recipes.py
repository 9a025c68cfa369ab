"""One recipe of the tinker-cookbook, a few steps of it, on local data.

Run by ``cookbook`` in the cookbook's environment: ``python cookbook_recipes.py RECIPE``. The model
hub is a folder: the recipes find the tokenizer and the data sets under their usual names in the
working folder. Beside that, only configuration is chosen. The last line written is the JSON of the
numbers that should fall, or rise.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook import model_info
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RENDERER = "qwen3_instruct"
"""ChatML without thinking, which is what SmolLM2 speaks."""
RANK = 16
LOGS = Path("logs")


def metrics(recipe: str, *names: str) -> list[float]:
    """One metric of every step that has it, from the log that the cookbook writes."""
    rows = [json.loads(line) for line in (LOGS / recipe / "metrics.jsonl").open()]
    return [row[name] for row in rows for name in names if name in row]


def chats(batch_size: int) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL,
        renderer_name=RENDERER,
        max_length=256,
        batch_size=batch_size,
        train_on_what=None,
    )


def sl_loop() -> list[float]:
    from tinker_cookbook.recipes import sl_loop as recipe

    recipe.main(
        recipe.Config(
            log_path=str(LOGS / "sl_loop"),
            model_name=MODEL,
            batch_size=4,
            learning_rate=2e-3,
            max_length=256,
            lora_rank=RANK,
            save_every=3,
            max_steps=6,
        )
    )
    return metrics("sl_loop", "train_mean_nll")


def rl_loop() -> list[float]:
    from tinker_cookbook.recipes import rl_loop as recipe

    recipe.main(
        recipe.Config(
            log_path=str(LOGS / "rl_loop"),
            model_name=MODEL,
            batch_size=4,
            group_size=8,
            learning_rate=1e-3,
            lora_rank=RANK,
            save_every=0,
            max_tokens=24,
            max_steps=8,
        )
    )
    return metrics("rl_loop", "reward/total")


def supervised() -> list[float]:
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder

    data = FromConversationFileBuilder(
        common_config=chats(4), file_path="conversations.jsonl", test_size=4
    )
    asyncio.run(
        train.main(
            train.Config(
                log_path=str(LOGS / "supervised"),
                model_name=MODEL,
                recipe_name="supervised",
                renderer_name=RENDERER,
                dataset_builder=data,
                learning_rate=2e-3,
                lora_rank=RANK,
                eval_every=2,
                save_every=2,
                max_steps=6,
            )
        )
    )
    return metrics("supervised", "train_mean_nll")


def prompt_distillation() -> list[float]:
    """Both halves: the teacher with its long prompt answers, the student learns the answers."""
    from tinker_cookbook.recipes.prompt_distillation import create_data, train
    from tinker_cookbook.renderers import get_renderer
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    sampler = tinker.ServiceClient().create_sampling_client(base_model=MODEL)
    tokenizer = get_tokenizer(MODEL)
    renderer = get_renderer(RENDERER, tokenizer)
    answered = Path("answered.jsonl")
    asyncio.run(
        create_data.create_data_async(
            create_data.Config(output_file=str(answered)), sampler, tokenizer, renderer
        )
    )
    sys.stderr.write(f"the teacher's usable answers: {len(answered.read_text().splitlines())}\n")
    # A model of 135M parameters seldom keeps to the form that the recipe looks for.
    train.cli_main(
        train.CLIConfig(
            file_path="labels.jsonl",
            log_path=str(LOGS / "prompt_distillation"),
            model_name=MODEL,
            renderer_name=RENDERER,
            learning_rate=2e-3,
            num_epochs=3,
            lora_rank=RANK,
            batch_size=4,
            max_length=256,
            save_every=0,
            eval_every=0,
            max_steps=6,
        )
    )
    return metrics("prompt_distillation", "train_mean_nll")


def dpo() -> list[float]:
    from tinker_cookbook.preference import train_dpo
    from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
    from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl

    data = DPODatasetBuilderFromComparisons(
        common_config=chats(4),
        comparison_builder=ComparisonBuilderFromJsonl(train_path="comparisons.jsonl"),
    )
    train_dpo.main(
        train_dpo.Config(
            log_path=str(LOGS / "dpo"),
            model_name=MODEL,
            recipe_name="dpo",
            renderer_name=RENDERER,
            dataset_builder=data,
            learning_rate=5e-4,
            lora_rank=RANK,
            save_every=0,
            eval_every=0,
            infrequent_eval_every=0,
            max_steps=6,
        )
    )
    return metrics("dpo", "dpo_loss")


def on_policy_distillation() -> list[float]:
    """The teacher is what ``sl_loop`` has saved last."""
    from tinker_cookbook.checkpoint_utils import get_last_checkpoint
    from tinker_cookbook.distillation import train_on_policy
    from tinker_cookbook.distillation.datasets import (
        DistillationDatasetConfig,
        PromptOnlyDatasetBuilder,
        TeacherConfig,
    )

    teacher = get_last_checkpoint(str(LOGS / "sl_loop"), "sampler_path")
    assert teacher is not None
    data = PromptOnlyDatasetBuilder(
        dataset_name="tulu3",
        groups_per_batch=4,
        group_size=4,
        model_name_for_tokenizer=MODEL,
        renderer_name=RENDERER,
    )
    asyncio.run(
        train_on_policy.main(
            train_on_policy.Config(
                learning_rate=1e-3,
                dataset_configs=[
                    DistillationDatasetConfig(
                        dataset_builder=data,
                        teacher_config=TeacherConfig(
                            base_model=MODEL, load_checkpoint_path=teacher.sampler_path
                        ),
                        groups_per_batch=4,
                    )
                ],
                model_name=MODEL,
                recipe_name="on_policy_distillation",
                renderer_name=RENDERER,
                max_tokens=24,
                lora_rank=RANK,
                log_path=str(LOGS / "on_policy_distillation"),
                eval_every=0,
                save_every=0,
                max_steps=8,
            )
        )
    )
    return metrics("on_policy_distillation", "teacher_kl")


RECIPES: dict[str, Callable[[], list[float]]] = {
    recipe.__name__: recipe
    for recipe in (sl_loop, rl_loop, supervised, prompt_distillation, dpo, on_policy_distillation)
}


def know_the_model() -> None:
    """Name the renderer of a model that the cookbook's table does not have; two recipes ask it."""
    known = model_info.get_recommended_renderer_name

    def recommended(model_name: str) -> str:
        return RENDERER if model_name == MODEL else known(model_name)

    changed: Any = model_info
    changed.get_recommended_renderer_name = recommended


if __name__ == "__main__":
    know_the_model()
    numbers = RECIPES[sys.argv[1]]()
    sys.stdout.write("\n" + json.dumps([round(number, 4) for number in numbers]) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the recipes leave their sessions open
