"""stable_reinforce: recorded samples, permission to train on them, and the numbers used."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.contrib.auth import get_user_model
from django.utils import timezone
from pytest_django import Settings
from tinker import types

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_message
from tests.sdk.test_sampling import response, sample, sampling_session
from tests.sdk.test_steps import payload_of
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.services import api_key_create
from training.models import RecordedSample, Run
from training.services.recorded_samples import samples_forget

PROMPT = [5, 6, 7, 8]
"""The model that ``test_sampling`` samples from."""


class Recorded:
    """A sampled sequence, as its client knows it."""

    def __init__(
        self, sdk: SdkClient, session: str, work: InProcessWorker, number: int = 0
    ) -> None:
        sampler = sampling_session(sdk, session).json()["sampling_session_id"]
        params = {"max_tokens": 4, "temperature": 1.0, "seed": 1}  # with which none ends early
        answer = sample(
            sdk, sampler, record_stability_info=True, num_samples=2, sampling_params=params
        )
        work()
        self.sequence_id = answer.json()["sample_sequence_ids"][1]
        sequence = response(sdk, answer).sequences[1]
        self.tokens = np.frombuffer(sequence.tokens, "<i4").tolist()
        self.logprobs = np.frombuffer(sequence.logprobs, "<f4")
        assert len(self.tokens) == 4

    def prompt(self, offset: int, length: int) -> types.PromptProvenanceSpan:
        return types.PromptProvenanceSpan(
            sequence_id=self.sequence_id, offset=offset, length=length
        )

    def sampled(self, offset: int, length: int) -> types.SampledProvenanceSpan:
        return types.SampledProvenanceSpan(
            sequence_id=self.sequence_id, offset=offset, length=length
        )

    def datum(self, **changes: Any) -> types.Datum:
        """As in the cookbook: targets of the prompt are filled with 0."""
        count = len(self.tokens)
        fields = {
            "tokens": [*PROMPT, *self.tokens[:-1]],
            "target_tokens": [0] * 3 + self.tokens,
            "advantages": [0.0] * 3 + [1.0] * count,
            "logprobs": [0.0] * (3 + count),
            "model_input": [self.prompt(0, 4), self.sampled(0, count - 1)],
            "loss_fn_inputs": [self.prompt(1, 3), self.sampled(0, count)],
            **changes,
        }
        names = ("target_tokens", "advantages", "logprobs")
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(fields["tokens"]),
            loss_fn_inputs={name: fields[name] for name in names},
            model_input_spans=fields["model_input"],
            loss_fn_input_spans=fields["loss_fn_inputs"],
        )
        return datum


@pytest.fixture
def session(sdk: SdkClient) -> str:
    return sdk.session()


@pytest.fixture
def recorded(sdk: SdkClient, session: str, work: InProcessWorker) -> Recorded:
    return Recorded(sdk, session, work)


def train(sdk: SdkClient, model_id: str, seq_id: int, datum: types.Datum, **config: Any) -> Any:
    return sdk.forward_backward(
        model_id, seq_id, [datum], loss_fn="stable_reinforce", config=config or None
    )


def test_a_recorded_sequence_is_trained_on_with_its_recorded_logprobs(
    sdk: SdkClient, session: str, work: InProcessWorker, recorded: Recorded
) -> None:
    model_id = sdk.model(session)
    answer = train(sdk, model_id, 1, recorded.datum(), kl_coeff="0.25")
    work()

    payload = payload_of(answer)
    [datum] = payload["data"]
    assert payload["loss_fn_config"] == {"kl_coeff": 0.25}
    np.testing.assert_array_equal(datum["loss_fn_inputs"]["logprobs"][:3], 0)
    np.testing.assert_array_equal(datum["loss_fn_inputs"]["logprobs"][3:], recorded.logprobs)
    metrics = sdk.result(answer).metrics
    assert metrics["stable_reinforce:ours"] == metrics["stable_reinforce/ours:min"] == 1
    assert Run.objects.get().own_objective


def test_a_request_asks_for_the_same_after_its_record_is_gone(
    sdk: SdkClient, session: str, work: InProcessWorker, recorded: Recorded
) -> None:
    """The log holds plain arrays: it is replayed without the record."""
    model_id = sdk.model(session)
    answer = train(sdk, model_id, 1, recorded.datum())
    RecordedSample.objects.all().delete()
    work()

    assert sdk.result(answer).metrics["loss:sum"] != 0


def test_json_spans_mean_the_same_as_protobufs(
    sdk: SdkClient, session: str, recorded: Recorded
) -> None:
    datum = recorded.datum()
    protobuf = train(sdk, sdk.model(session), 1, datum)
    count = len(recorded.tokens)
    inputs = {"target_tokens": "int64", "advantages": "float32", "logprobs": "float32"}

    def span(kind: str, **more: Any) -> dict[str, Any]:
        return {kind: {"sequence_id": recorded.sequence_id, **more}}

    old = {
        "model_input": {"chunks": [{"tokens": [*PROMPT, *recorded.tokens[:-1]]}]},
        "loss_fn_inputs": {
            name: {"data": datum.loss_fn_inputs[name].tolist(), "dtype": dtype}
            for name, dtype in inputs.items()
        },
        "model_input_spans": [
            span("prompt_tokens", length=4),
            span("sampled_tokens", length=count - 1),
        ],
        "loss_fn_input_spans": [
            span("prompt_tokens", offset=1, length=3),
            span("sampled_tokens", length=count),
        ],
    }
    json = sdk.post(
        "forward_backward",
        model_id=sdk.model(session, 1),
        seq_id=1,
        forward_backward_input={"data": [old], "loss_fn": "stable_reinforce"},
    )

    assert payload_of(json)["data"][0].keys() == payload_of(protobuf)["data"][0].keys()
    digests = Future.objects.filter(kind="forward_backward").values_list("payload_digest")
    assert len(set(digests)) == 1


def changed(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


def wrong_datums(r: Recorded) -> dict[str, tuple[types.Datum, str]]:
    count, tokens = len(r.tokens), [*PROMPT, *r.tokens[:-1]]
    advantages = [0.0] * 3 + [1.0] * count
    other = (r.tokens[1] + 1) % 250
    return {
        "short": (
            r.datum(model_input=[r.prompt(0, 4)]),
            f"data[0].model_input_spans: the spans cover 4 positions of {3 + count}; they must",
        ),
        "long": (
            r.datum(loss_fn_inputs=[r.prompt(1, 3), r.sampled(0, count), r.sampled(0, 1)]),
            f"data[0].loss_fn_input_spans: the spans cover {4 + count} positions of {3 + count}",
        ),
        "beyond the prompt": (
            r.datum(loss_fn_inputs=[r.prompt(2, 3), r.sampled(0, count)]),
            "data[0].loss_fn_input_spans[0]: positions 2 to 5 of 4 prompt tokens",
        ),
        "another input token": (
            r.datum(tokens=changed(tokens, 2, 99)),
            "data[0].model_input[2]: token 99, and the recorded prompt token of ",
        ),
        "another target": (
            r.datum(target_tokens=[0] * 3 + changed(r.tokens, 1, other)),
            f"data[0].loss_fn_inputs.target_tokens[4]: token {other}, and the recorded sampled",
        ),
        "an advantage of the prompt": (
            r.datum(advantages=changed(advantages, 1, 0.5)),
            "data[0].loss_fn_inputs.advantages[1]: 0.5 at a token of a prompt; only sampled",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "short",
        "long",
        "beyond the prompt",
        "another input token",
        "another target",
        "an advantage of the prompt",
    ],
)
def test_spans_that_do_not_fit_are_refused_by_name(
    case: str, sdk: SdkClient, session: str, recorded: Recorded
) -> None:
    datum, sentence = wrong_datums(recorded)[case]
    answer = train(sdk, sdk.model(session), 1, datum)

    assert sdk.result(answer)["error"].startswith(sentence)


@pytest.mark.parametrize("name", ["", "x", "future_-1", "a\0b", "\u2028" * 50, "f" * 120])
def test_a_name_that_is_no_sequence_is_refused_like_one_that_is_gone(
    name: str, sdk: SdkClient, session: str, recorded: Recorded
) -> None:
    spans = [{"prompt_tokens": {"sequence_id": name, "length": 1}}]
    datum = {
        "model_input": {"chunks": [{"tokens": [1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [2], "dtype": "int64"},
            "advantages": {"data": [1.0], "dtype": "float32"},
        },
        "model_input_spans": spans,
        "loss_fn_input_spans": spans,
    }
    answer = sdk.post(
        "forward_backward",
        model_id=sdk.model(session),
        seq_id=1,
        forward_backward_input={"data": [datum], "loss_fn": "stable_reinforce"},
    )

    assert "data[0].model_input_spans[0]" in sdk.result(answer)["error"]


def test_spans_come_in_pairs(sdk: SdkClient, session: str, recorded: Recorded) -> None:
    message = sdk_message([recorded.datum()], loss_fn="stable_reinforce")
    message.data[0].ClearField("loss_fn_input_spans")
    message.model_id = sdk.model(session)
    answer = sdk.api.client.post(
        "/api/v1/forward_backward",
        message.SerializeToString(),
        content_type=PROTOBUF,
        headers=sdk.headers,
    )

    assert sdk.result(answer)["error"] == (
        "data[0].loss_fn_input_spans: missing; spans come in pairs"
    )


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("auto", "loss_fn_config.kl_coeff: expected a number"),
        ("nan", "loss_fn_config.kl_coeff: expected a number"),
        ("-1", "loss_fn_config.kl_coeff: -1.0 is not at least 0"),
        (-1.0, "loss_fn_config.kl_coeff: -1.0 is not at least 0"),
    ],
)
def test_a_kl_coeff_that_is_no_such_number_is_refused(
    value: Any, sentence: str, sdk: SdkClient, session: str, recorded: Recorded
) -> None:
    answer = train(sdk, sdk.model(session), 1, recorded.datum(), kl_coeff=value)

    assert sdk.result(answer)["error"].startswith(sentence)


def test_a_sequence_of_another_user_of_another_session_or_of_none_is_one_that_never_was(
    sdk: SdkClient, session: str, work: InProcessWorker, recorded: Recorded
) -> None:
    user = get_user_model().objects.create_user("curious")
    stranger = SdkClient(sdk.api, api_key_create(user=user, name="laptop")[1])
    never = Recorded.__new__(Recorded)
    never.__dict__ |= {**vars(recorded), "sequence_id": f"future_{'0' * 32}-1"}
    unrecorded = Recorded.__new__(Recorded)
    sampler = sampling_session(sdk, session, 5).json()["sampling_session_id"]
    plain = sample(sdk, sampler, num_samples=2).json()["sample_sequence_ids"][1]
    unrecorded.__dict__ |= {**vars(recorded), "sequence_id": plain}
    work()
    answers = {
        recorded.sequence_id: train(stranger, stranger.model(), 1, recorded.datum()),
        never.sequence_id: train(sdk, sdk.model(session), 1, never.datum()),
        plain: train(sdk, sdk.model(session, 1), 1, unrecorded.datum()),
    }
    other_session = train(sdk, sdk.model(sdk.session()), 1, recorded.datum())

    said = {
        sequence_id: (stranger if sequence_id == recorded.sequence_id else sdk)
        .result(answer)["error"]
        .replace(sequence_id, "ID")
        for sequence_id, answer in answers.items()
    }
    said["other session"] = sdk.result(other_session)["error"].replace(recorded.sequence_id, "ID")
    assert len(set(said.values())) == 1, said
    assert said["other session"].startswith(
        "data[0].model_input_spans[0].sequence_id: no sequence 'ID' is recorded in this session"
    )


def test_a_record_is_kept_for_a_day_after_its_last_use(
    sdk: SdkClient, session: str, work: InProcessWorker, recorded: Recorded
) -> None:
    def age(hours: float) -> None:
        expires_at = timezone.now() + timedelta(hours=24 - hours)
        RecordedSample.objects.update(expires_at=expires_at)

    model_id = sdk.model(session)
    age(23.5)
    assert samples_forget() == 0
    first = train(sdk, model_id, 1, recorded.datum())
    assert RecordedSample.objects.get().expires_at > timezone.now() + timedelta(hours=23)
    age(24.1)
    late = train(sdk, model_id, 2, recorded.datum())
    assert samples_forget() == 1
    assert not RecordedSample.objects.exists()
    work()

    assert sdk.result(first).metrics["loss:sum"]
    assert "no sequence" in sdk.result(late)["error"]


def test_sequences_of_a_request_share_one_row_and_others_leave_none(
    sdk: SdkClient, session: str, work: InProcessWorker, recorded: Recorded
) -> None:
    row = RecordedSample.objects.get()
    assert f"{row.request_id}-1" == recorded.sequence_id
    assert row.num_tokens == len(PROMPT) + 2 * 4
    sampler = sampling_session(sdk, session, 7).json()["sampling_session_id"]
    sample(sdk, sampler)
    work()
    assert RecordedSample.objects.count() == 1


def test_an_operator_may_refuse_it(
    sdk: SdkClient, session: str, recorded: Recorded, settings: Settings
) -> None:
    settings.STABLE_REINFORCE = "refuse"
    answer = train(sdk, sdk.model(session), 1, recorded.datum())
    sampler = sampling_session(sdk, session, 9).json()["sampling_session_id"]
    refused = sample(sdk, sampler, record_stability_info=True)

    assert "TINKERAPI_STABLE_REINFORCE" in sdk.result(answer)["error"]
    assert refused.status_code == 400
    assert "TINKERAPI_STABLE_REINFORCE" in refused.content.decode()
    assert sample(sdk, sampler).status_code == 200


def test_the_quick_reference_says_who_can_send_it(api: Any, sdk: SdkClient) -> None:
    inputs = {"target_tokens": [2], "logprobs": [-1], "advantages": [1]}
    answer = api.post(
        "/api/v1/forward_backward_async",
        model_id="m",
        data=[{"model_input": [1], "loss_fn_inputs": inputs}],
        loss_fn="stable_reinforce",
    )
    assert answer.status_code == 400
    assert "only the tinker SDK's forward_backward sends" in answer.content.decode()
