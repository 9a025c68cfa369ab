"""Modules and a model, which stay until their process ends, and the garbage collector."""

from __future__ import annotations

import gc


def keep_what_is_loaded() -> None:
    """Let the garbage collector pass over everything that exists now.

    Call it once a process has loaded what it serves with. Among the half a million objects of
    torch and transformers a full collection takes 0.3 s, every few seconds while samples run, and
    everybody waits.
    """
    gc.collect()
    gc.freeze()
