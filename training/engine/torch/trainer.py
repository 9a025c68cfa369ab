"""The trainer over a loaded base model: its resident adapters, and their operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from training.engine.custom_loss.run import CustomLossesHere, CustomLossRunner
from training.engine.interface import CapturedAdapter, ForwardBackwardJob, Trainer
from training.engine.torch import adamw, checkpoint_io, memory
from training.engine.torch.adapters import (
    Adapter,
    AdapterLayout,
    AdapterTensors,
    all_finite,
    new_adapter,
)
from training.engine.torch.base_model import BaseModel
from training.engine.torch.memory_plan import PLANNED_ROWS, MemoryPlan
from training.engine.torch.out_of_memory import out_of_memory_by_name
from training.engine.torch.packing.plan import PlannedJob
from training.engine.torch.passes import run_pass
from training.engine.torch.peft_import import import_adapter
from training.engine.torch.sharding.rank_group import GroupBroken
from training.engine.torch.sharding.shared_losses import SharedCustomLosses
from training.engine.torch.target_modules import select_modules
from training.engine.validate import check_adam_params, check_job, check_lora_config
from training.errors import InvalidRequest, NonFiniteResult, OutOfMemory, TrainingError
from training.types import AdamParams, ForwardBackwardOutput, LoraConfig, OptimStepOutput

_GRADIENT_OVERFLOWS = (
    "The gradient of this request, added to the accumulated one, is outside float32; it was not "
    "added, and weights and gradient are unchanged. Send smaller advantages or weights."
)

JobResult = ForwardBackwardOutput | TrainingError


def _digest(results: Sequence[JobResult]) -> int:
    """A number that is the same for the same results."""
    number = 0
    for result in results:
        if isinstance(result, TrainingError):
            number = crc32(repr(result).encode(), number)
            continue
        number = crc32(repr(result.loss).encode(), number)
        for logprobs in result.logprobs:
            number = crc32(logprobs.tobytes(), number)
    return number


class TorchTrainer(Trainer):
    """One base model on one device; see ``Trainer`` for the operations.

    On a CPU the bits of a job's result depend on the adapter, the job and the token
    budget, and not on batch-mates: neither on other adapters nor on other jobs of the same
    adapter, nor on the number of threads (measured in float32 and bfloat16). So each job has
    its own matrix products, whose results are added to the adapter's gradient in the order
    of the jobs, and only its own datums share the rows of a prefix. On a GPU the number
    of rows may select another kernel, so this would not help: there an adapter's jobs share
    both, and a replay that must be close repeats the calls.
    """

    def __init__(
        self,
        base_model: BaseModel,
        *,
        token_budget: int = 4096,
        activation_bytes: int = 0,
        custom_losses: CustomLossRunner | None = None,
        free_bytes: Callable[[torch.device], int] = memory.free_bytes,
    ) -> None:
        """Start without adapters.

        Args:
            token_budget: Most tokens in one training micro-batch; memory grows with it.
            activation_bytes: A micro-batch whose activations take more computes them again in the
                backward pass; 0 is a share of the free memory.
            custom_losses: Computes clients' own losses; None computes them in this process.
            free_bytes: The memory of a device that passes may still take.
        """
        self._base_model = base_model
        self._group = base_model.group
        self._token_budget = token_budget
        self._memory_plan = MemoryPlan(
            base_model,
            activation_bytes=activation_bytes,
            free_bytes=free_bytes if self._group is None else self._group.least_of(free_bytes),
        )
        self._custom_losses = custom_losses or CustomLossesHere()
        if self._group is not None and not base_model.divides_passes:
            self._custom_losses = SharedCustomLosses(self._custom_losses, self._group)
        self._sums_by_job = base_model.device.type == "cpu"
        self.info = base_model.info
        # In order of use: the least recently used first.
        self._adapters: dict[str, Adapter] = {}

    def report_progress(self, to: Callable[[], None]) -> None:
        self._base_model.report_progress(to)

    def use_threads(self, count: int) -> None:
        if self._base_model.device.type == "cpu" and self._group is None:
            self._base_model.holder.team.size = count

    def create_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        if adapter_name in self._adapters:
            raise InvalidRequest(f"An adapter named {adapter_name} is resident already.")
        check_lora_config(config)
        modules = select_modules(config, self._base_model.linear_shapes, self._base_model.head_name)
        with out_of_memory_by_name():
            adapter = new_adapter(AdapterLayout(config, modules), self._base_model.device)
        self._adapters[adapter_name] = adapter

    def drop_adapter(self, adapter_name: str) -> None:
        self._adapters.pop(adapter_name, None)

    def adapter_names(self) -> list[str]:
        return list(self._adapters)

    def adapter_with(self, weights: AdapterTensors) -> str | None:
        """The adapter whose current weights these are; None if there is none any more."""
        names = (name for name, each in self._adapters.items() if each.weights is weights)
        return next(names, None)

    def adapter_bytes(self, config: LoraConfig, *, with_optimizer: bool = True) -> int:
        modules = select_modules(config, self._base_model.linear_shapes, self._base_model.head_name)
        layout = AdapterLayout(config, modules)
        return layout.num_bytes(self._base_model.dtype, with_optimizer=with_optimizer)

    def prepare_custom_losses(self) -> bool:
        return self._custom_losses.prepare()

    def device_memory(self) -> tuple[int, int] | None:
        return memory.device_memory(self._base_model.device)

    def release_memory(self) -> None:
        self._custom_losses.release()
        if self._base_model.vision is not None:
            self._base_model.vision.forget()
        memory.give_back_freed_memory()

    def forward_backward(self, jobs: Sequence[ForwardBackwardJob]) -> list[JobResult]:
        results: dict[int, JobResult] = {}
        checked: dict[int, PlannedJob] = {}
        for i, job in enumerate(jobs):
            try:
                adapter = self._use(job.adapter_name)
                config = check_job(job, self.info)
                self._check_memory(job, adapter.layout)
                checked[i] = PlannedJob(
                    job=job,
                    config=config,
                    part=(job.adapter_name, i if self._sums_by_job else 0),
                )
            except TrainingError as error:
                results[i] = error
        for trains in (True, False):
            chosen = {i: p for i, p in checked.items() if p.job.forward_only is not trains}
            outcome = self._run(list(chosen.values()), trains=trains)
            results |= {i: outcome[planned] for i, planned in chosen.items()}
        ordered = [results[i] for i in range(len(jobs))]
        if self._group is not None:
            names = dict.fromkeys(planned.job.adapter_name for planned in checked.values())
            sums = {name: float(self._adapters[name].grad.flat.norm()) for name in names}
            self._group.require_equal("The result of a pass", (_digest(ordered), sums))
        return ordered

    def _check_memory(self, job: ForwardBackwardJob, layout: AdapterLayout) -> None:
        """Refuse a job with a datum whose pass would not fit into the free memory.

        A replay is not refused: what fitted once is computed again.
        """
        lengths = [len(datum.model_input) for datum in job.data]
        if job.forward_only or job.is_replay or max(lengths) < PLANNED_ROWS:
            return
        longest = self._memory_plan.longest(layout)
        if max(lengths) > longest:
            memory.give_back_freed_memory()
            longest = self._memory_plan.longest(layout)
        for index, length in enumerate(lengths):
            if length > longest:
                raise OutOfMemory(
                    f"data[{index}]: {length} tokens do not fit into this worker's free memory; "
                    f"now the longest datum to train on has {longest} tokens. Send shorter "
                    "datums, or have the operator give the worker more memory."
                )

    def _run(self, jobs: Sequence[PlannedJob], *, trains: bool) -> dict[PlannedJob, JobResult]:
        """Run jobs together and add their gradients.

        A failing job fails alone. A job whose result is not finite may have spoilt the gradient
        that it shares with others of its adapter, so the pass is discarded and the others run
        again, exactly as if that job had not been there.
        """
        outcome: dict[PlannedJob, JobResult] = {}
        while jobs:
            try:
                with out_of_memory_by_name():
                    result = run_pass(
                        self._base_model,
                        jobs,
                        self._adapters,
                        token_budget=self._token_budget,
                        trains=trains,
                        custom_losses=self._custom_losses,
                        memory_plan=self._memory_plan,
                    )
            except OutOfMemory:
                if self._group is not None:
                    # The others wait for this rank in the middle of a layer.
                    raise GroupBroken("This rank has run out of memory in a pass.") from None
                return outcome | self._run_smaller(jobs, trains=trains)
            bad = {p: error for p in jobs if (error := result.scores[p].error) is not None}
            outcome |= bad
            jobs = [planned for planned in jobs if planned not in outcome]
            if not bad or not trains:
                outcome |= {p: result.scores[p].output(result.memory) for p in jobs}
                break
        else:
            return outcome
        if overflowing := self._keep_grads(result.grads):
            outcome |= self._find_overflow(jobs, overflowing)
        return outcome

    def _keep_grads(self, grads: Mapping[str, AdapterTensors]) -> list[str]:
        """Give a pass's gradients to their adapters, except gradients that are not finite; return
        the names of those adapters."""
        finite = {name: grad for name, grad in grads.items() if all_finite(grad.flat)}
        for name, grad in finite.items():
            self._adapters[name].grad = grad
        return [name for name in grads if name not in finite]

    def _find_overflow(
        self, jobs: Sequence[PlannedJob], adapter_names: Sequence[str]
    ) -> dict[PlannedJob, JobResult]:
        """The results of jobs whose losses are finite, but the sum of whose gradients is not.

        If several jobs of an adapter share it, each runs again alone to find the cause.
        """
        changed: dict[PlannedJob, JobResult] = {}
        for name in adapter_names:
            sharing = [planned for planned in jobs if planned.job.adapter_name == name]
            if len(sharing) == 1:
                changed[sharing[0]] = NonFiniteResult(_GRADIENT_OVERFLOWS)
            else:
                for planned in sharing:
                    changed |= self._run([planned], trains=True)
        return changed

    def _run_smaller(
        self, jobs: Sequence[PlannedJob], *, trains: bool
    ) -> dict[PlannedJob, JobResult]:
        """After running out of memory: each job alone; one that still does not fit is refused."""
        if len(jobs) == 1:
            return {jobs[0]: OutOfMemory()}
        outcome: dict[PlannedJob, JobResult] = {}
        for planned in jobs:
            outcome |= self._run([planned], trains=trains)
        return outcome

    def optim_step(self, adapter_name: str, adam_params: AdamParams) -> OptimStepOutput:
        check_adam_params(adam_params)
        with out_of_memory_by_name():
            return adamw.adamw_step(self._use(adapter_name), adam_params)

    def drop_gradient(self, adapter_name: str) -> None:
        adapter = self._use(adapter_name)
        with out_of_memory_by_name():
            zeros = torch.zeros_like(adapter.grad.flat)
        adapter.grad = AdapterTensors(adapter.layout, zeros)

    def capture_adapter(self, adapter_name: str, *, with_optimizer: bool = True) -> CapturedAdapter:
        return checkpoint_io.capture_adapter(
            self._use(adapter_name),
            base_model_name=self.info.name,
            with_optimizer=with_optimizer,
        )

    def load_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> int:
        with out_of_memory_by_name():
            adapter = checkpoint_io.load_adapter(
                directory,
                self._base_model.linear_shapes,
                self._base_model.device,
                with_optimizer=with_optimizer,
            )
        self._adapters.pop(adapter_name, None)
        self._adapters[adapter_name] = adapter
        return adapter.step

    def import_adapter(self, adapter_name: str, directory: Path) -> LoraConfig:
        if adapter_name in self._adapters:
            raise InvalidRequest(f"An adapter named {adapter_name} is resident already.")
        with out_of_memory_by_name():
            adapter = import_adapter(directory, self._base_model)
        self._adapters[adapter_name] = adapter
        return adapter.layout.config

    def save_peft(self, adapter_name: str, directory: Path) -> int:
        from training.engine.torch.peft_export import save_peft

        return save_peft(
            self._use(adapter_name),
            directory,
            base_model_name=self.info.name,
            head_name=self._base_model.head_name,
            model_type=self._base_model.model_type,
            stacks=self._base_model.expert_stacks,
        )

    def adapter_state(self, adapter_name: str) -> dict[str, Any]:
        adapter = self._peek(adapter_name)
        buffers = {
            "weights": adapter.weights.flat,
            "exp_avg": adapter.exp_avg,
            "exp_avg_sq": adapter.exp_avg_sq,
            "grad": adapter.grad.flat,
        }
        # Copies: numpy's arrays are writable, but the buffers must not be modified.
        arrays = {name: flat.cpu().numpy().copy() for name, flat in buffers.items()}
        return {**arrays, "step": adapter.step}

    def _peek(self, adapter_name: str) -> Adapter:
        if adapter_name not in self._adapters:
            raise InvalidRequest(f"No adapter named {adapter_name} is resident.")
        return self._adapters[adapter_name]

    def _use(self, adapter_name: str) -> Adapter:
        """The resident adapter of this name, which becomes the most recently used."""
        adapter = self._peek(adapter_name)
        self._adapters[adapter_name] = self._adapters.pop(adapter_name)
        return adapter
