"""Builds the engine of a configured base model, and imports its implementation.

The worker uses this module and the roles, but no implementation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training import devices
from training.base_model_config import BaseModelConfig, VllmConfig
from training.engine.error_text import error_text
from training.engine.group.members import Members, RankStart, meeting_place
from training.engine.interface import Engine, Sampler
from training.errors import BaseModelNotFound, DeviceNotFound, TrainingError
from training.vllm_server import read_connection

if TYPE_CHECKING:
    from training.engine.custom_loss.run import CustomLossRunner
    from training.engine.renderer.chat_renderer import ChatRenderer
    from training.engine.sampler.continuous_batching import ContinuousSampler
    from training.engine.torch.base_model import BaseModel
    from training.engine.torch.sharding.rank_group import RankGroup

logger = logging.getLogger(__name__)

SPIN_COUNT = 20_000
"""Rounds for which a thread of torch waits for the next operation before it sleeps: less than a
millisecond."""

MAX_REASON_CHARACTERS = 300  # of a library's error about a model's folder


@dataclass(frozen=True)
class ServerPlace:
    """A vLLM server of a base model."""

    config: VllmConfig
    folder: Path
    """Of its connection, and of the versions that it loads."""


def build_engine(
    config: BaseModelConfig,
    folder: Path,
    *,
    number: int = 0,
    among: Sequence[BaseModelConfig],
    num_threads: int,
    batch_tokens: int,
    cache_tokens: int,
    wait_seconds: float,
    on_stage: Callable[[str], None],
    server_folder: Path | None = None,
) -> Engine:
    """The engine of a base model on this machine: in this process, and in those of the other ranks
    of its worker, which this starts; call it in the main thread.

    Args:
        folder: The model's folder.
        number: Of this worker, among the base model's on this machine.
        among: All base models of the server: two share a GPU only if no other is free.
        num_threads: Threads of a pass on a CPU, until ``Trainer.use_threads`` changes their number;
            0 leaves the choice to ``training.devices``.
        batch_tokens: Most tokens in one training micro-batch; memory grows with it.
        cache_tokens: Tokens whose keys and values are held for sampling; 0: see ``cache_size``.
        wait_seconds: Longest wait for another rank of the worker.
        on_stage: Called with the name of each stage of loading as it begins.
        server_folder: For ``sampler="vllm"``: the folder of the server's connection and of the
            versions that it loads.

    Raises:
        BaseModelNotFound: The folder cannot be read, or has a model that cannot be served.
        DeviceNotFound: It names a GPU that does not exist.
    """
    if config.num_ranks > 1 and "cpu" in (config.device, *config.devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers' meshes would take the GPUs
    # Else torch's threads would keep their cores for milliseconds after each of their operations.
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    import torch

    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes = range(number * config.num_ranks, (number + 1) * config.num_ranks)
    chosen = [
        devices.device_of(config, process, among=among, gpu_count=gpu_count)
        for process in processes
    ]
    start = RankStart(
        config=config,
        folder=str(folder),
        rank=0,
        device=chosen[0],
        meeting_place="",
        num_threads=devices.num_threads(
            num_threads, torch.get_num_threads(), processes=config.num_processes
        ),
        num_sharing=devices.num_sharing(config, processes[0], among=among, gpu_count=gpu_count),
        batch_tokens=batch_tokens,
        cache_tokens=cache_tokens,
        wait_seconds=wait_seconds,
    )
    if config.num_ranks == 1:
        vllm = None
        if config.vllm is not None and server_folder is not None:
            vllm = ServerPlace(config.vllm, server_folder)
        if chosen[0] == "cpu":
            start = replace(start, num_threads=1)  # see the trainer's team
        engine = build_rank(start, on_stage=on_stage, vllm=vllm)
        cores = devices.count_cores() // config.num_processes
        engine.trainer.use_threads(num_threads or max(1, cores))
        return engine
    return _build_group(start, chosen, on_stage=on_stage)


def _build_group(
    start: RankStart, chosen: Sequence[str], *, on_stage: Callable[[str], None]
) -> Engine:
    """The engine over several ranks, each with one of the chosen devices.

    Raises:
        DeviceNotFound: Two of the ranks would share a GPU.
    """
    from training.engine.group.leader import leading

    if chosen[0] != "cpu" and len(set(chosen)) < len(chosen):
        raise DeviceNotFound(
            f"base model {start.config.name} needs {len(chosen)} GPUs for the ranks of a worker, "
            f"and there are {len(set(chosen))} for it; check its sizes and devices"
        )
    place = meeting_place()
    start = replace(start, meeting_place=str(place))
    members = Members(start, chosen)
    group, own = load_together(start, members, on_stage=on_stage)
    return leading(own, group, members)


def load_together(
    start: RankStart, members: Members, *, on_stage: Callable[[str], None]
) -> tuple[RankGroup, Engine]:
    """The group, and the first rank's own engine, once the other ranks have theirs.

    Raises:
        GroupBroken: A rank does not answer. The worker must end, and may be started again.
        BaseModelNotFound: See ``build_rank``.
    """
    from training.engine.torch.sharding.rank_group import (
        GroupBroken,
        is_broken_exchange,
        join_group,
    )

    has_met = False
    try:
        group = join_group(
            start.config,
            rank=0,
            device=start.device,
            meeting_place=Path(start.meeting_place),
            wait_seconds=start.wait_seconds,
        )
        has_met = True
        return group, build_rank(start, group=group, on_stage=on_stage)
    except Exception as error:
        if has_met and not is_broken_exchange(error):
            raise
        members.end_if_one_was_killed()
        raise GroupBroken(
            f"the ranks of {start.config.name} could not load it together (the first one waits "
            f"{start.wait_seconds:g} s for another one): {members.states()}: {error}"
        ) from error


def build_rank(
    start: RankStart,
    *,
    on_stage: Callable[[str], None],
    group: RankGroup | None = None,
    custom_losses: CustomLossRunner | None = None,
    vllm: ServerPlace | None = None,
) -> Engine:
    """The engine in this process; of one rank, if there is a group.

    Args:
        custom_losses: Computes clients' own losses; None does it in a process of its own.
        vllm: See ``engine_over``.

    Raises:
        BaseModelNotFound: The folder cannot be read, or has a model that cannot be served.
    """
    import torch

    from training.engine.custom_loss.process import CustomLossProcess
    from training.engine.torch.loading import load_base_model

    config, folder = start.config, Path(start.folder)
    torch.set_num_threads(start.num_threads)
    if start.device.startswith("cuda"):
        torch.cuda.set_device(
            start.device
        )  # otherwise tensors without an explicit device would be made on the first
    with _faults_of(folder):
        base_model = load_base_model(
            str(folder),
            name=config.name,
            device=start.device,
            dtype=config.dtype,
            layout=config.layout,
            on_stage=on_stage,
            group=group,
        )
        return engine_over(
            base_model,
            vllm=vllm,
            adapter_bytes=config.cache_bytes,
            activation_bytes=config.activation_bytes,
            num_sharing=start.num_sharing,
            batch_tokens=start.batch_tokens,
            cache_tokens=start.cache_tokens,
            custom_losses=custom_losses or CustomLossProcess(),
        )


def engine_over(
    base_model: BaseModel,
    *,
    adapter_bytes: int = 0,
    activation_bytes: int = 0,
    num_sharing: int = 1,
    batch_tokens: int = 4096,
    cache_tokens: int = 32_768,
    custom_losses: CustomLossRunner | None = None,
    vllm: ServerPlace | None = None,
) -> Engine:
    """The engine of a base model that is in memory; see ``build_engine``.

    Args:
        adapter_bytes: Memory budget of the adapters; 0 is half of the free memory of the device or,
            for a CPU,
            the machine. The other half is for passes, for the key-value cache, and
            for other processes.
        activation_bytes: A training pass whose activations take more computes them again in its
            backward pass; 0 is a share of the free memory.
        num_sharing: Workers, this one included, that share that half.
        custom_losses: None computes clients' own losses in this process, without a time limit.
        vllm: The server that samples what it can; None: the built-in sampler does everything.
    """
    from training.engine.renderer.chat_renderer import ChatRenderer
    from training.engine.sampler.cache_size import default_cache_tokens
    from training.engine.sampler.continuous_batching import ContinuousSampler
    from training.engine.torch.memory import free_bytes
    from training.engine.torch.trainer import TorchTrainer

    trainer = TorchTrainer(
        base_model,
        token_budget=batch_tokens,
        activation_bytes=activation_bytes,
        custom_losses=custom_losses,
    )
    renderer = ChatRenderer(
        base_model.tokenizer,
        base_model.info.vocab_size,
        end_token_ids=base_model.end_token_ids,
        images=None if base_model.vision is None else base_model.vision.reader,
        image_fault=base_model.image_fault,
    )
    cache_tokens = cache_tokens or default_cache_tokens(base_model, num_sharing=num_sharing)
    adapter_bytes = adapter_bytes or free_bytes(base_model.device) // 2 // num_sharing
    if base_model.group is not None:
        cache_tokens = base_model.group.least(cache_tokens)
        adapter_bytes = base_model.group.least(adapter_bytes)
    built_in = ContinuousSampler(base_model, renderer, cache_tokens=cache_tokens)
    return Engine(
        trainer=trainer,
        sampler=built_in if vllm is None else _beside(built_in, vllm, base_model, renderer),
        renderer=renderer,
        adapter_bytes=adapter_bytes,
    )


def _beside(
    built_in: ContinuousSampler, vllm: ServerPlace, base_model: BaseModel, renderer: ChatRenderer
) -> Sampler:
    """A sampler that asks a vLLM server, and the built-in one for what the server cannot do."""
    from training.engine.vllm.sampler import VllmSampler

    return VllmSampler(
        built_in,
        base_model,
        renderer,
        connection=partial(read_connection, vllm.config, vllm.folder),
        folder=vllm.folder / "versions",
        max_lora_rank=vllm.config.max_lora_rank,
        max_loras=vllm.config.max_loras,
        max_sequences=vllm.config.max_sequences,
        wait_seconds=vllm.config.wait_seconds,
        may_change=bool(vllm.config.address),  # one that ``up`` starts has a new key each time
    )


@contextmanager
def _faults_of(folder: Path) -> Iterator[None]:
    """An error while loading a folder is the folder's fault: it would happen again.

    Libraries raise many exceptions there, down to a division by zero. Lack of memory, a GPU error
    and the loss of another rank are not included, because the next start may succeed.
    """
    import torch

    from training.engine.torch.out_of_memory import is_out_of_memory
    from training.engine.torch.sharding.rank_group import is_broken_exchange

    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, getattr(torch, "AcceleratorError", ())):
            raise
        if is_broken_exchange(error):
            raise
        logger.exception("loading %s", folder)
        what = error_text(error, max_characters=MAX_REASON_CHARACTERS)
        raise BaseModelNotFound(f"No model can be read from {folder}: {what}") from error
