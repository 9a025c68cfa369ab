"""Results as versions before the present form stored them: the quick reference's answers."""

from __future__ import annotations

from typing import Any

import numpy as np

NAN = float("nan")

PASS = {
    "loss": 0.625,
    "num_samples": 3,
    "num_tokens": 6,
    "model_id": "m",
    "backend": "torch-cpu",
    "metrics": {
        "loss:sum": 2.5,
        "num_tokens": 6,
        "num_weighted_tokens": 4,
        "perplexity": 1.868245957432222,
        "not_read/advantages:sum": 1,
        "stable_reinforce:ours": 1,
        "clip_fraction:mean": 0.25,
    },
    "loss_fn_outputs": [
        {"logprobs": np.array([-0.5, -0.25, -1.1], np.float32)},
        {"logprobs": np.array([[-0.1, -2.0], [-0.3, -0.7]], np.float32)},
        {"logprobs": np.array([-0.125], np.float32)},
    ],
}

SEQUENCES = [
    {
        "stop_reason": "length",
        "tokens": np.array([5, 6], np.int32),
        "logprobs": np.array([-0.5, -0.2], np.float32),
        "text": "hi",
    },
    {
        "stop_reason": "stop",
        "tokens": np.array([], np.int32),
        "logprobs": np.array([], np.float32),
        "text": "",
    },
]

SAMPLE = {
    "generated_text": "hi",
    "completions": ["hi", ""],
    "sequences": SEQUENCES,
    "prompt_logprobs": None,
    "model_id": None,
}

WRITTEN = {
    "token_texts": ["h", "\ufffd"],
    "text_offsets": [0, 1],
    "token_bytes": [[104], None],
    "topk_logprobs": {
        "token_ids": np.array([[7, 8], [9, 0]], np.int32),
        "logprobs": np.array([[-0.5, -1.5], [-0.25, -99999]], np.float32),
    },
    "topk_texts": [["a", "b"], ["\ufffd", "d"]],
    "topk_bytes": [[[97], [98]], [[195], [100]]],
}

SCORED_SAMPLE = {
    "generated_text": "hi",
    "completions": ["hi"],
    "sequences": [{**SEQUENCES[0], **WRITTEN}],
    "prompt_logprobs": np.array([NAN, -1.5], np.float32),
    "model_id": "m",
    "topk_prompt_logprobs": {
        "token_ids": np.array([[0], [3]], np.int32),
        "logprobs": np.array([[-99999], [-0.75]], np.float32),
    },
    "target_prompt_logprobs": np.array([[-0.5, 0.0]], np.float32),
    "prompt_alt_tokens": {
        "tokens": np.array([[3]], np.int64),
        "logprobs": np.array([[-0.75]], np.float32),
    },
    "echo": [{"text": "oh", "logprobs": np.array([NAN, -1.5], np.float32), **WRITTEN}],
}

SPARSE_SAMPLE = {
    **SAMPLE,
    "target_prompt_logprobs": {
        "values": np.array([-0.5], np.float32),
        "crow_indices": np.array([0, 1], np.int64),
        "col_indices": np.array([1], np.int64),
        "shape": [1, 2],
    },
}

TWO_PROMPTS = {
    **SAMPLE,
    "prompt_logprobs": [np.array([NAN, -0.5], np.float32), np.array([NAN], np.float32)],
}

TWO_PROMPTS_UNSCORED = {**SAMPLE, "prompt_logprobs": [None, None]}

CREATION = {"model_id": "m", "base_model": "b", "rank": 4, "alpha": 8.0}

FIRST_RESULTS: list[tuple[str, dict[str, Any]]] = [
    ("create_run", CREATION),
    ("create_run", {**CREATION, "path": "tinker://m/weights/a"}),
    ("remove_run", {"status": "deleted", "model_id": "m"}),
    ("forward", PASS),
    ("forward_backward", PASS),
    (
        "optim_step",
        {
            "metrics": {"learning_rate": 1e-4, "grad_norm": 0.5, "step": 3},
            "model_id": "m",
            "backend": "torch-cpu",
        },
    ),
    ("sample", SAMPLE),
    ("sample", SCORED_SAMPLE),
    ("sample", SPARSE_SAMPLE),
    ("sample", TWO_PROMPTS),
    ("sample", TWO_PROMPTS_UNSCORED),
    ("save_weights", {"path": "tinker://m/weights/a", "model_id": "m", "size_bytes": 9}),
    ("save_weights", {"sampling_session_id": "s:sample:1", "model_id": "m"}),
    ("load_weights", {"path": "tinker://m/weights/a", "model_id": "m"}),
    (
        "compare_runs",
        {
            "steps": [3, 3],
            "largest_difference": {"weights": 0.0, "exp_avg": 0.5, "exp_avg_sq": 0, "grad": 0},
            "identical": False,
        },
    ),
    ("create_custom_loss", {"loss_id": "s:loss:1"}),
]
