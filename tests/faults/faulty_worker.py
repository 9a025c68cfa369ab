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
from collections.abc import Sequence
from pathlib import Path

import django

from training.engine.fake.engine import fake_engine
from training.engine.fake.sampler import END_TOKEN
from training.engine.fake.trainer import FakeTrainer
from training.engine.interface import ForwardBackwardJob
from training.errors import TrainingError
from training.types import ForwardBackwardOutput


class FaultyTrainer(FakeTrainer):
    def forward_backward(
        self, jobs: Sequence[ForwardBackwardJob]
    ) -> list[ForwardBackwardOutput | TrainingError]:
        note = Path(sys.argv[1]) / "hung"
        for datum in (datum for job in jobs for datum in job.data):
            words = bytes(token for token in datum.model_input.tolist() if token < END_TOKEN)
            if words.startswith(b"user: hang") and not note.exists():
                note.touch()
                threading.Event().wait()
            if words.startswith(b"user: poison"):
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().forward_backward(jobs)


def main() -> None:
    django.setup()
    from training.base_models import base_model_get
    from training.worker.process import run_worker

    run_worker(base_model_get(None), lambda base_model: fake_engine(trainer=FaultyTrainer()))


if __name__ == "__main__":
    main()
