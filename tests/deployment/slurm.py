"""The manual's Slurm script in a Slurm of one node on this machine, beside a running server:

    apt-get install slurmctld slurmd munge
    python -m tests.deployment.slurm

As root: it starts munged, slurmctld and slurmd, with folders and ports of their own, and stops
them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import requests

from tests.deployment.proxied import FILES, is_listening, running
from tests.server import ROOT, Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.server.postgres import DATABASE_NAME, EmbeddedPostgres

CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A Slurm of one node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)  # the socket of munge lies in it
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self, stack: ExitStack) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = {"controller": free_port(), "node": free_port()}
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=socket.gethostname(), folder=self.folder, cpus=os.cpu_count(), **ports
            )
        )
        munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munge += [f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"]
        munge += [f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"]
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = self.folder / f"{command[0]}.out"
            stack.enter_context(running(command, log, **self.environment))
            if command[0] == "munged":
                wait_for((self.folder / "munge.socket").exists)
            if command[0] == "slurmctld":
                wait_for(lambda: is_listening(ports["controller"]))
        wait_for(lambda: "idle" in self.says("sinfo", "--noheader", "--format=%T"))

    def says(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment, **environment},
            cwd=self.folder,
            check=False,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip() or done.stderr.strip()

    def state(self, job: str) -> str:
        return self.says("squeue", "--noheader", "--format=%T", "--states=all", f"--jobs={job}")


def live_workers(server: Server) -> int:
    answer = requests.get(f"{server.url}/readyz", timeout=LONG_SECONDS).json()
    return sum(answer["workers"].values())


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        postgres = stack.enter_context(EmbeddedPostgres(folder / "postgres", durable=False))
        database = f"postgresql://postgres@/{DATABASE_NAME}?host={postgres.socket_folder}"
        settings = {
            "DATABASE_URL": database,
            "TINKERAPI_BASE_MODEL": str(make_tiny_model(folder / "tiny")),
            "TINKERAPI_NUM_THREADS": "1",
        }
        server = Server(folder / "server", free_port(), settings)
        server.start()
        stack.callback(server.stop)
        (folder / "slurm").mkdir()
        cluster = Cluster(folder / "slurm")
        cluster.start(stack)

        values = {**settings, "TINKERAPI_DATA_DIR": str(server.data_dir), "PYTHONPATH": str(ROOT)}
        (folder / "environment").write_text(
            "".join(f"{name}={value!r}\n" for name, value in values.items())
        )
        command = Path(sys.executable).with_name("tinkerapi")
        job = cluster.says(
            *("sbatch", "--parsable", "--cpus-per-task=1", "--gres=none"),
            str(FILES / "slurm-worker.sh"),
            WORKER_SETTINGS=str(folder / "environment"),
            WORKER_COMMAND=str(command),
        )
        assert job.isdigit(), job
        wait_for(lambda: live_workers(server) == 2)
        print(f"job {job} is a live worker")
        server.post("/api/v1/add_lora", model_id="m", rank=4)
        server.results(server.submit_steps("m", 4, learning_rate=0.01))
        # What Slurm sends three minutes before the time is over.
        assert not cluster.says("scancel", "--batch", "--signal=TERM", job)
        wait_for(lambda: cluster.state(job) == "COMPLETED")
        assert live_workers(server) == 1
        server.results(server.submit_steps("m", 4, learning_rate=0.01))
        text = "".join(path.read_text() for path in cluster.folder.glob("tinkerapi-worker-*.log"))
        assert text.splitlines()[-1] == "stopped", text
        print("at SIGTERM it left its runs to the other worker, and ended with 0")
    print("slurm-worker.sh: passed")


if __name__ == "__main__":
    main()
