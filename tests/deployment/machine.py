"""The commands of deployment.md, word for word, on a fresh Debian that systemd has started:

    apt-get install debootstrap systemd-container
    python -m tests.deployment.machine

As root; it takes some minutes, 5 GB of disk, and port 8000.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.deployment.debian import ENVIRONMENT, Debian, copy_checkout
from tests.deployment.proxied import is_listening
from tests.waiting import wait_for

PAGE = Path(__file__).resolve().parents[2] / "tinkerapi" / "docs" / "deployment.md"

PORT = 8000

PACKAGES = [
    "systemd",
    "dbus",
    "python3",
    "python3-venv",
    "python3-dev",
    "build-essential",
    "procps",
    "curl",
]

SOURCE = "/src"

TRAIN = """
curl --fail --silent http://localhost:8000/api/v1/forward_backward \\
    -H 'Content-Type: application/json' -d '{"model_id": "m", "loss_fn": "cross_entropy", "data":
    [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}'
"""


def blocks(page: Path) -> list[str]:
    """The page's commands, a block each."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


class Machine:
    """A Debian whose first process is systemd."""

    def __init__(self, debian: Debian) -> None:
        self.debian = debian
        self.leader = 0

    @contextlib.contextmanager
    def booted(self, log: Path) -> Iterator[None]:
        command = ["systemd-nspawn", "--quiet", "--boot", "--keep-unit", "--register=no"]
        with log.open("wb") as output:
            nspawn = subprocess.Popen(
                [*command, "--directory", str(self.debian.folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                self.leader = wait_for(lambda: _init_of(nspawn.pid))
                try:
                    wait_for(self._has_booted)
                except AssertionError as error:
                    jobs = self._done("systemctl is-system-running; systemctl list-jobs")
                    said = log.read_text(errors="replace")[-3000:]
                    raise AssertionError(f"{said}\n{jobs.stdout}{jobs.stderr}") from error
                yield
            finally:
                nspawn.terminate()  # a clean shutdown
                nspawn.wait(300)

    def _has_booted(self) -> bool:
        return self.says("systemctl is-system-running") in ("running", "degraded")

    def command(self, script: str) -> list[str]:
        variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        inside = [
            "nsenter",
            "--target",
            str(self.leader),
            "--all",
            "--wd=" + str(self.debian.inside(SOURCE)),
        ]
        # A shell lets the commands that it starts in the background ignore Ctrl+C.
        env = ["env", "--default-signal=INT", "--ignore-environment", *variables]
        return [*inside, *env, "bash", "-euc", script]

    def says(self, script: str) -> str:
        """What a script prints, whether it succeeds or not."""
        return self._done(script).stdout.strip()

    def run(self, script: str) -> str:
        """What a script prints; it must succeed."""
        done = self._done(script)
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def _done(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def run_until_ready(self, script: str) -> str:
        """What a script prints that starts the server by hand; Ctrl+C after ``ready``."""
        with tempfile.NamedTemporaryFile("w+") as output:
            process = subprocess.Popen(
                self.command(script), stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
            text = Path(output.name)
            wait_for(lambda: "ready after" in text.read_text() or process.poll() is not None, 600)
            lock = json.loads(self.run("cat /var/lib/tinkerapi/up.lock"))
            self.run(f"kill -INT {lock['pid']}")
            process.wait(300)
            assert text.read_text().splitlines()[-1] == "stopped", text.read_text()
            return text.read_text()


def _init_of(nspawn: int) -> int | None:
    """The machine's first process, among those by which nspawn makes it."""
    for child in Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
    return None


def is_up_by_hand(block: str) -> bool:
    return block.rstrip().endswith("tinkerapi up")


def main() -> None:
    assert not is_listening(PORT), f"something listens on port {PORT}"
    install, by_hand, start, commands, upgrade = blocks(PAGE)
    assert is_up_by_hand(by_hand)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        debian = Debian(Path(name) / "debian")
        debian.make()
        copy_checkout(debian.inside(SOURCE))
        with debian.mounted():
            debian.run(["apt-get", "update"])
            debian.run(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES])
            debian.run(["bash", "-euc", install], folder=SOURCE)
            units = ["tinkerapi.service", "tinkerapi-worker.service"]
            for unit in units:
                debian.run(
                    ["systemd-analyze", "verify", f"{SOURCE}/tinkerapi/docs/deployment/{unit}"]
                )
        print("installed; the units are valid")
        machine = Machine(debian)
        with machine.booted(Path(name) / "boot.log"):
            shown = machine.run_until_ready(by_hand)
            assert "api key   tml-" in shown
            print("the server ran by hand, and showed a key")
            machine.run(start)
            check_service(machine)
            assert "tml-" not in machine.says("journalctl --unit tinkerapi --no-pager")
            machine.run(commands)
            assert machine.run("ls /var/lib/tinkerapi-backup/monday").split()
            machine.run(upgrade)
            wait_ready(machine)
            machine.run(TRAIN)
            print("doctor, createapikey, backup and upgrade")
    print("deployment.md: every command ran")


def wait_ready(machine: Machine) -> None:
    wait_for(lambda: machine.says(f"curl --fail --silent http://localhost:{PORT}/readyz"), 300)


def main_pid(machine: Machine) -> str:
    return machine.run("systemctl show --property MainPID --value tinkerapi").strip()


def check_service(machine: Machine) -> None:
    """It trains; a worker killed as the kernel does for memory, and ``up`` killed, are replaced."""
    wait_ready(machine)
    machine.run(TRAIN)
    main_process = main_pid(machine)
    children = machine.run(f"ps -o pid=,args= --ppid {main_process}").splitlines()
    [worker] = [
        line.split()[0] for line in children if " engineworker " in line or "qcluster" in line
    ]
    machine.run(f"kill -KILL {worker}")
    wait_for(lambda: "was ended by SIGKILL" in machine.says("journalctl -u tinkerapi --no-pager"))
    assert machine.says("systemctl is-active tinkerapi") == "active"
    wait_ready(machine)
    machine.run(f"kill -KILL {main_process}")
    wait_for(lambda: machine.says("systemctl show --property NRestarts --value tinkerapi") == "1")
    wait_ready(machine)
    machine.run(TRAIN)
    print("systemd starts the server, and again after a kill")


if __name__ == "__main__":
    main()
