"""The official tinker SDK, unmodified: models, steps, order, failures, an end.

Each test is a user's script. The model is tiny, so that the protocol is what takes the time.
"""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.acceptance.lossy_proxy import lossy_proxy
from tests.acceptance.official_sdk import finish_script, run_cli, run_script, start_script
from tests.server import Server

pytestmark = pytest.mark.acceptance


def test_a_model_is_made_described_and_trained(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        """
        capabilities = tinker.RestClient().get_server_capabilities().result()
        report(models=[model.model_name for model in capabilities.supported_models])
        model = new_model(seed=1, user_metadata={"purpose": "test"})
        info = model.get_info()
        report(model_id=info.model_id, name=info.model_data.model_name, rank=info.lora_rank)

        steps = []
        for _ in range(6):  # all sent before the first result is read
            steps.append((
                model.forward_backward([datum([5, 6, 7, 8, 9])], "cross_entropy"),
                model.optim_step(types.AdamParams(learning_rate=1e-2)),
            ))
        losses, counts = [], []
        for loss, step in steps:
            losses.append(loss.result().metrics["loss:sum"])
            counts.append(step.result().metrics["step"])
        report(losses=losses, counts=counts)

        before = model.forward([datum([5, 6, 7, 8, 9])], "cross_entropy").result()
        again = model.forward([datum([5, 6, 7, 8, 9])], "cross_entropy").result()
        logprobs = before.loss_fn_outputs[0]["logprobs"].tolist()
        report(forward=before.metrics["loss:sum"], again=again.metrics["loss:sum"],
               logprobs=logprobs)
        """,
    )

    assert facts["models"] == ["tiny"]
    assert facts["model_id"].endswith(":train:0")
    assert (facts["name"], facts["rank"]) == ("tiny", 8)
    assert facts["counts"] == [1, 2, 3, 4, 5, 6]
    assert facts["losses"] == sorted(facts["losses"], reverse=True)
    assert facts["forward"] == facts["again"] < facts["losses"][-1]
    assert -sum(facts["logprobs"]) == pytest.approx(facts["forward"], rel=1e-5)


def test_three_parallel_chunks_are_one_batch(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        """
        data = [datum([3 + i, 5, 8, 13, 21 + i]) for i in range(5)]
        both = {}
        for name, calls in (("chunked", [data]), ("single", [[item] for item in data])):
            model = new_model(seed=4)
            futures = [model.forward_backward(call, "cross_entropy") for call in calls]
            step = model.optim_step(types.AdamParams(learning_rate=1e-2))
            results = [future.result() for future in futures]
            both[name] = [
                sum(result.metrics["loss:sum"] for result in results),
                step.result().metrics["grad_norm"],
                [output["logprobs"].tolist() for r in results for output in r.loss_fn_outputs],
            ]
        report(**both)
        """,
    )

    assert facts["chunked"][:2] == pytest.approx(facts["single"][:2], rel=1e-4)
    assert len(facts["chunked"][2]) == 5
    for one, other in zip(facts["chunked"][2], facts["single"][2], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_bad_datum_fails_at_once_by_name_and_the_next_batch_works(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        """
        model = new_model()
        good = datum([5, 6, 7, 8])
        begin = time.monotonic()
        report(
            short=failure(model.forward_backward([good, datum([5, 6, 7], [1.0])], "cross_entropy")),
            token=failure(model.forward_backward([datum([5, 10**6, 7])], "cross_entropy")),
            loss=failure(model.forward_backward([good], "stable_reinforce")),
            dimuon=failure(model.optim_step(types.DimuonParams(learning_rate=0.1))),
        )
        report(seconds=time.monotonic() - begin)
        result = model.forward_backward([good], "cross_entropy").result()
        step = model.optim_step(types.AdamParams()).result()
        report(loss_after=result.metrics["loss:sum"], step=step.metrics["step"])
        """,
    )

    for name, sentence in (
        ("short", "data[1].loss_fn_inputs.weights: 1 values for 2 tokens"),
        ("token", "data[0].model_input[1]: "),
        ("loss", "data[0].model_input_spans: missing"),
        ("dimuon", "optimizer_params: this server does not have the optimizer 'dimuon'"),
    ):
        message, category = facts[name]
        assert sentence in message
        assert category.lower().endswith("user")
    assert facts["seconds"] < 100  # one that had to wait would wait for minutes
    assert facts["loss_after"] > 0
    assert facts["step"] == 1


def test_a_custom_loss_in_the_client_is_differentiated_there(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        """
        data = [datum([5, 6, 7, 8]), datum([9, 10, 11])]

        def negative_mean(data, logprobs):
            loss = -sum(item.sum() for item in logprobs)
            return loss, {"largest": max(float(item.detach().max()) for item in logprobs)}

        norms = []
        for custom in (True, False):
            model = new_model(seed=2)
            if custom:
                result = model.forward_backward_custom(data, negative_mean).result()
            else:
                result = model.forward_backward(data, "cross_entropy").result()
            norms.append(model.optim_step(types.AdamParams()).result().metrics["grad_norm"])
            report(**{"custom" if custom else "built_in": result.metrics["loss:sum"]})
        report(norms=norms)
        """,
    )

    # minus the sum of the log-probabilities is cross_entropy with weights of 1
    assert facts["custom"] == pytest.approx(facts["built_in"], rel=1e-5)
    assert facts["norms"][0] == pytest.approx(facts["norms"][1], rel=1e-5)


def test_a_lost_answer_is_asked_for_again_and_nothing_happens_twice(sdk_server: Server) -> None:
    script = """
        model = new_model(seed=6)
        data = [datum([3 + i, 5, 8, 13, 21 + i]) for i in range(3)]
        losses, norms = [], []
        for _ in range(3):
            loss = model.forward_backward(data, "cross_entropy")
            step = model.optim_step(types.AdamParams(learning_rate=1e-3))
            losses.append(loss.result().metrics["loss:sum"])
            norms.append(step.result().metrics["grad_norm"])
        report(losses=losses, norms=norms)
        """
    direct = run_script(sdk_server, script)
    paths = "/api/v1/(?:create_model|forward_backward|optim_step)"
    with lossy_proxy(sdk_server.port, paths=paths) as proxy:
        lossy = run_script(sdk_server, script, TINKER_BASE_URL=f"http://localhost:{proxy.port}")

    assert proxy.lost >= 5
    assert lossy["losses"] == pytest.approx(direct["losses"], rel=1e-4)
    assert lossy["norms"] == pytest.approx(direct["norms"], rel=1e-3)


def test_a_killed_worker_loses_nothing_of_a_pipeline(sdk_server: Server) -> None:
    script = """
        model = new_model(seed=9)
        data = [datum([3 + i, 5, 8, 13, 21 + i]) for i in range(5)]
        steps = [
            (
                model.forward_backward(data, "cross_entropy"),
                model.optim_step(types.AdamParams(learning_rate=1e-3)),
            )
            for _ in range(8)
        ]
        print("sent", flush=True)
        report(
            losses=[loss.result().metrics["loss:sum"] for loss, _ in steps],
            counts=[step.result().metrics["step"] for _, step in steps],
        )
        """
    unbroken = run_script(sdk_server, script)
    process = start_script(sdk_server, script)
    assert process.stdout is not None
    while process.stdout.readline() != "sent\n":
        assert process.poll() is None
    os.kill(sdk_server.worker_pid(), signal.SIGKILL)
    broken = finish_script(process)

    assert broken["counts"] == unbroken["counts"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert broken["losses"] == pytest.approx(unbroken["losses"], rel=1e-4)


def test_the_cli_says_who_one_is_and_what_the_server_has(sdk_server: Server) -> None:
    who = run_cli(sdk_server, "-f", "json", "auth", "whoami")
    models = run_cli(sdk_server, "-f", "json", "model", "list")
    status = run_cli(sdk_server, "auth", "status")

    assert json.loads(who.stdout)["user_urn"] == "tml:user:local", who.stderr
    assert "tiny" in models.stdout, models.stderr
    assert status.returncode == 0, status.stderr


def test_a_wrong_key_is_refused_in_words(sdk_server: Server) -> None:
    who = run_cli(sdk_server, "auth", "whoami", TINKER_API_KEY="tml-wrong")

    assert who.returncode != 0
    assert "unknown, expired or revoked" in who.stderr + who.stdout
