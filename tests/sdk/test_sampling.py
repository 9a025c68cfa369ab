"""Sampling over HTTP: sampling sessions, their permissions, samples and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from django.contrib.auth import get_user_model

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.sdk import tinker_public_pb2 as pb
from tinkerapi.services import api_key_create
from training.base_models import base_model_get
from training.models import Checkpoint, SamplingSession

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7, 8]}]}


def sampling_session(sdk: SdkClient, session: str, number: int = 0, **more: object) -> Any:
    fields = {"session_id": session, "sampling_session_seq_id": number, **more}
    if not more:
        fields["base_model"] = base_model_get(None).name
    return sdk.post("create_sampling_session", **fields)


def new_sampler(sdk: SdkClient, **more: object) -> str:
    answer = sampling_session(sdk, sdk.session(), **more)
    assert answer.status_code == 200, answer.content
    return str(answer.json()["sampling_session_id"])


def sample(sdk: SdkClient, sampler: str, seq_id: int = 0, **more: object) -> Any:
    """The form that SDK 0.38 sends, with every default."""
    fields = {
        "num_samples": 1,
        "prompt": PROMPT,
        "sampling_params": {"max_tokens": 4, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": False,
        "type": "sample",
    }
    return sdk.post("asample", **{**fields, **more})


def response(sdk: SdkClient, answer: Any) -> Any:
    """The sample's protobuf message."""
    retrieved = sdk.retrieve(answer, accept=PROTOBUF)
    assert retrieved["Content-Type"] == PROTOBUF, retrieved.content
    return pb.SampleResponse.FromString(retrieved.content)


def tokens_of(message: Any) -> list[list[int]]:
    return [np.frombuffer(sequence.tokens, "<i4").tolist() for sequence in message.sequences]


def outcomes(message: Any) -> list[tuple[bytes, bytes]]:
    """Each sequence's tokens and log-probabilities. Other weights may well sample the same tokens,
    but not with the same probabilities."""
    return [(sequence.tokens, sequence.logprobs) for sequence in message.sequences]


def trained(sdk: SdkClient, seq_id: int = 1) -> str:
    model_id = sdk.model()
    sdk.forward_backward(model_id, seq_id)
    sdk.optim_step(model_id, seq_id + 1, learning_rate=0.1)
    return model_id


def test_a_sampling_session_of_a_base_model_says_what_it_is(sdk: SdkClient) -> None:
    session_id = sdk.session()
    made, again = (sampling_session(sdk, session_id, 3) for _ in range(2))

    assert made.json() == again.json()
    sampler = made.json()["sampling_session_id"]
    assert sampler == f"{session_id}:sample:3"
    described = sdk.api.get(f"/api/v1/samplers/{sampler}", **sdk.headers).json()
    assert described == {
        "sampler_id": sampler,
        "base_model": base_model_get(None).name,
        "model_path": None,
    }


def test_samples_are_what_was_asked_for_each_with_a_name(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    answer = sample(sdk, new_sampler(sdk), num_samples=3, prompt_logprobs=True)
    work()

    names = answer.json()["sample_sequence_ids"]
    message = response(sdk, answer)
    assert len(set(names)) == len(names) == len(message.sequences) == 3
    for sequence in message.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) > 0
    scores = np.frombuffer(message.prompt_logprobs, "<f4")
    assert np.isnan(scores).tolist() == [True, False, False, False]


def test_every_score_has_its_place_in_the_answer(sdk: SdkClient, work: InProcessWorker) -> None:
    dense = {"data": [1, -1, -1, -1, 2, 3], "dtype": "int64", "shape": [3, 2]}
    sparse = {
        **{"data": [1, 2, 3], "dtype": "int64", "shape": [3, 2]},
        **{"sparse_crow_indices": [0, 1, 1, 3], "sparse_col_indices": [0, 0, 1]},
    }
    sampler = new_sampler(sdk)
    answers = [
        sample(
            sdk,
            sampler,
            seq_id,
            prompt_logprobs=True,
            prompt_logprobs_last_n=2,
            topk_prompt_logprobs=3,
            topk_sample_logprobs=2,
            prompt_alt_tokens_k=5,
            target_prompt_logprobs=target,
        )
        for seq_id, target in enumerate((dense, sparse))
    ]
    work()

    one, other = (response(sdk, answer) for answer in answers)
    assert np.isnan(np.frombuffer(one.prompt_logprobs, "<f4")).tolist() == [
        True,
        True,
        False,
        False,
    ]
    top = one.topk_prompt_logprobs
    assert (top.length, top.k) == (4, 3)
    assert np.frombuffer(top.logprobs, "<f4")[:6].tolist() == [-99999.0] * 6
    sequence = one.sequences[0]
    assert sequence.topk_sampled_logprobs.length == len(sequence.tokens) // 4
    assert list(one.prompt_alt_tokens.tokens.shape) == [3, 5]
    assert list(one.prompt_alt_tokens.logprobs.shape) == [3, 5]
    scores = np.frombuffer(one.target_prompt_logprobs.dense, "<f4").reshape(3, 2)
    assert (scores < 0).tolist() == [[True, False], [False, False], [True, True]]
    csr = other.target_prompt_logprobs.sparse_csr
    np.testing.assert_array_equal(np.frombuffer(csr.values, "<f4"), scores[scores < 0])
    assert np.frombuffer(csr.crow_indices, "<i8").tolist() == [0, 1, 1, 3]
    assert np.frombuffer(csr.col_indices, "<i8").tolist() == [0, 0, 1]
    assert list(other.target_prompt_logprobs.shape) == [3, 2]


def test_a_repeat_is_the_same_request_and_another_under_its_number_is_refused(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    sampler = new_sampler(sdk)
    first, again = (sample(sdk, sampler, 10**18) for _ in range(2))
    other = sample(sdk, sampler, 10**18, num_samples=2)

    assert first.json() == again.json()
    assert (other.status_code, other.json()["error_code"]) == (422, "SeqIdReused")
    assert Future.objects.filter(lane_id=sampler).count() == 1


def test_numbers_of_a_sampling_session_have_no_order_and_no_gaps(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    sampler = new_sampler(sdk)
    answers = [sample(sdk, sampler, seq_id) for seq_id in (7 * 10**9, 5, 3 * 10**17)]
    work()

    for answer in answers:
        assert len(tokens_of(response(sdk, answer))) == 1


def test_a_sampler_of_a_path_is_the_model_at_its_save_whatever_comes_later(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk)
    saved = sdk.post("save_weights_for_sampler", model_id=model_id, seq_id=3, path="a")
    work()
    path = sdk.result(saved)["path"]
    sampler = new_sampler(sdk, model_path=path)
    plain = new_sampler(sdk)
    seeded = {"max_tokens": 8, "seed": 4}
    first = sample(sdk, sampler, 0, sampling_params=seeded)
    base = sample(sdk, plain, 0, sampling_params=seeded)
    sdk.forward_backward(model_id, 4)
    sdk.optim_step(model_id, 5, learning_rate=0.1)
    work()
    later = sample(sdk, sampler, 1, sampling_params=seeded)
    work()

    described = sdk.api.get(f"/api/v1/samplers/{sampler}", **sdk.headers).json()
    assert described["model_path"] == path
    saved_then, saved_later, other = (
        outcomes(response(sdk, answer)) for answer in (first, later, base)
    )
    assert saved_then == saved_later != other


def test_a_sampler_of_an_ephemeral_save_samples_the_model_of_that_moment(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk)
    saved = sdk.post(
        "save_weights_for_sampler", model_id=model_id, seq_id=3, sampling_session_seq_id=0
    )
    named = sdk.post("save_weights_for_sampler", model_id=model_id, seq_id=4, path="a")
    work()
    ephemeral = sdk.result(saved)["sampling_session_id"]
    sampler = new_sampler(sdk, model_path=sdk.result(named)["path"])
    seeded = {"max_tokens": 8, "seed": 4}
    answers = [sample(sdk, name, 0, sampling_params=seeded) for name in (ephemeral, sampler)]
    work()

    one, other = (outcomes(response(sdk, answer)) for answer in answers)
    assert one == other


def test_a_deleted_checkpoint_is_never_replaced_by_the_base_model(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = trained(sdk)
    saved = sdk.post("save_weights_for_sampler", model_id=model_id, seq_id=3, path="a")
    work()
    sampler = new_sampler(sdk, model_path=sdk.result(saved)["path"])
    waiting = sample(sdk, sampler, 0)
    Checkpoint.objects.get(run_id=model_id).delete()
    work()

    assert "deleted" in sdk.result(waiting)["error"]
    answer = sample(sdk, sampler, 1)
    assert (answer.status_code, answer.json()["error_code"]) == (404, "CheckpointNotFound")


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"base_model": "no such model"}, 404, "no such model"),
        ({"model_path": "tinker://x/sampler_weights/none"}, 404, "none"),
        ({"model_path": "x"}, 400, "model_path"),
        ({"base_model": None}, 400, "base_model"),
        ({"base_model": "a", "sampling_session_seq_id": -1}, 400, "sampling_session_seq_id"),
        ({"base_model": "a", "session_id": "nobody's"}, 404, "session"),
    ],
)
def test_a_sampling_session_of_nothing_is_refused_by_name(
    sdk: SdkClient, fields: dict[str, Any], status: int, named: str
) -> None:
    answer = sampling_session(sdk, sdk.session(), **fields)

    assert answer.status_code == status
    assert named in answer.json()["detail"]


def test_a_number_means_one_sampling_session(sdk: SdkClient, work: InProcessWorker) -> None:
    model_id = trained(sdk)
    saved = sdk.post("save_weights_for_sampler", model_id=model_id, seq_id=3, path="a")
    work()
    session_id = sdk.session()
    sampling_session(sdk, session_id)

    other = sampling_session(sdk, session_id, model_path=sdk.result(saved)["path"])

    assert (other.status_code, other.json()["error_code"]) == (422, "SeqIdReused")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": {"chunks": []}}, "prompt"),
        (
            {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
            "prompt.chunks[0].data: labelled png",
        ),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 10**6}, "num_samples"),
        ({"seq_id": 2**63}, "seq_id"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"sampling_params": {"min_p": 0.1}}, "sampling_params.min_p"),
        ({"record_stability_info": 1}, "record_stability_info"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs_last_n": 4, "prompt_logprobs": True}, "prompt_logprobs_last_n"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({"topk_prompt_logprobs": 10**7}, "topk_prompt_logprobs"),
        ({"topk_sample_logprobs": 10**7}, "topk_sample_logprobs"),
        ({"prompt_alt_tokens_k": 10**7}, "prompt_alt_tokens_k"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64"}}, "target_prompt_logprobs"),
        (
            {"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]}},
            "2 rows for a prompt of 4 tokens",
        ),
        (
            {"target_prompt_logprobs": {"data": [-1] * 3, "dtype": "int64", "shape": [3, 1]}},
            "names no token",
        ),
        ({"base_model": "a"}, "base_model"),
        ({"something": 1}, "something"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_by_name_at_once(
    sdk: SdkClient, fields: dict[str, object], named: str
) -> None:
    sampler = new_sampler(sdk)

    answer = sample(sdk, sampler, **fields)

    assert answer.status_code == 400
    assert named in answer.json()["detail"]
    assert not Future.objects.filter(lane_id=sampler).exists()


def test_what_the_first_sdks_leave_out_has_its_default(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    answer = sdk.post(
        "asample",
        sampling_session_id=new_sampler(sdk),
        seq_id=0,
        prompt={"chunks": [{"tokens": [1, 2]}]},
        sampling_params={"max_tokens": 2, "stop": None},
        topk_prompt_logprobs=None,
    )
    work()

    body = sdk.retrieve(answer).json()
    assert body["type"] == "sample"
    assert 1 <= len(body["sequences"][0]["tokens"]) <= 2


def test_a_full_queue_is_429_and_the_number_can_be_sent_again(
    sdk: SdkClient, work: InProcessWorker, settings: Any
) -> None:
    settings.MAX_PENDING = 1
    sampler = new_sampler(sdk)
    first, full = sample(sdk, sampler, 0), sample(sdk, sampler, 1)
    work()
    again = sample(sdk, sampler, 1)

    assert [answer.status_code for answer in (first, full, again)] == [200, 429, 200]


def test_each_client_that_joins_has_a_number_of_its_own(sdk: SdkClient) -> None:
    sampler = new_sampler(sdk)

    answers = [sdk.post("join_sampling_session", sampling_session_id=sampler) for _ in range(3)]

    assert [answer.json()["client_counter"] for answer in answers] == [1, 2, 3]


def test_anothers_sampling_session_answers_as_one_that_does_not_exist(
    sdk: SdkClient, api: ApiClient
) -> None:
    sampler = new_sampler(sdk)
    _, key = api_key_create(user=get_user_model().objects.create_user("colleague"), name="k")
    other = SdkClient(api, key)

    for name in (sampler, "nobody:sample:0"):
        for answer in (
            sample(other, name),
            other.post("join_sampling_session", sampling_session_id=name),
            api.get(f"/api/v1/samplers/{name}", **other.headers),
        ):
            assert answer.status_code == 404
            assert answer.json()["error_code"] == "SamplingSessionNotFound"


def test_nothing_is_sampled_in_a_session_that_was_finished(sdk: SdkClient) -> None:
    sampler = new_sampler(sdk)
    session_id = SamplingSession.objects.get(pk=sampler).session_id
    sdk.post(f"sessions/{session_id}/finish", reason={"type": "success"})

    for answer in (sample(sdk, sampler), sampling_session(sdk, session_id, 1)):
        assert (answer.status_code, answer.json()["error_code"]) == (400, "SessionFinished")
