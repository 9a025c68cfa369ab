"""Writes: they turn clients' requests into futures, together with the rows that these need.

None of these functions waits, and none touches the engine: ``training.worker`` executes futures.
Each opens its own transaction. If it writes several rows, a client without an answer may repeat its
request, and finds the rows of the first one.
"""

from training.services.checkpoints import load_weights_submit, save_weights_submit
from training.services.replays import run_fork, run_replay
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
from training.services.upkeep import checkpoint_delete, checkpoints_expire, folders_unnamed

__all__ = [
    "Submission",
    "checkpoint_delete",
    "checkpoints_expire",
    "folders_unnamed",
    "forward_backward_submit",
    "load_weights_submit",
    "optim_step_submit",
    "run_compare_submit",
    "run_create_submit",
    "run_describe",
    "run_fork",
    "run_lora_config",
    "run_remove_submit",
    "run_replay",
    "run_replay_create",
    "run_replay_submit",
    "sample_submit",
    "save_weights_submit",
]
