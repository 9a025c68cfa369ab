"""``manage.py crashdrill``: test that crashes lose nothing and change no bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from tinkerapi.drill.evidence import differences, incomplete
from tinkerapi.drill.job import Trainee, make_job, num_failures, num_requests
from tinkerapi.drill.kills import TARGETS, TARGETS_WITH_VLLM, Killed, plan_kills
from tinkerapi.drill.model import ADAPTER_CACHE_BYTES, make_tiny_model
from tinkerapi.drill.report import DrillReport
from tinkerapi.drill.run import DrillFailed, Outcome, run_job
from tinkerapi.server.up_process import ServerFailed
from training.base_model_config import MOST_WORKERS

ENVIRONMENT = {
    "DATABASE_URL": "",  # only the embedded Postgres is ours to kill
    "TINKERAPI_SNAPSHOT_SECONDS": "0",  # as often as their cost allows, so that kills meet them
}
"""Settings of the drilled servers; all others have their defaults."""
RANKS = ("tp_size", "fsdp_size", "ep_size")
"""Sizes of a worker over several devices."""
IN_TABLE = ("DEVICE", "DTYPE", "LAYOUT")
"""Settings that a configuration file replaces."""
SHOWN_DIFFERENCES = 20

VLLM = """
sampler = "vllm"

[base_model.vllm]
python = {python}
max_lora_rank = 64
wait_seconds = 3600
"""
"""Requests wait for it however long it takes: the built-in sampler would sample other tokens."""


class Command(BaseCommand):
    help = (
        "Train several adapters over HTTP twice, on separate servers in a scratch folder: once "
        "undisturbed, once with SIGKILLs to worker, web, Postgres and everything. Then compare "
        "every answer, every future and every checkpoint, byte by byte. Exits with 1 if anything "
        "differs. A running server of yours is not affected."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--kills", type=int, default=20, help="how many (default %(default)s)")
        parser.add_argument("--seed", type=int, default=0, help="seed of job and kills (default 0)")
        parser.add_argument(
            "--steps", type=int, help="optimizer steps of each adapter (default: kills + 8)"
        )
        parser.add_argument(
            "--adapters", type=int, default=6, help="trained side by side (default %(default)s)"
        )
        parser.add_argument(
            "--workers", type=int, default=1, help="of the base model (default %(default)s)"
        )
        for name in RANKS:
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=int,
                default=1,
                help="of a worker over several devices; then --workers must be 1 (default 1)",
            )
        parser.add_argument(
            "--vllm-python",
            type=Path,
            help="sample with a vLLM server that this Python starts, and kill it too",
        )
        parser.add_argument(
            "--model-folder", type=Path, help="base model; default: a tiny one made for the drill"
        )
        parser.add_argument(
            "--storage",
            default="",
            metavar="s3://BUCKET/PREFIX",
            help="keep the files of the killed server there; the undisturbed one has a data folder",
        )
        parser.add_argument("--json", type=Path, help="write the table to this file too")
        parser.add_argument(
            "--keep", action="store_true", help="keep the scratch folder with data and logs"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["kills"] < 0 or options["adapters"] < 1:
            raise CommandError("expected at least 0 --kills and 1 of --adapters")
        if not 1 <= options["workers"] <= MOST_WORKERS:
            raise CommandError(f"--workers: expected 1 to {MOST_WORKERS}")
        if options["workers"] > 1 and any(options[name] > 1 for name in RANKS):
            raise CommandError("--workers: expected 1 beside --tp-size or --fsdp-size")
        if options["vllm_python"] and any(options[name] > 1 for name in RANKS):
            raise CommandError("--vllm-python: expected no --tp-size, --fsdp-size or --ep-size")
        steps = options["kills"] + 8 if options["steps"] is None else options["steps"]
        self._environment = dict(ENVIRONMENT)
        scratch = Path(tempfile.mkdtemp(prefix="tinkerapi-drill-"))
        keep = options["keep"]
        try:
            report = self._drill(scratch, steps, options)
            keep = keep or not report.is_good
        except (DrillFailed, ServerFailed) as error:
            keep = True
            raise CommandError(str(error)) from error
        finally:
            if keep:
                self.stdout.write(f"data and logs: {scratch}")
            else:
                shutil.rmtree(scratch, ignore_errors=True)
        for name, value in report.rows():
            self.stdout.write(f"{name:<50}{value}")
        for sentence in report.differences[:SHOWN_DIFFERENCES]:
            self.stderr.write(sentence)
        if options["json"]:
            options["json"].write_text(json.dumps(report.to_json(), indent=2) + "\n")
        if not report.is_good:
            raise CommandError("the runs differ, or not every kill was carried out")
        self.stdout.write(self.style.SUCCESS("no difference"))

    def _drill(self, scratch: Path, steps: int, options: dict[str, Any]) -> DrillReport:
        seed = options["seed"]
        folder = options["model_folder"]
        if folder is None:
            folder = make_tiny_model(scratch / "tiny", seed=seed)
            self._environment["TINKERAPI_ADAPTER_CACHE_BYTES"] = str(ADAPTER_CACHE_BYTES)
        if options["vllm_python"] or any(options[name] > 1 for name in RANKS):
            config = scratch / "models.toml"
            config.write_text(_table(folder, self._environment, options))
            self._environment = {
                "TINKERAPI_CONFIG": str(config),
                **{name: value for name, value in self._environment.items() if name in ENVIRONMENT},
                **dict.fromkeys((f"TINKERAPI_{name}" for name in IN_TABLE), ""),
            }
        job = make_job(seed=seed, steps=steps, trainees=options["adapters"])
        shares = TARGETS_WITH_VLLM if options["vllm_python"] else TARGETS
        plan = plan_kills(
            seed=seed, kills=options["kills"], requests=num_requests(job), shares=shares
        )
        self._kills = len(plan)
        self._requests = num_requests(job)
        self.stdout.write(f"{self._requests} requests of {len(job)} adapters, unbroken ...")
        unbroken = self._run(scratch / "unbroken", folder, job, seed=seed)
        # One undisturbed worker is the measure of several.
        if options["workers"] > 1:
            self._environment["TINKERAPI_WORKERS"] = str(options["workers"])
        if options["storage"]:
            self._environment["TINKERAPI_STORAGE"] = options["storage"]
        self.stdout.write(f"took {unbroken.seconds:.1f} s; the same with {len(plan)} kills ...")
        self._count = 0
        broken = self._run(scratch / "broken", folder, job, seed=seed, plan=plan, say=self._say)
        return DrillReport(
            unbroken=unbroken,
            broken=broken,
            plan=plan,
            differences=[
                *incomplete(unbroken.evidence, requests=self._requests, failures=num_failures(job)),
                *differences(unbroken.evidence, broken.evidence),
            ],
            replays=_replays(scratch / "broken"),
            settings={
                "seed": seed,
                "steps": steps,
                "adapters": options["adapters"],
                "workers": options["workers"],
                **{name: options[name] for name in RANKS},
                "storage": "a bucket" if options["storage"] else "the data folder",
                "sampler": "vLLM" if options["vllm_python"] else "built in",
                "model": folder.name,
            },
        )

    def _run(self, data_dir: Path, folder: Path, job: list[Trainee], **more: Any) -> Outcome:
        return run_job(
            job, data_dir=data_dir, model_folder=folder, environment=self._environment, **more
        )

    def _say(self, answered: int, killed: Killed) -> None:
        self._count += 1
        moment = killed.kill.moment if killed.aimed else "anytime"
        self.stdout.write(
            f"{self._count:4} of {self._kills}: {killed.kill.target} ({moment}), "
            f"{answered} of {self._requests} answers"
        )
        self.stdout.flush()


def _table(folder: Path, environment: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """The configuration file of a worker over several devices, or with a vLLM server."""
    lines = ["[[base_model]]", f"path = {json.dumps(str(folder.resolve()))}"]
    lines += [f"{name} = {options[name]}" for name in RANKS]
    if cache_bytes := environment.get("TINKERAPI_ADAPTER_CACHE_BYTES"):
        lines.append(f"cache_bytes = {cache_bytes}")
    for name in IN_TABLE:
        if value := os.environ.get(f"TINKERAPI_{name}"):
            lines.append(f"{name.lower()} = {json.dumps(value)}")
    if options["vllm_python"]:
        # The path as it is: the Python of an environment is a link.
        lines.append(VLLM.format(python=json.dumps(str(options["vllm_python"].absolute()))))
    return "\n".join(lines) + "\n"


def _replays(data_dir: Path) -> int:
    """The number of replays in the workers' logs."""
    logs = (data_dir / "logs").glob("engine-*")
    return sum(len(re.findall(r": replaying \d+ requests", log.read_text())) for log in logs)
