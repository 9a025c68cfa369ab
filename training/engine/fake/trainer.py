"""A trainer without a model: the same verbs, refusals and files, arithmetic in microseconds.

It replaces ``TorchTrainer`` in tests of the worker and the control plane, and is made to
reveal their mistakes: weights depend on the order of steps (AdamW of a softmax over eight classes),
two adapters never have equal numbers, and an adapter's gradient is a sum of exact multiples of
``QUANTUM``, so its bits do not depend on how requests are merged into batches.

Imports numpy and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.fake.checkpoint import (
    CLASSES,
    OPTIMIZER,
    FakeCapture,
    FloatArray,
    export_peft,
    import_peft,
    read_checkpoint,
)
from training.engine.fake.sampler import VOCAB_SIZE
from training.engine.interface import BaseModelInfo, ForwardBackwardJob, Trainer
from training.engine.validate import check_adam_params, check_job, check_lora_config
from training.errors import (
    CheckpointNotFound,
    GradientDropped,
    InvalidRequest,
    NonFiniteResult,
    TrainingError,
)
from training.loss_fns import CUSTOM, LOSS_FNS
from training.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepOutput,
)

SPREAD = math.log(VOCAB_SIZE / CLASSES)
QUANTUM = 2.0**-10
ADAPTER_BYTES = 4 * CLASSES * CLASSES * 4
"""Weights, gradient and moments."""

BeforeVerb = Callable[[str, tuple[str, ...]], None]


@dataclass(eq=False)
class _FakeAdapter:
    config: LoraConfig
    weights: FloatArray
    """(CLASSES, CLASSES): row = class of the token read, column = class predicted."""
    grad: FloatArray = field(default_factory=lambda: _zeros())
    exp_avg: FloatArray = field(default_factory=lambda: _zeros())
    exp_avg_sq: FloatArray = field(default_factory=lambda: _zeros())
    step: int = 0


def _zeros() -> FloatArray:
    return np.zeros((CLASSES, CLASSES), np.float32)


class FakeTrainer(Trainer):
    """See the module's docstring."""

    def __init__(
        self,
        *,
        name: str = "fake",
        max_context_tokens: int = 512,
        before_verb: BeforeVerb | None = None,
    ) -> None:
        """``before_verb`` is called with the verb and its adapter names before the verb runs,
        so that a test can wait, raise or kill its process there."""
        self.info = BaseModelInfo(
            name=name,
            vocab_size=VOCAB_SIZE,
            max_context_tokens=max_context_tokens,
            num_parameters=0,
            device="cpu",
            dtype="float32",
        )
        self._before_verb = before_verb or (lambda verb, adapter_names: None)
        self._adapters: dict[str, _FakeAdapter] = {}
        self.own_memory: tuple[int, int] | None = None
        """What it says of its device's memory."""

    def report_progress(self, to: Callable[[], None]) -> None:
        """Nothing here takes long."""

    def use_threads(self, count: int) -> None:
        """Nothing here takes long."""

    def create_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        self._before_verb("create_adapter", (adapter_name,))
        if adapter_name in self._adapters:
            raise InvalidRequest(f"An adapter named {adapter_name} is resident already.")
        check_lora_config(config)
        draw = np.random.default_rng(config.seed).standard_normal((CLASSES, CLASSES))
        self._adapters[adapter_name] = _FakeAdapter(config, (0.01 * draw).astype(np.float32))

    def drop_adapter(self, adapter_name: str) -> None:
        self._before_verb("drop_adapter", (adapter_name,))
        self._adapters.pop(adapter_name, None)

    def adapter_names(self) -> list[str]:
        return list(self._adapters)

    def adapter_bytes(self, config: LoraConfig, *, with_optimizer: bool = True) -> int:
        return ADAPTER_BYTES if with_optimizer else ADAPTER_BYTES // 4

    def prepare_custom_losses(self) -> bool:
        return True

    def device_memory(self) -> tuple[int, int] | None:
        return self.own_memory

    def release_memory(self) -> None:
        """Holds nothing to release."""

    def forward_backward(
        self, jobs: Sequence[ForwardBackwardJob]
    ) -> list[ForwardBackwardOutput | TrainingError]:
        self._before_verb("forward_backward", tuple(job.adapter_name for job in jobs))
        results: list[ForwardBackwardOutput | TrainingError] = []
        for job in jobs:
            try:
                results.append(self._run_job(job))
            except TrainingError as error:
                results.append(error)
        return results

    def _run_job(self, job: ForwardBackwardJob) -> ForwardBackwardOutput:
        adapter = self.find(job.adapter_name)
        check_job(job, self.info)
        loss = 0.0
        grad = np.zeros((CLASSES, CLASSES))
        logprobs = []
        for datum in job.data:
            targets = datum.loss_fn_inputs["target_tokens"]
            rows = _log_softmax(adapter.weights)[datum.model_input % CLASSES]  # (N, CLASSES)
            columns = targets.reshape(len(targets), -1) % CLASSES  # (N, K)
            # A class's tokens share its probability equally.
            lp = np.take_along_axis(rows, columns, axis=1) - SPREAD  # (N, K)
            seed = _loss_seed(datum, job.loss_fn).reshape(columns.shape)  # (N, K)
            loss -= float((seed * lp).sum())
            for k in range(columns.shape[1]):
                onehot = np.eye(CLASSES)[columns[:, k]]
                push = seed[:, k : k + 1] * (np.exp(rows) - onehot)
                np.add.at(grad, datum.model_input % CLASSES, np.round(push / QUANTUM) * QUANTUM)
            logprobs.append(lp.reshape(targets.shape).astype(np.float32))
        if not np.isfinite(loss):
            raise NonFiniteResult
        if not job.forward_only:
            adapter.grad = (adapter.grad + grad).astype(np.float32)
        return ForwardBackwardOutput(loss=loss, logprobs=logprobs, metrics={"loss:sum": loss})

    @np.errstate(all="ignore")  # values that are not finite are found and refused
    def optim_step(self, adapter_name: str, adam_params: AdamParams) -> OptimStepOutput:
        self._before_verb("optim_step", (adapter_name,))
        check_adam_params(adam_params)
        adapter, p = self.find(adapter_name), adam_params
        norm = float(np.sqrt(np.square(adapter.grad, dtype=np.float64).sum()))
        is_clipped = p.grad_clip_norm > 0 and norm > p.grad_clip_norm
        grad = adapter.grad * (p.grad_clip_norm / norm) if is_clipped else adapter.grad
        step = adapter.step + 1
        exp_avg = p.beta1 * adapter.exp_avg + (1 - p.beta1) * grad
        exp_avg_sq = p.beta2 * adapter.exp_avg_sq + (1 - p.beta2) * grad * grad
        if not np.isfinite(exp_avg_sq).all():
            adapter.grad = _zeros()
            raise GradientDropped
        denominator = np.sqrt(exp_avg_sq / (1 - p.beta2**step)) + p.eps
        update = exp_avg / (1 - p.beta1**step) / denominator
        weights = adapter.weights * (1 - p.learning_rate * p.weight_decay)
        weights = (weights - p.learning_rate * update).astype(np.float32)
        if not np.isfinite(weights).all():
            raise NonFiniteResult
        adapter.weights, adapter.step, adapter.grad = weights, step, _zeros()
        adapter.exp_avg = exp_avg.astype(np.float32)
        adapter.exp_avg_sq = exp_avg_sq.astype(np.float32)
        return OptimStepOutput(step=step, grad_norm=norm)

    def drop_gradient(self, adapter_name: str) -> None:
        self.find(adapter_name).grad = _zeros()

    def capture_adapter(self, adapter_name: str, *, with_optimizer: bool = True) -> FakeCapture:
        self._before_verb("capture_adapter", (adapter_name,))
        adapter = self.find(adapter_name)
        names = ("weights", *(OPTIMIZER if with_optimizer else ()))
        return FakeCapture(
            arrays={name: getattr(adapter, name) for name in names},
            step=adapter.step,
            config=adapter.config,
            before_write=lambda: self._before_verb("save_adapter", (adapter_name,)),
        )

    def load_adapter(
        self, adapter_name: str, directory: Path, *, with_optimizer: bool = True
    ) -> int:
        self._before_verb("load_adapter", (adapter_name,))
        arrays, step, config = read_checkpoint(directory, with_optimizer=with_optimizer)
        adapter = _FakeAdapter(config, step=step if with_optimizer else 0, **arrays)
        self._adapters[adapter_name] = adapter
        return adapter.step

    def import_adapter(self, adapter_name: str, directory: Path) -> LoraConfig:
        self._before_verb("import_adapter", (adapter_name,))
        if adapter_name in self._adapters:
            raise InvalidRequest(f"An adapter named {adapter_name} is resident already.")
        if not directory.is_dir():
            raise CheckpointNotFound(f"No adapter at {directory.name}.")
        config, weights = import_peft(directory)
        self._adapters[adapter_name] = _FakeAdapter(config, weights)
        return config

    def save_peft(self, adapter_name: str, directory: Path) -> int:
        self._before_verb("save_peft", (adapter_name,))
        adapter = self.find(adapter_name)
        return export_peft(directory, adapter.weights, adapter.config)

    def adapter_state(self, adapter_name: str) -> dict[str, Any]:
        adapter = self.find(adapter_name)
        arrays = ("weights", "exp_avg", "exp_avg_sq", "grad")
        flat = {name: getattr(adapter, name).reshape(-1).copy() for name in arrays}
        return {**flat, "step": adapter.step}

    def find(self, adapter_name: str) -> _FakeAdapter:
        """The resident adapter of this name, now the most recently used.

        Raises:
            InvalidRequest: It is not resident.
        """
        if adapter_name not in self._adapters:
            raise InvalidRequest(f"No adapter named {adapter_name} is resident.")
        self._adapters[adapter_name] = self._adapters.pop(adapter_name)
        return self._adapters[adapter_name]


def _log_softmax(weights: FloatArray) -> NDArray[np.float64]:
    exact = weights.astype(np.float64)
    peak = exact.max(axis=1, keepdims=True)
    shifted = exact - peak
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _loss_seed(datum: Datum, loss_fn: str) -> NDArray[Any]:
    """Each target's factor: its weight, its advantage, or 1. A custom loss is not run here."""
    inputs = datum.loss_fn_inputs
    ones = np.ones(inputs["target_tokens"].shape)
    return ones if loss_fn == CUSTOM else inputs.get(LOSS_FNS[loss_fn].factor, ones)
