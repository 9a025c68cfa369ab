"""The test vectors of ``tinkerapi/docs/losses.md`` equal the loss functions' results.

They were made from the formulas with numpy, not with these functions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.engine.torch.losses import LOSSES, LossInputs
from training.loss_fns import LOSS_FNS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = (ROOT / "tinkerapi" / "docs" / "losses.md").read_text()
VECTORS = DOCUMENT.partition("## Test vectors")[2]
CONFIG = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "beta": 0.05, "kl_coeff": 0.05}


def cells(label):
    """The numbers of the table row that begins with ``label``."""
    (row,) = [line for line in VECTORS.splitlines() if line.startswith(f"| {label} |")]
    return np.array([float(cell) for cell in row.strip("|").split("|")[1:]])


INPUTS = {
    "logprobs": "`logprobs` (`q`)",
    "advantages": "`advantages` (`A`)",
    "weights": "`weights` (`w`)",
    "sequence_ratio_mask": "`sequence_ratio_mask`",
}


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_loss_computes_its_test_vector(loss_fn):
    lp = torch.tensor(cells("`lp`"), requires_grad=True)
    inputs = {
        name: torch.tensor(cells(INPUTS[name]) if name in INPUTS else np.full(4, CONFIG[name]))
        for name in LOSS_FNS[loss_fn].float_inputs
    }
    loss = LOSSES[loss_fn](LossInputs(target_logprobs=lp, inputs=inputs, config=CONFIG))
    (grad,) = torch.autograd.grad(loss.sum(), lp)
    for label, values in (("loss", loss.detach()), ("derivative", grad)):
        expected = cells(f"`{loss_fn}` {label}")
        np.testing.assert_allclose([*values, values.sum()], expected, rtol=1e-5)


@pytest.mark.parametrize("loss_fn", LOSS_FNS)
def test_a_losss_inputs_and_settings_are_documented(loss_fn):
    (row,) = [
        line
        for line in DOCUMENT.splitlines()
        if line.startswith(f"| `{loss_fn}` |") and line.count("|") == 5
    ]
    spec = LOSS_FNS[loss_fn]
    for name in spec.inputs:
        assert name == "target_tokens" or f"`{name}`" in row
    for name, setting in spec.config.items():
        assert f"`{name}`" in row
        assert setting.default is None or f"({setting.default})" in row
    assert ("required" in row) == any(s.default is None for s in spec.config.values())
