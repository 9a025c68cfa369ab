"""Writes: every request of a client becomes a future here, and the rows it needs with it.

None of these functions waits, and none touches the engine: what a future does when its turn
comes is ``training.worker.operations``. Each opens its own transaction; where there are several
rows, the client that gets no answer may repeat its request, and finds what it made the first time.
"""

from training.services.checkpoints import load_weights_submit, save_weights_submit
from training.services.runs import (
    run_compare_submit,
    run_create_submit,
    run_describe,
    run_lora_config,
    run_remove_submit,
    run_replay_create,
    run_replay_submit,
)
from training.services.sampling import sample_submit
from training.services.steps import forward_backward_submit, optim_step_submit
from training.services.submission import Submission
from training.services.upkeep import checkpoint_delete, checkpoints_expire, files_unnamed

__all__ = [
    "Submission",
    "checkpoint_delete",
    "checkpoints_expire",
    "files_unnamed",
    "forward_backward_submit",
    "load_weights_submit",
    "optim_step_submit",
    "run_compare_submit",
    "run_create_submit",
    "run_describe",
    "run_lora_config",
    "run_remove_submit",
    "run_replay_create",
    "run_replay_submit",
    "sample_submit",
    "save_weights_submit",
]
