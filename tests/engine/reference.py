"""The same training computed independently: stock transformers and peft, fp32, one datum at a time.

Nothing of the engine is used here but an adapter's flat numbers and the place where each
module's matrices lie in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from training.engine.interface import ForwardBackwardJob
from training.engine.torch.adapters import Adapter
from training.engine.torch.trainer import TorchTrainer
from training.errors import TrainingError
from training.types import Datum, ForwardBackwardOutput


class TinyTrainer(TorchTrainer):
    """A TorchTrainer with what tests want to see and do."""

    def adapter(self, adapter_name: str) -> Adapter:
        return self._adapters[adapter_name]

    def layout_of(self, adapter_name: str):
        return self._adapters[adapter_name].layout

    def set_weights(self, adapter_name: str, flat: NDArray[np.float32]) -> None:
        """Replace an adapter's weights; B starts at zero, which hides half of all mistakes."""
        self._adapters[adapter_name].weights.flat.copy_(torch.from_numpy(flat))

    def randomise(self, adapter_name: str, seed: int = 0) -> None:
        flat = self.adapter_state(adapter_name)["weights"]
        rng = np.random.default_rng(seed)
        self.set_weights(adapter_name, (0.3 * rng.normal(size=flat.shape)).astype(np.float32))

    def scale_grad(self, adapter_name: str, factor: float) -> None:
        self._adapters[adapter_name].grad.flat.mul_(factor)

    def train_one(
        self, adapter_name: str, data: Sequence[Datum], loss_fn: str = "cross_entropy", **kwargs
    ) -> ForwardBackwardOutput:
        """forward_backward of one job that must succeed."""
        job = ForwardBackwardJob(adapter_name=adapter_name, data=data, loss_fn=loss_fn, **kwargs)
        (result,) = self.forward_backward([job])
        if isinstance(result, TrainingError):
            raise result
        return result

    def grad(self, adapter_name: str) -> NDArray[np.float32]:
        return self.adapter_state(adapter_name)["grad"]


class PeftReference:
    """A peft model with the weights of one of our adapters."""

    def __init__(self, folder: Path, engine: TinyTrainer, adapter_name: str) -> None:
        layout = engine.layout_of(adapter_name)
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        config = peft.LoraConfig(
            r=layout.rank, lora_alpha=layout.config.alpha, target_modules=list(layout.places)
        )
        with peft_warnings_ignored():
            self.model = peft.get_peft_model(base, config)
        flat = torch.from_numpy(engine.adapter_state(adapter_name)["weights"])
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name in layout.places:
            module = self.model.base_model.model.get_submodule(name)
            pair = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            with torch.no_grad():
                for parameter, values in zip(pair, layout.pair(flat, name), strict=True):
                    parameter.copy_(values)
            self.pairs[name] = pair
        self._layout = layout

    def logprobs(self, datum: Datum) -> Tensor:
        """(N, K) of the datum's targets, with a backward pass."""
        tokens = torch.from_numpy(datum.model_input.astype(np.int64))[None]
        logits = self.model(input_ids=tokens).logits[0]  # (N, V)
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])
        return logits.log_softmax(-1).gather(1, targets.reshape(len(targets), -1))

    def grad(self) -> NDArray[np.float32]:
        """Accumulated so far, laid out as the adapter's flat buffer is."""
        flat = torch.zeros(self._layout.num_parameters)
        for name, pair in self.pairs.items():
            for ours, parameter in zip(self._layout.pair(flat, name), pair, strict=True):
                ours.copy_(torch.zeros_like(ours) if parameter.grad is None else parameter.grad)
        return flat.numpy()


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """peft asks transformers by a name that is going away, and notes that an adapter on a tied
    head leaves the embedding alone, which is what we want. It looks for the patterns of parameters
    among the modules only, and says that it ignores them, which it does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match any.*")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # it finds out by itself
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")  # likewise
        # In families of experts peft takes layers for experts by their names.
        warnings.filterwarnings("ignore", message=".*no parameter was matched.*")
        warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match.*")
        yield
