"""The trainer, and what it shares with the sampler, over torch."""

from training.engine.torch.equal_rows import ask_for_equal_rows

ask_for_equal_rows()
