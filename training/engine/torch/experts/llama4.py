"""Llama 4's experts, which transformers computes in its own way: all experts for all tokens.

There a token's share multiplies the expert's input and not its output. The block is replaced by one
that asks only the chosen experts, through the stack that all families have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe


class Llama4Experts(nn.Module):
    """The block of a layer, with modules of the same names and the same result."""

    def __init__(self, block: Llama4TextMoe) -> None:
        super().__init__()
        self.top_k = block.top_k
        self.hidden_dim = block.hidden_dim
        self.experts = block.experts
        self.router = block.router
        self.shared_expert = block.shared_expert

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) to the outputs (T, H) and the router's logits (T, E)."""
        hidden = hidden.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)  # (T, E), 0 for experts that were not chosen
        shares, chosen = scores.topk(self.top_k, dim=-1)  # (T, k)
        shares = shares.flatten()[:, None]  # (T * k, 1)
        outputs = self.experts(
            hidden.repeat_interleave(self.top_k, dim=0) * shares,
            chosen.flatten()[:, None],
            torch.ones_like(shares),
            rows_per_token=self.top_k,
        ).view(len(hidden), self.top_k, -1)  # (T, k, H)
        return self.shared_expert(hidden) + outputs.sum(1), logits


def ask_chosen_experts(model: nn.Module) -> None:
    """Replace every block of Llama 4; its stacks must be ``LoraExperts``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Llama4TextMoe):
            model.set_submodule(name, Llama4Experts(module))
