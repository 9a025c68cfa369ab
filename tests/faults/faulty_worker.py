"""A whole worker process whose engine does on request what engines do at the worst of times.

    python -m tests.faults.faulty_worker FOLDER

A conversation that begins with "hang" makes it hang, once: it leaves a note in FOLDER. One that
begins with "poison" ends the process by a fatal signal, each time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import django

from training.engine.fake.engine import FakeEngine
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum


class FaultyEngine(FakeEngine):
    def render_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        train_on: str,
        options: ChatOptions = NO_CHAT_OPTIONS,
    ) -> Datum:
        words = messages[0]["content"]
        note = Path(sys.argv[1]) / "hung"
        if words.startswith("hang") and not note.exists():
            note.touch()
            threading.Event().wait()
        if words.startswith("poison"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().render_conversation(messages, train_on=train_on, options=options)


def main() -> None:
    django.setup()
    from training.base_models import base_model_get
    from training.worker.process import run_worker

    run_worker(base_model_get(None), lambda base_model: FaultyEngine())


if __name__ == "__main__":
    main()
