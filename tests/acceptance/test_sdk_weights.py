"""The official SDK and its command line on checkpoints: kept, loaded, published, downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.acceptance.official_sdk import api_key, run_cli, run_script
from tests.server import Server
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.acceptance

TOKENS = [5, 6, 7, 8, 9, 40, 41]

_TRAIN = """
    import numpy as np

    TOKENS = [5, 6, 7, 8, 9, 40, 41]

    def train(model, steps):
        losses = []
        for _ in range(steps):
            loss = model.forward_backward([datum(TOKENS)], "cross_entropy")
            model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            losses.append(loss.result().metrics["loss:sum"])
        return losses

    def logprobs(model):
        output = model.forward([datum(TOKENS)], "cross_entropy").result()
        return output.loss_fn_outputs[0]["logprobs"].tolist()
"""


def cli(server: Server, *arguments: str, cwd: Path | None = None) -> Any:
    """The command's answer as JSON, None if it gave none."""
    done = run_cli(server, "-f", "json", *arguments)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return json.loads(done.stdout) if done.stdout.strip() else None


def peft_logprobs(server: Server, adapter: Path) -> list[float]:
    """The log-probabilities of TOKENS by stock transformers and peft, from the adapter's files."""
    folder = server.environment["TINKERAPI_BASE_MODEL"]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter))
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        logprobs = model(tokens[:, :-1]).logits.log_softmax(-1)
    return logprobs.gather(-1, tokens[:, 1:, None])[0, :, 0].tolist()


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        _TRAIN
        + """
    model = new_model(seed=1)
    train(model, 3)
    path = model.save_state("middle", ttl_seconds=7200, user_metadata={"k": "v"}).result().path
    unbroken = train(model, 3)

    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    report(path=path, unbroken=unbroken, resumed=train(resumed, 3),
           resumed_id=resumed.get_info().model_id, rank=resumed.get_info().lora_rank)

    fresh = service.create_training_client_from_state(path, user_metadata={"a": "b"}).result()
    report(fresh=train(fresh, 3))

    model.load_state_with_optimizer(path).result()
    report(loaded=train(model, 3))

    try:
        model.save_state("middle").result()
    except tinker.RequestFailedError as error:
        report(taken=[str(error), str(error.category)])
    replaced = model.save_state("middle", overwrite=True).result().path
    report(replaced=replaced)
    try:
        service.create_training_client_from_state("tinker://nobody/weights/x").result()
    except tinker.NotFoundError as error:
        report(missing=str(error))
        """,
    )

    assert facts["path"].endswith("/weights/middle")
    assert facts["resumed"] == facts["unbroken"] == facts["loaded"]
    assert facts["fresh"][0] == facts["unbroken"][0]  # the same weights
    assert facts["fresh"][2] != facts["unbroken"][2]  # another optimizer
    assert facts["resumed_id"].endswith(":train:1")
    assert facts["rank"] == 8
    assert "overwrite" in facts["taken"][0]
    assert facts["replaced"] == facts["path"]
    assert "tinker://nobody/weights/x" in facts["missing"]


@pytest.fixture(scope="module")
def kept(sdk_server: Server) -> dict[str, Any]:
    """A trained model's checkpoints ``weights/final`` and ``external_weights/final``, and what
    the server computes with it."""
    return run_script(
        sdk_server,
        _TRAIN
        + """
    model = new_model(seed=2, user_metadata={"purpose": "command line"})
    train(model, 5)
    training = model.save_state("final").result().path
    external = model.save_weights_external("final").result()
    report(model_id=model.get_info().model_id, training=training, external=external.path,
           logprobs=logprobs(model))
        """,
    )


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_downloaded_files_load_in_stock_peft_and_compute_the_same(
    sdk_server: Server, kept: dict[str, Any], tmp_path: Path
) -> None:
    for kind in ("external", "training"):
        cli(sdk_server, "checkpoint", "download", kept[kind], "--output", str(tmp_path / kind))
        [folder] = (tmp_path / kind).iterdir()
        assert peft_logprobs(sdk_server, folder) == pytest.approx(kept["logprobs"], rel=1e-4)
        files = {path.name for path in folder.iterdir()}
        assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_is_imported_and_the_sdk_trains_on_and_samples_from_it(
    sdk_server: Server, kept: dict[str, Any], tmp_path: Path
) -> None:
    """An export is what an adapter that was trained elsewhere looks like."""
    cli(sdk_server, "checkpoint", "download", kept["external"], "--output", str(tmp_path))
    [folder] = tmp_path.iterdir()
    with (
        (folder / "adapter_config.json").open("rb") as config,
        (folder / "adapter_model.safetensors").open("rb") as weights,
    ):
        answer = requests.post(
            f"{sdk_server.url}/api/v1/import_adapter",
            headers={"X-API-Key": api_key(sdk_server)},
            data={"model_id": "elsewhere"},
            files={"adapter_config": config, "adapter_model": weights},
            timeout=LONG_SECONDS,
        )
    assert answer.status_code == 200, answer.text
    assert answer.json()["path"] == "tinker://elsewhere/weights/imported"
    facts = run_script(
        sdk_server,
        _TRAIN
        + """
    path = "tinker://elsewhere/weights/imported"
    model = service.create_training_client_from_state_with_optimizer(path).result()
    report(logprobs=logprobs(model), losses=train(model, 3))
    sampler = service.create_sampling_client(model_path=path)
    prompt = types.ModelInput.from_ints(TOKENS[:3])
    params = types.SamplingParams(max_tokens=2, temperature=0.0)
    report(sampled=sampler.sample(prompt, 1, params).result().sequences[0].tokens)
        """,
    )
    assert facts["logprobs"] == kept["logprobs"]
    assert facts["losses"][0] == pytest.approx(-sum(kept["logprobs"]))
    assert len(set(facts["losses"])) == 3
    assert len(facts["sampled"]) == 2


def test_runs_and_checkpoints_are_listed_and_described(
    sdk_server: Server, kept: dict[str, Any]
) -> None:
    runs = cli(sdk_server, "run", "list")["runs"]
    run = cli(sdk_server, "run", "info", kept["model_id"])
    of_run = cli(sdk_server, "checkpoint", "list", "--run-id", kept["model_id"])["checkpoints"]
    everything = cli(sdk_server, "checkpoint", "list")["checkpoints"]
    info = cli(sdk_server, "checkpoint", "info", kept["training"])

    assert kept["model_id"] in [item["training_run_id"] for item in runs]
    assert (run["base_model"], run["lora_rank"]) == ("tiny", 8)
    paths = {kept["training"], kept["external"]}
    assert paths <= {item["tinker_path"] for item in of_run}
    assert paths <= {item["tinker_path"] for item in everything}
    assert info["tinker_path"] == kept["training"]


def test_a_checkpoint_is_published_given_a_time_and_deleted(
    sdk_server: Server, kept: dict[str, Any]
) -> None:
    path = run_script(
        sdk_server,
        """
    rest = service.create_rest_client()
    model = new_model()
    path = model.save_state("passing").result().path
    rest.publish_checkpoint_from_tinker_path(path).result()
    report(path=path)
        """,
    )["path"]

    def described() -> Any:
        return cli(sdk_server, "checkpoint", "info", path)

    assert described()["public"] is True
    cli(sdk_server, "checkpoint", "publish", path)  # a repeat is no error
    cli(sdk_server, "checkpoint", "unpublish", path)
    assert described()["public"] is False
    cli(sdk_server, "checkpoint", "set-ttl", path, "--ttl", "7200")
    expires = datetime.fromisoformat(described()["expires_at"])
    assert timedelta(minutes=100) < expires - datetime.now(UTC) <= timedelta(hours=2)
    cli(sdk_server, "checkpoint", "set-ttl", path, "--remove")
    assert described()["expires_at"] is None
    cli(sdk_server, "checkpoint", "delete", path, "--yes")
    gone = run_cli(sdk_server, "-f", "json", "checkpoint", "info", path)
    assert gone.returncode != 0


def test_a_sessions_trace_is_exported(
    sdk_server: Server, kept: dict[str, Any], tmp_path: Path
) -> None:
    session_id = kept["model_id"].partition(":")[0]
    target = tmp_path / "trace.json"
    cli(sdk_server, "session", "export-trace", session_id, "--output", str(target))

    events = json.loads(target.read_text())["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    assert [bar["name"] for bar in bars].count("optim_step") == 5
    spans = [event for event in events if event.get("cat") == "batch" and event["ph"] == "b"]
    assert {bar["args"]["batch"] for bar in bars} == {span["args"]["batch"] for span in spans}
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert kept["model_id"] in rows
    assert any(name.startswith("worker ") for name in rows)


def colleague_key(server: Server) -> str:
    """A key of the server's other user, its administrator."""
    done = subprocess.run(
        [sys.executable, "manage.py", "createapikey", "admin"],
        cwd=server.root,
        env=server.full_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_colleague_borrows_copies_and_reads_what_is_public(
    sdk_server: Server, kept: dict[str, Any]
) -> None:
    facts = run_script(
        sdk_server,
        _TRAIN
        + """
    rest = service.create_rest_client()
    path, lender = os.environ["KEPT"], os.environ["LENDER"]

    def missing(call):
        try:
            call().result()
        except tinker.NotFoundError:
            return True

    report(closed=missing(lambda: rest.get_weights_info_by_tinker_path(path)))
    borrowed = service.create_training_client_from_state(
        path, weights_access_token=lender
    ).result()
    copy = rest.copy_weights(path, "shared", weights_access_token=lender).result()
    copied = service.create_training_client_from_state(copy).result()
    report(borrowed=logprobs(borrowed), copied=logprobs(copied), copy=copy)

    owner = tinker.ServiceClient(api_key=lender)
    own_rest = owner.create_rest_client()
    own_rest.publish_checkpoint_from_tinker_path(path).result()
    info = rest.get_weights_info_by_tinker_path(path).result()
    report(rank=info.lora_rank, delete=missing(
        lambda: rest.delete_checkpoint_from_tinker_path(path)
    ))
    own_rest.unpublish_checkpoint_from_tinker_path(path).result()
    report(closed_again=missing(lambda: rest.get_weights_info_by_tinker_path(path)))
    log = tinker.AdminClient(api_key=lender).get_audit_log("checkpoints").result()
    report(log=[entry.event for entry in log.entries if entry.tinker_path == path])
        """,
        TINKER_API_KEY=colleague_key(sdk_server),
        KEPT=kept["training"],
        LENDER=api_key(sdk_server),
    )

    assert facts["closed"] is facts["delete"] is facts["closed_again"] is True
    assert facts["borrowed"] == facts["copied"] == kept["logprobs"]
    assert facts["copy"] != kept["training"]
    assert facts["rank"] == 8
    assert facts["log"] == [
        "checkpoint_read",
        "checkpoint_copy",
        "checkpoint_publish",
        "checkpoint_unpublish",
    ]


def test_saved_weights_are_sampled_from_while_training_goes_on(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        _TRAIN
        + """
    model = new_model(seed=3)
    train(model, 3)
    now = logprobs(model)
    path = model.save_weights_for_sampler("three").result().path
    ephemeral = model.save_weights_and_get_sampling_client()
    train(model, 3)
    named = service.create_sampling_client(model_path=path)
    prompt = types.ModelInput.from_ints(TOKENS)
    report(path=path, now=now,
           named=named.compute_logprobs(prompt).result(),
           ephemeral=ephemeral.compute_logprobs(prompt).result())

    rest = service.create_rest_client()
    model_id = model.get_info().model_id
    listed = rest.list_checkpoints(model_id).result().checkpoints
    session = rest.get_session(model_id.partition(":")[0]).result()
    report(listed=[item.checkpoint_id for item in listed], runs=session.training_run_ids,
           samplers=len(session.sampler_ids), model_id=model_id)
        """,
    )

    assert facts["path"].endswith("/sampler_weights/three")
    for kind in ("named", "ephemeral"):
        assert facts[kind][0] is None
        assert facts[kind][1:] == pytest.approx(facts["now"], rel=1e-4)
    assert facts["listed"] == ["sampler_weights/three"]
    assert facts["runs"] == [facts["model_id"]]
    assert facts["samplers"] == 2


def test_usage_and_storage_are_told_on_the_command_line(
    sdk_server: Server, kept: dict[str, Any]
) -> None:
    session_id = kept["model_id"].partition(":")[0]
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = [hour - timedelta(hours=1), hour + timedelta(hours=1)]
    usage = cli(
        sdk_server, "billing", "usage", *(f"{moment:%Y-%m-%dT%H:%M:%SZ}" for moment in window)
    )
    storage = cli(sdk_server, "billing", "checkpoint-storage")

    assert session_id in json.dumps(usage)
    assert "checkpoint_count" in json.dumps(storage)
