"""The fields of one optimizer step."""

from __future__ import annotations

from tinkerapi.api.fields.field import Number, Object
from training.types import AdamParams

_ADAM = AdamParams()

ADAM_PARAMS = Object(
    description="AdamW, as in torch.optim.AdamW.",
    fields={
        "learning_rate": Number(
            description="Step size.", maximum=1e4, default=_ADAM.learning_rate, example=1e-4
        ),
        "beta1": Number(description="Decay of the mean gradient.", below=1, default=_ADAM.beta1),
        "beta2": Number(
            description="Decay of the mean squared gradient.", below=1, default=_ADAM.beta2
        ),
        "eps": Number(description="Keeps the division finite.", maximum=1e4, default=_ADAM.eps),
        "weight_decay": Number(
            description="Decoupled weight decay.", maximum=1e4, default=_ADAM.weight_decay
        ),
        "grad_clip_norm": Number(
            description="Largest global gradient norm; 0 means no clipping.",
            default=_ADAM.grad_clip_norm,
        ),
    },
)
