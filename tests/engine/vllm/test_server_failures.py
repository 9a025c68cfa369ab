"""A server that dies, answers wrongly, or is not what it should be; none of it reaches a client."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.contract.conftest import step
from tests.engine.sampling_jobs import job
from tests.engine.vllm.double import BASE, VllmDouble
from tests.engine.vllm.engines import announce, engine_with_server
from tests.waiting import wait_for
from training.engine.factory import engine_over
from training.engine.interface import Engine, SampleJob, SampleOutput, Sampler
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.types import LoraConfig

FIFTY = {f"job {number}": job(seed=number, max_tokens=30) for number in range(50)}


def finish(sampler: Sampler) -> dict[str, list[tuple[list[int], str]]]:
    """Poll until no job is active; each is returned once."""
    found: dict[str, list[tuple[list[int], str]]] = {}
    while sampler.active:
        for key, result in sampler.poll(60).items():
            assert isinstance(result, SampleOutput), result
            assert key not in found
            found[key] = [(each.tokens, each.text) for each in result.sequences]
    return found


def run_all(sampler: Sampler, jobs: dict[str, SampleJob]) -> dict[str, Any]:
    for key, each in jobs.items():
        sampler.submit(key, each)
    return finish(sampler)


def sample(sampler: Sampler, one: SampleJob) -> Any:
    return run_all(sampler, {"one": one})["one"]


def state(engine: Engine) -> str:
    return str(engine.sampler.figures()["vllm"]["state"])


def here(engine: Engine) -> dict[str, int]:
    """How many jobs the built-in sampler took, by reason."""
    found: dict[str, int] = engine.sampler.figures()["vllm"]["sampled_here"]
    return found


# -- death -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill", "die"])
def test_jobs_in_flight_when_the_server_dies_are_answered_once_after_its_restart(
    engine_of_server: Engine, server: VllmDouble, tmp_path: Path, fault: str
) -> None:
    sampler = engine_of_server.sampler
    sampler.publish("v", engine_of_server.trainer.capture_adapter("a"))
    jobs = {
        key: each if number % 2 else job(version="v", seed=number, max_tokens=30)
        for number, (key, each) in enumerate(FIFTY.items())
    }
    expected = run_all(sampler, jobs)
    for key, each in jobs.items():
        sampler.submit(key, each)
    found = {}
    while len(found) < 10:
        found |= {
            key: [(s.tokens, s.text) for s in result.sequences]
            for key, result in sampler.poll(60).items()
            if isinstance(result, SampleOutput)
        }
    server.hold.clear()
    getattr(server, fault)()
    wait_for(lambda: state(engine_of_server).startswith("lost"))
    server.hold.set()
    server.restart()
    announce(server, tmp_path / "server")
    later = finish(sampler)

    assert not found.keys() & later.keys()
    assert found | later == expected
    assert not here(engine_of_server)
    assert engine_of_server.sampler.figures()["vllm"]["life"] == 2


def test_a_stream_that_breaks_begins_again_and_tells_no_text_twice(
    engine_of_server: Engine, server: VllmDouble, tmp_path: Path
) -> None:
    sampler = engine_of_server.sampler
    followed = SampleJob(**{**job(max_tokens=60).__dict__, "is_followed": True})
    expected = sample(sampler, followed)
    sampler.submit("one", followed)
    told = wait_for(lambda: sampler.progress("one")[0])
    server.hold.clear()
    server.die()
    wait_for(lambda: state(engine_of_server).startswith("lost"))
    assert sampler.progress("one")[0].startswith(told)
    server.hold.set()
    server.restart()
    announce(server, tmp_path / "server")
    texts = [told]
    while not (finished := sampler.poll(0.01)):
        texts.append(sampler.progress("one")[0])

    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    output = finished["one"]
    assert isinstance(output, SampleOutput)
    assert [(s.tokens, s.text) for s in output.sequences] == expected


def test_a_server_that_was_restarted_gets_the_published_versions_again(
    engine_of_server: Engine, server: VllmDouble, tmp_path: Path
) -> None:
    sampler = engine_of_server.sampler
    sampler.publish("v", engine_of_server.trainer.capture_adapter("a"))
    expected = sample(sampler, job(version="v"))
    assert expected != sample(sampler, job())
    server.restart()
    announce(server, tmp_path / "server")
    assert sample(sampler, job(version="v")) == expected
    assert not here(engine_of_server)


def test_a_server_that_stays_away_is_not_waited_for_for_ever(
    make_engine_of: Callable[..., Engine],
    built_in: Engine,
    server: VllmDouble,
) -> None:
    server.kill()
    engine = make_engine_of(wait_seconds=1)
    assert sample(engine.sampler, job()) == sample(built_in.sampler, job())
    assert here(engine) == {"not answered by the server": 1}


def test_a_job_that_kills_the_server_each_time_is_answered_here_and_delays_the_others_only(
    engine_of_server: Engine, built_in: Engine, server: VllmDouble, tmp_path: Path
) -> None:
    poison = job([9] * 7)
    expected = sample(built_in.sampler, poison)
    sample(engine_of_server.sampler, job())
    kills = []

    def change(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if body["token_ids"] == [9] * 7:
            kills.append(body["request_id"])
            return {"choices": [{"finish_reason": "error"}], "model": BASE}
        return answer

    server.change = change
    assert sample(engine_of_server.sampler, poison) == expected
    assert len(kills) == 3


# -- wrong answers ---------------------------------------------------------------------------------


def wrong_model(answer: dict[str, Any]) -> None:
    answer["model"] = "another"


def no_model(answer: dict[str, Any]) -> None:
    del answer["model"]


def other_token(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"][-1] ^= 1


def fewer_tokens(answer: dict[str, Any]) -> None:
    choice = answer["choices"][0]
    choice["token_ids"].pop()
    choice["logprobs"]["content"].pop()


def no_choice(answer: dict[str, Any]) -> None:
    answer["choices"] = []


def no_logprobs(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"] = None


@pytest.mark.parametrize(
    "spoil", [wrong_model, no_model, other_token, fewer_tokens, no_choice, no_logprobs]
)
def test_an_answer_that_is_not_of_the_request_reaches_nobody(
    engine_of_server: Engine,
    built_in: Engine,
    server: VllmDouble,
    spoil: Callable[[dict[str, Any]], None],
) -> None:
    def change(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if body["token_ids"] == [7, 8, 9]:
            spoil(answer)
        return answer

    server.change = change
    asked = job([7, 8, 9])
    assert sample(engine_of_server.sampler, asked) == sample(built_in.sampler, asked)
    assert here(engine_of_server) == {"not answered by the server": 1}


def test_a_log_probability_that_was_not_finite_fails_the_job(
    engine_of_server: Engine, server: VllmDouble
) -> None:
    def change(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if body["token_ids"] == [7, 8, 9]:
            answer["choices"][0]["logprobs"]["content"][2]["logprob"] = -9999.0
        return answer

    server.change = change
    sampler = engine_of_server.sampler
    sampler.submit("one", job([7, 8, 9]))
    results: dict[str, Any] = {}
    while sampler.active:
        results |= sampler.poll(60)
    assert type(results["one"]).__name__ == "NonFiniteResult"


# -- the check -------------------------------------------------------------------------------------


def test_a_server_of_other_weights_gets_no_job(
    tied_base_model: BaseModel, untied_folder: Path, tmp_path: Path, built_in: Engine
) -> None:
    other = VllmDouble(load_base_model(str(untied_folder), dtype="float32", device="cpu"))
    engine = engine_with_server(tied_base_model, other, tmp_path / "server")
    try:
        asked = job([7, 8, 9])
        assert sample(engine.sampler, asked) == sample(built_in.sampler, asked)
        assert "the base model differs from ours" in state(engine)
        assert [7, 8, 9] not in [body["token_ids"] for body in other.requests]
    finally:
        engine.sampler.close()
        other.close()


@pytest.mark.parametrize("version", [None, "v"])
def test_another_server_that_takes_the_address_is_checked_before_its_first_answer(
    make_engine_of: Callable[..., Engine],
    built_in: Engine,
    server: VllmDouble,
    untied_folder: Path,
    tmp_path: Path,
    version: str | None,
) -> None:
    """As behind a load balancer: no connection breaks, and the health route always answers."""
    connection, key_file = server.connection, tmp_path / "key"
    assert connection is not None
    key_file.write_text(connection.key)
    engine = make_engine_of(python="", address=connection.address, key_file=str(key_file))
    captured = engine.trainer.capture_adapter("a")
    for each in (engine, built_in):
        each.sampler.publish("v", captured)
    asked = job([7, 8, 9], version=version)
    sample(engine.sampler, asked)
    assert state(engine) == "ready"
    assert not here(engine)

    server.become(load_base_model(str(untied_folder), dtype="float32", device="cpu"))
    assert sample(engine.sampler, asked) == sample(built_in.sampler, asked)
    assert "the base model differs from ours" in state(engine)
    assert here(engine) == {"not answered by the server": 1}


def test_the_same_server_that_was_started_again_at_its_address_gets_the_versions_again(
    make_engine_of: Callable[..., Engine],
    server: VllmDouble,
    servers_model: BaseModel,
    tmp_path: Path,
) -> None:
    connection, key_file = server.connection, tmp_path / "key"
    assert connection is not None
    key_file.write_text(connection.key)
    engine = make_engine_of(python="", address=connection.address, key_file=str(key_file))
    engine.sampler.publish("v", engine.trainer.capture_adapter("a"))
    jobs = {"base": job(), "adapted": job(version="v")}
    expected = run_all(engine.sampler, jobs)
    server.become(servers_model)
    assert run_all(engine.sampler, jobs) == expected
    assert engine.sampler.figures()["vllm"]["life"] == 2
    assert not here(engine)


def test_a_server_that_answers_for_unknown_names_gets_no_job(
    make_engine_of: Callable[..., Engine],
    built_in: Engine,
    server: VllmDouble,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = server.begin

    def skip_validation(body: dict[str, Any]) -> str:
        known = body["model"] in server.adapters
        return begin(body if known else {**body, "model": BASE})

    monkeypatch.setattr(server, "begin", skip_validation)
    engine = make_engine_of()
    assert sample(engine.sampler, job()) == sample(built_in.sampler, job())
    assert "VLLM_SKIP_MODEL_NAME_VALIDATION" in state(engine)


def test_adapters_that_the_server_computes_otherwise_are_sampled_here(
    make_engine_of: Callable[..., Engine], server: VllmDouble, built_in: Engine
) -> None:
    def change(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if body["model"] != BASE and answer["prompt_logprobs"]:
            for row in answer["prompt_logprobs"][1:]:
                for each in row.values():
                    each["logprob"] -= 0.01
        return answer

    server.change = change
    engine = make_engine_of()
    captured = engine.trainer.capture_adapter("a")
    for each in (engine, built_in):
        each.sampler.publish("v", captured)
    assert sample(engine.sampler, job(version="v")) == sample(built_in.sampler, job(version="v"))
    assert sample(engine.sampler, job()) != sample(built_in.sampler, job())  # of other seeds
    figures = engine.sampler.figures()["vllm"]
    assert figures["state"] == "ready"
    assert figures["adapters"] == []
    assert figures["differences"]["the base model"] < 1e-5
    assert figures["differences"]["an adapter on layers"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("is_on_cpu", [False, True])
def test_the_base_model_stays_the_base_model_beside_adapters(
    servers_model: BaseModel, tied_base_model: BaseModel, tmp_path: Path, is_on_cpu: bool
) -> None:
    """On a CPU, vLLM gives requests without an adapter that of the last slot. The second engine
    finds a server that has adapters in its slots."""
    double = VllmDouble(servers_model, is_on_cpu=is_on_cpu)
    built_in = engine_over(tied_base_model)
    greedy = job(temperature=0.0, max_tokens=30)
    for number in range(2):
        engine = engine_with_server(tied_base_model, double, tmp_path / "server")
        sampler = engine.sampler
        for name in "ab":
            engine.trainer.create_adapter(name, LoraConfig(rank=2, seed=1))
            for _ in range(2):
                step(engine.trainer, name)
            sampler.publish(name, engine.trainer.capture_adapter(name))
            sample(sampler, job(version=name))
        found = run_all(sampler, {"v": job(version="b", max_tokens=200), "base": greedy})
        assert found["base"] == sample(built_in.sampler, greedy)
        assert not here(engine)
        assert all(
            difference < 1e-4
            for difference in engine.sampler.figures()["vllm"]["differences"].values()
        ), number
        asked = [body for body in double.requests if body["sampling_params"]["max_tokens"] == 30]
        assert ({body["model"] for body in asked} == {BASE}) is not is_on_cpu
        sampler.close()
    double.close()


def test_a_slow_server_does_not_delay_the_caller(
    engine_of_server: Engine, server: VllmDouble
) -> None:
    threads_before = threading.active_count()  # also of other tests' models
    sampler = engine_of_server.sampler
    sample(sampler, job())
    server.hold.clear()
    server.holds.clear()
    sampler.submit("slow", job())
    assert server.holds.wait(60)
    sampler.publish("v", engine_of_server.trainer.capture_adapter("a"))
    sampler.submit("slow too", job(version="v"))
    assert sampler.poll(0) == {}
    assert sampler.progress("slow") == [""]
    assert sampler.cancel("slow") == 0
    # What the server cannot do goes on meanwhile.
    assert set(run_here(sampler, job(top_p=0.5))) == {"here"}
    assert threading.active_count() < threads_before + 100
    server.hold.set()
    assert set(finish(sampler)) == {"slow too"}


def run_here(sampler: Sampler, one: SampleJob) -> dict[str, Any]:
    sampler.submit("here", one)
    found: dict[str, Any] = {}
    while not found:
        found = dict(sampler.poll(60))
    return found
