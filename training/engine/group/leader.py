"""The first rank's roles: they look like those of one process, and make all ranks work.

The worker calls them; a follower's loop is ``follower``. What only reads an adapter is answered by
this process alone, since every rank has the whole of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.engine.group.members import Members
from training.engine.group.verbs import Message, RankEngine, carry_out
from training.engine.interface import (
    CapturedAdapter,
    Engine,
    ForwardBackwardJob,
    SampleJob,
    SampleOutput,
    Sampler,
    Trainer,
)
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.checkpoint_io import CapturedTensors
from training.engine.torch.sharding.rank_group import RankGroup
from training.engine.torch.trainer import TorchTrainer
from training.errors import TrainingError
from training.types import AdamParams, ForwardBackwardOutput, LoraConfig, OptimStepOutput


class Leader:
    """Makes all ranks carry out a verb."""

    def __init__(self, engine: RankEngine, members: Members) -> None:
        self._engine = engine
        self._members = members

    def __call__(self, verb: str, *arguments: Any) -> Any:
        """The result of this rank.

        Raises:
            TrainingError: The same on every rank.
            Exception: The group is broken, and the worker must end.
        """
        message: Message = (verb, arguments)
        try:
            return carry_out(self._engine, self._engine.group.of_first(lambda: message))
        except TrainingError:
            raise
        except Exception:
            self._members.end_if_one_was_killed()
            raise


class LeadingTrainer(Trainer):
    """A trainer over several ranks; see ``TorchTrainer`` for what each computes."""

    def __init__(self, own: TorchTrainer, all_ranks: Leader) -> None:
        self._own = own
        self._all_ranks = all_ranks
        self.info = own.info

    def report_progress(self, to: Callable[[], None]) -> None:
        self._own.report_progress(to)

    def use_threads(self, count: int) -> None:
        """Each rank keeps its number, which results depend on."""

    def create_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        self._all_ranks("create", adapter_name, config)

    def drop_adapter(self, adapter_name: str) -> None:
        self._all_ranks("drop", adapter_name)

    def adapter_names(self) -> list[str]:
        return self._own.adapter_names()

    def adapter_bytes(self, config: LoraConfig, *, with_optimizer: bool = True) -> int:
        return self._own.adapter_bytes(config, with_optimizer=with_optimizer)

    def prepare_custom_losses(self) -> bool:
        return self._own.prepare_custom_losses()

    def device_memory(self) -> tuple[int, int] | None:
        return self._own.device_memory()

    def release_memory(self) -> None:
        self._all_ranks("release_memory")

    def forward_backward(
        self, jobs: Sequence[ForwardBackwardJob]
    ) -> list[ForwardBackwardOutput | TrainingError]:
        results: list[ForwardBackwardOutput | TrainingError]
        results = self._all_ranks("forward_backward", list(jobs))
        return results

    def optim_step(self, adapter_name: str, adam_params: AdamParams) -> OptimStepOutput:
        output: OptimStepOutput = self._all_ranks("optim_step", adapter_name, adam_params)
        return output

    def drop_gradient(self, adapter_name: str) -> None:
        self._all_ranks("drop_gradient", adapter_name)

    def capture_adapter(self, adapter_name: str, *, with_optimizer: bool = True) -> CapturedAdapter:
        return self._own.capture_adapter(adapter_name, with_optimizer=with_optimizer)

    def load_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> int:
        step: int = self._all_ranks("load", adapter_name, directory, with_optimizer)
        return step

    def import_adapter(self, adapter_name: str, directory: Path) -> LoraConfig:
        config: LoraConfig = self._all_ranks("import", adapter_name, directory)
        return config

    def save_peft(self, adapter_name: str, directory: Path) -> int:
        return self._own.save_peft(adapter_name, directory)

    def adapter_state(self, adapter_name: str) -> dict[str, Any]:
        return self._own.adapter_state(adapter_name)


class LeadingSampler(Sampler):
    """A sampler over several ranks, which all make the same steps."""

    def __init__(
        self,
        own: ContinuousSampler,
        trainer: TorchTrainer,
        all_ranks: Leader,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = own
        self._trainer = trainer
        self._all_ranks = all_ranks
        self._clock = clock
        self._on_progress: Callable[[], None] = lambda: None

    def report_progress(self, to: Callable[[], None]) -> None:
        self._on_progress = to

    def publish(self, version: str, weights: CapturedAdapter | Path) -> None:
        if isinstance(weights, CapturedTensors):
            name = self._trainer.adapter_with(weights.weights)
            if name is not None:
                self._all_ranks("publish_current", version, name)
                return
            flat = weights.weights.flat.cpu()
            own = AdapterTensors(weights.weights.layout, flat)
            weights = replace(weights, weights=own, buffers={"weights": flat})
        self._all_ranks("publish", version, weights)

    def retire(self, version: str) -> None:
        self._all_ranks("retire", version)

    @property
    def versions(self) -> Mapping[str, int]:
        return self._own.versions

    def submit(self, key: str, job: SampleJob) -> None:
        self._all_ranks("submit", key, job)

    def poll(self, wait_seconds: float) -> dict[str, SampleOutput | TrainingError]:
        deadline = self._clock() + wait_seconds
        finished: dict[str, SampleOutput | TrainingError] = {}
        while self._own.active and not finished:
            finished = self._all_ranks("step")
            self._on_progress()
            if self._clock() >= deadline:
                break
        return finished

    def progress(self, key: str) -> list[str]:
        return self._own.progress(key)

    def cancel(self, key: str) -> int:
        num_tokens: int = self._all_ranks("cancel", key)
        return num_tokens

    def release_memory(self) -> None:
        self._all_ranks("release_sampler_memory")

    @property
    def active(self) -> int:
        return self._own.active


def leading(engine: Engine, group: RankGroup, members: Members) -> Engine:
    """The engine of a group, from the first rank's own."""
    trainer, sampler = engine.trainer, engine.sampler
    if not isinstance(trainer, TorchTrainer) or not isinstance(sampler, ContinuousSampler):
        raise TypeError("only the built-in trainer and sampler work over several ranks")
    all_ranks = Leader(RankEngine(trainer=trainer, sampler=sampler, group=group), members)
    return replace(
        engine,
        trainer=LeadingTrainer(trainer, all_ranks),
        sampler=LeadingSampler(sampler, trainer, all_ranks),
    )
