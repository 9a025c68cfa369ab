"""The operations that all ranks of a worker carry out together, each on its own engine.

The leader names one, with plain values as arguments; every rank calls the same function with them.
Operations that only read are not among them: the leader answers them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from training.engine.interface import CapturedAdapter, ForwardBackwardJob, SampleJob, SampleOutput
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.sharding.rank_group import RankGroup
from training.engine.torch.trainer import TorchTrainer
from training.errors import TrainingError
from training.types import AdamParams, LoraConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class RankEngine:
    """One rank's own engine."""

    trainer: TorchTrainer
    sampler: ContinuousSampler
    group: RankGroup


Message = tuple[str, tuple[Any, ...]]
"""A verb's name and its arguments."""


def carry_out(engine: RankEngine, message: Message) -> Any:
    """This rank's part of a verb.

    Raises:
        TrainingError: The same on every rank.
        GroupBroken: The ranks' results differ.
    """
    verb, arguments = message
    result, error = None, None
    try:
        result = VERBS[verb](engine, *arguments)
    except TrainingError as domain_error:
        error = domain_error
    if verb in COMPARED:
        outcome = repr(result) if error is None else repr(error)
        engine.group.require_equal(f"The outcome of {verb}", crc32(outcome.encode()))
    if error is not None:
        raise error
    return result


def _create(engine: RankEngine, adapter_name: str, config: LoraConfig) -> None:
    engine.trainer.create_adapter(adapter_name, config)


def _drop(engine: RankEngine, adapter_name: str) -> None:
    engine.trainer.drop_adapter(adapter_name)


def _load(engine: RankEngine, adapter_name: str, directory: Path, with_optimizer: bool) -> int:
    return engine.trainer.load_adapter(adapter_name, directory, with_optimizer=with_optimizer)


def _import(engine: RankEngine, adapter_name: str, directory: Path) -> LoraConfig:
    return engine.trainer.import_adapter(adapter_name, directory)


def _forward_backward(engine: RankEngine, jobs: Sequence[ForwardBackwardJob]) -> Any:
    return engine.trainer.forward_backward(jobs)


def _optim_step(engine: RankEngine, adapter_name: str, adam_params: AdamParams) -> Any:
    return engine.trainer.optim_step(adapter_name, adam_params)


def _drop_gradient(engine: RankEngine, adapter_name: str) -> None:
    engine.trainer.drop_gradient(adapter_name)


def _release_memory(engine: RankEngine) -> None:
    engine.trainer.release_memory()


def _publish(engine: RankEngine, version: str, weights: CapturedAdapter | Path) -> None:
    engine.sampler.publish(version, weights)


def _publish_current(engine: RankEngine, version: str, adapter_name: str) -> None:
    """Publish the weights that the adapter has now, which are not copied."""
    captured = engine.trainer.capture_adapter(adapter_name, with_optimizer=False)
    engine.sampler.publish(version, captured)


def _retire(engine: RankEngine, version: str) -> None:
    engine.sampler.retire(version)


def _submit(engine: RankEngine, key: str, job: SampleJob) -> None:
    engine.sampler.submit(key, job)


def _cancel(engine: RankEngine, key: str) -> int:
    return engine.sampler.cancel(key)


def _step(engine: RankEngine) -> Mapping[str, SampleOutput | TrainingError]:
    finished = engine.sampler.step()
    if finished:
        results = [(key, _sampled(output)) for key, output in finished.items()]
        engine.group.require_equal("The samples", crc32(repr(results).encode()))
    return finished


def _sampled(output: SampleOutput | TrainingError) -> Any:
    if isinstance(output, TrainingError):
        return repr(output)
    return [list(sequence.tokens) for sequence in output.sequences]


def _release_sampler_memory(engine: RankEngine) -> None:
    engine.sampler.release_memory()


VERBS: Mapping[str, Callable[..., Any]] = {
    "create": _create,
    "drop": _drop,
    "load": _load,
    "import": _import,
    "forward_backward": _forward_backward,
    "optim_step": _optim_step,
    "drop_gradient": _drop_gradient,
    "release_memory": _release_memory,
    "publish": _publish,
    "publish_current": _publish_current,
    "retire": _retire,
    "submit": _submit,
    "cancel": _cancel,
    "step": _step,
    "release_sampler_memory": _release_sampler_memory,
}

COMPARED = {
    "create",
    "load",
    "import",
    "optim_step",
    "drop_gradient",
    "publish",
    "publish_current",
    "submit",
    "cancel",
}
"""Those whose outcome is compared as a whole; passes and samples compare theirs by themselves."""
