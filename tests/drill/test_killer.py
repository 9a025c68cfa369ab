"""The killer leaves a request enough lives to be answered in."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from tinkerapi.drill.kills import MOST_IN_A_ROW, Kill, Killer
from tinkerapi.drill.server import DrilledServer
from tinkerapi.drill.transport import Progress
from tinkerapi.server.up_process import Process


def test_so_many_kills_in_a_row_and_the_next_after_an_answer(tmp_path: Path) -> None:
    deaths = threading.Semaphore(0)
    up = SimpleNamespace(pid=1)
    part = cast(Process, SimpleNamespace(pid=2, parent=up.pid, command="a part"))
    server = SimpleNamespace(
        data_dir=tmp_path, process=up, processes=lambda: [part], kill=deaths.release
    )
    progress = Progress()
    killer = Killer(
        cast(DrilledServer, server), progress, seed=0, say=lambda answered, killed: None
    )
    kill = Kill(target="everything", moment="anytime", after_answers=0, delay_seconds=0)
    thread = threading.Thread(target=killer.run, args=([kill] * (2 * MOST_IN_A_ROW + 1),))
    thread.start()
    for _ in range(MOST_IN_A_ROW):
        assert deaths.acquire(timeout=10)
    assert not deaths.acquire(timeout=0.3)
    progress.answers(1.0)
    for _ in range(MOST_IN_A_ROW):
        assert deaths.acquire(timeout=10)
    assert not deaths.acquire(timeout=0.3)
    progress.answers(1.0)
    assert deaths.acquire(timeout=10)
    thread.join(timeout=10)
    assert killer.error == ""
    assert len(killer.done) == 2 * MOST_IN_A_ROW + 1
