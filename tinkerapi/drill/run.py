"""One run of a job: a server, its clients, and optionally kills."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinkerapi.drill.clients import CLIENTS, Client, NumberedClient
from tinkerapi.drill.evidence import Evidence, History, collect
from tinkerapi.drill.job import Trainee
from tinkerapi.drill.kills import Kill, Killed, Killer, Say
from tinkerapi.drill.server import DrilledServer
from tinkerapi.drill.transport import Connection, Progress
from training.storage.chosen import storage_at

LOOK_SECONDS = 0.05
ADMIN = "admin"  # the second owner; the first one sends no key


class DrillFailed(Exception):
    """The job did not end, so there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The state that a run left, and its costs."""

    evidence: Evidence
    history: History
    killed: Sequence[Killed]
    seconds: float
    resent: int
    """Requests that were sent again."""
    worst_pause_seconds: float
    """The longest that a client waited for a result."""


def run_job(
    job: Sequence[Trainee],
    *,
    data_dir: Path,
    model_folder: Path,
    environment: Mapping[str, str],
    plan: Sequence[Kill] = (),
    seed: int,
    say: Say = lambda answered, killed: None,
) -> Outcome:
    """Run the job on a fresh server in ``data_dir``, with these kills; stop the server.

    Raises:
        ServerFailed: It did not start.
        DrillFailed: A client gave up, or a kill could not be carried out.
    """
    if "TINKERAPI_CONFIG" not in environment:
        environment = {**environment, "TINKERAPI_BASE_MODEL": str(model_folder)}
    server = DrilledServer(data_dir, environment=environment)
    try:
        server.spawn()
        server.wait_until()
        keys = [{}, {"X-API-Key": server.command("createapikey", ADMIN)}]
        progress = Progress()
        clients = [
            CLIENTS[trainee.style](
                trainee,
                model_folder.name,
                Connection(server.port, keys[trainee.owner], progress),
                progress,
            )
            for trainee in job
        ]
        killer = Killer(server, progress, seed=seed, say=say)
        began = time.monotonic()
        _work(server, clients, killer, plan, progress)
        seconds = time.monotonic() - began
        server.wait_until()
        storage = storage_at(environment.get("TINKERAPI_STORAGE", ""), data_dir)
        evidence, history = collect(data_dir, storage, _answers(clients), _aliases(clients))
    finally:
        server.stop()
    return Outcome(
        evidence=evidence,
        history=history,
        killed=killer.done,
        seconds=seconds,
        resent=progress.resent,
        worst_pause_seconds=progress.worst_seconds,
    )


def _work(
    server: DrilledServer,
    clients: Sequence[Client],
    killer: Killer,
    plan: Sequence[Kill],
    progress: Progress,
) -> None:
    """Run all threads, and restart a killed server, until the clients are done."""
    threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
    killing = threading.Thread(target=killer.run, args=(plan,), daemon=True)
    for thread in [*threads, killing]:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if server.has_ended():
            server.spawn()
        time.sleep(LOOK_SECONDS)
    progress.ends()
    killing.join()
    if server.has_ended():
        server.spawn()
    errors = [client.error for client in clients] + [killer.error]
    if any(errors):
        raise DrillFailed("\n".join(filter(None, errors)))


def _answers(clients: Sequence[Client]) -> dict[str, str]:
    return {name: answer for client in clients for name, answer in client.answers.items()}


def _aliases(clients: Sequence[Client]) -> dict[str, str]:
    """Random model and session ids -> the trainee's name."""
    aliases = {}
    for client in clients:
        if isinstance(client, NumberedClient):
            aliases[client.model_id] = client.trainee.name
            aliases[client.session_id] = client.trainee.name
    return aliases
