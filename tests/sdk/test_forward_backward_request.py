"""The SDK's encoded requests give the same numbers; wrong ones are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.types.provenance_spans import PromptProvenanceSpan

from tests.sdk.official_sdk import refusal, sdk_body, sdk_datum, sdk_message
from tinkerapi.api.sdk.parse.protobuf import parse_forward_backward, parse_ids
from tinkerapi.api.sdk.parse.tensors import DenseBudget, TensorParts, build_array
from training.errors import InvalidDatum, InvalidRequest, LimitExceeded

TARGETS = np.array([2, 3, 4], np.int64)
WEIGHTS = np.array([0.0, 1.0, -0.5], np.float32)


def good_datum() -> types.Datum:
    return sdk_datum([1, 2, 3], target_tokens=TARGETS, weights=WEIGHTS)


def good_message(**more: Any) -> Any:
    return sdk_message([good_datum()], **more)


def test_a_dense_datum_arrives_bit_for_bit() -> None:
    call = parse_forward_backward(sdk_body([good_datum()], model_id="s:train:7", seq_id=12))

    assert (call.model_id, call.seq_id, call.loss_fn) == ("s:train:7", 12, "cross_entropy")
    assert (call.loss_fn_config, call.loss_id, call.forward_only) == ({}, None, False)
    (datum,) = call.data
    assert datum.model_input.dtype == np.int32
    assert datum.model_input.tolist() == [1, 2, 3]
    assert datum.loss_fn_inputs["target_tokens"].dtype == np.int64
    np.testing.assert_array_equal(datum.loss_fn_inputs["target_tokens"], TARGETS)
    assert datum.loss_fn_inputs["weights"].dtype == np.float32
    np.testing.assert_array_equal(datum.loss_fn_inputs["weights"], WEIGHTS)


@settings(max_examples=40)
@given(
    data=st.data(),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=5),
)
def test_any_ragged_dense_or_wide_data_arrives(
    data: st.DataObject, shapes: list[tuple[int, int]]
) -> None:
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    tokens = st.integers(0, 2**31 - 1)
    sent = []
    for num_tokens, width in shapes:
        shape = (num_tokens, width) if width else (num_tokens,)
        sent.append(
            (
                data.draw(st.lists(tokens, min_size=num_tokens, max_size=num_tokens)),
                data.draw(hnp.arrays(np.int64, shape, elements=tokens)),
                data.draw(hnp.arrays(np.float32, shape, elements=floats)),
            )
        )
    message = sdk_message([sdk_datum(t, target_tokens=y, weights=w) for t, y, w in sent])

    call = parse_forward_backward(message.SerializeToString())

    for (model_input, targets, weights), datum in zip(sent, call.data, strict=True):
        assert datum.model_input.tolist() == model_input
        np.testing.assert_array_equal(datum.loss_fn_inputs["target_tokens"], targets)
        np.testing.assert_array_equal(datum.loss_fn_inputs["weights"], weights)


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0, 0, 0, 0, 3, 70000]), min_size=9, max_size=9), min_size=3
    )
)
def test_arrays_that_the_sdk_makes_sparse_are_dense_again(rows: list[list[int]]) -> None:
    targets = torch.tensor(rows, dtype=torch.int64)
    datum = sdk_datum([5] * len(rows), target_tokens=targets, weights=targets / 2.0)

    (got,) = parse_forward_backward(sdk_message([datum]).SerializeToString()).data

    np.testing.assert_array_equal(got.loss_fn_inputs["target_tokens"], targets.numpy())
    np.testing.assert_array_equal(got.loss_fn_inputs["weights"], targets.numpy() / 2)


def test_the_sparse_test_data_really_is_sparse() -> None:
    datum = sdk_datum([5] * 3, target_tokens=torch.eye(3, 9, dtype=torch.int64))

    encoded = sdk_message([datum]).data[0].loss_fn_inputs["target_tokens"]

    assert encoded.WhichOneof("encoding") == "sparse_csr"


def test_chunks_are_joined() -> None:
    chunks = [types.EncodedTextChunk(tokens=part) for part in ([1], [], [2, 3])]
    datum = types.Datum(
        model_input=types.ModelInput(chunks=chunks),
        loss_fn_inputs={"target_tokens": TARGETS, "weights": WEIGHTS},
    )

    (got,) = parse_forward_backward(sdk_body([datum])).data

    assert got.model_input.tolist() == [1, 2, 3]


def test_forward_only_and_the_config_arrive() -> None:
    config = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.5}
    body = sdk_body([good_datum()], loss_fn="ppo", config=config, forward_only=True)

    call = parse_forward_backward(body)

    assert call.forward_only is True
    assert (call.loss_fn, call.loss_fn_config) == ("ppo", config)


def test_the_second_config_map_wins_unless_it_is_empty() -> None:
    message = good_message(loss_fn="dro", config={"beta": 0.5})
    message.loss_fn_config["beta"] = 9.0
    assert parse_forward_backward(message.SerializeToString()).loss_fn_config == {"beta": 0.5}

    message.loss_fn_config_v2.clear()
    assert parse_forward_backward(message.SerializeToString()).loss_fn_config == {"beta": 9.0}


def test_the_loss_id_of_a_custom_loss_arrives() -> None:
    body = sdk_body([good_datum()], loss_fn="custom", config={"loss_id": "loss-1", "scale": 2.0})

    call = parse_forward_backward(body)

    assert (call.loss_id, call.loss_fn_config) == ("loss-1", {"scale": 2.0})


def test_text_in_the_config_of_another_loss_is_refused() -> None:
    message = good_message(loss_fn="stable_reinforce", config={"kl_coeff": "auto"})

    assert (
        refusal(parse_forward_backward, message.SerializeToString())
        == "loss_fn_config.kl_coeff: expected a number; got 'auto'"
    )


def test_integers_given_as_weights_become_float32() -> None:
    datum = sdk_datum([1, 2, 3], target_tokens=TARGETS, weights=np.array([0, 1, 1]))

    (got,) = parse_forward_backward(sdk_body([datum])).data

    assert got.loss_fn_inputs["weights"].dtype == np.float32
    assert got.loss_fn_inputs["weights"].tolist() == [0.0, 1.0, 1.0]


def test_narrow_dtypes_are_widened() -> None:
    message = good_message()
    inputs = message.data[0].loss_fn_inputs
    inputs["target_tokens"].dtype = 3  # int32
    inputs["target_tokens"].dense = TARGETS.astype("<i4").tobytes()
    inputs["weights"].dtype = 4
    inputs["weights"].dense = torch.tensor(WEIGHTS).bfloat16().view(torch.int16).numpy().tobytes()

    (got,) = parse_forward_backward(message.SerializeToString()).data

    assert got.loss_fn_inputs["target_tokens"].dtype == np.int64
    np.testing.assert_array_equal(got.loss_fn_inputs["target_tokens"], TARGETS)
    assert got.loss_fn_inputs["weights"].dtype == np.float32
    np.testing.assert_array_equal(got.loss_fn_inputs["weights"], WEIGHTS)  # exact in bfloat16


def test_provenance_spans_change_nothing() -> None:
    spans = [PromptProvenanceSpan(sequence_id="q-0", offset=0, length=3)]
    datum = good_datum().with_provenance(model_input=spans, loss_fn_inputs=spans)

    (got,) = parse_forward_backward(sdk_body([datum])).data

    np.testing.assert_array_equal(got.loss_fn_inputs["weights"], WEIGHTS)


def test_arrays_are_views_of_the_message() -> None:
    (got,) = parse_forward_backward(sdk_body([good_datum()])).data

    assert not got.model_input.flags.writeable
    assert not got.loss_fn_inputs["weights"].flags.owndata


# --- Refusals: the message before, the change, the sentence ----------------------------------


def _tensor(message: Any, name: str = "weights") -> Any:
    return message.data[0].loss_fn_inputs[name]


def _set_shape(*shape: int) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        _tensor(message).shape[:] = shape

    return change


def _set_csr(
    crow: list[int], col: list[int], values: list[float], shape: list[int]
) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        tensor = _tensor(message)
        tensor.sparse_csr.values = np.array(values, "<f4").tobytes()
        tensor.sparse_csr.crow_indices = np.array(crow, "<i8").tobytes()
        tensor.sparse_csr.col_indices = np.array(col, "<i8").tobytes()
        tensor.shape[:] = shape

    return change


def _set(name: str, value: Any, of: Callable[[Any], Any] = _tensor) -> Callable[[Any], None]:
    return lambda message: setattr(of(message), name, value)


def _chunk(message: Any) -> Any:
    return message.data[0].model_input[0]


IN = "data[0].loss_fn_inputs"

REFUSALS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no model": (_set("model_id", "", lambda m: m), "model_id: expected text of 1 to 200"),
    "no seq id": (_set("seq_id", 0, lambda m: m), "seq_id: expected a whole number from 1"),
    "no loss": (_set("loss_fn", "", lambda m: m), "loss_fn: expected text of 1 to 200"),
    "no data": (lambda m: m.ClearField("data"), "data: is empty"),
    "infinite config": (
        lambda m: m.loss_fn_config.update(beta=float("inf")),
        "loss_fn_config.beta: expected a number that a float32 can hold; got inf",
    ),
    "config that is no number": (
        lambda m: m.loss_fn_config.update(beta=float("nan")),
        "loss_fn_config.beta: expected a number; got nan",
    ),
    "no chunks": (lambda m: m.data[0].ClearField("model_input"), "data[0].model_input: is empty"),
    "no tokens": (
        _set("tokens", b"", lambda m: _chunk(m).encoded_text),
        "data[0].model_input: is empty",
    ),
    "odd tokens": (
        _set("tokens", b"12345", lambda m: _chunk(m).encoded_text),
        "data[0].model_input.chunks[0].tokens: 5 bytes are not a whole number of int32 values",
    ),
    "negative token": (
        _set("tokens", np.array([1, -2], "<i4").tobytes(), lambda m: _chunk(m).encoded_text),
        "data[0].model_input.chunks[0].tokens[1]: -2 is not a token id",
    ),
    "image": (
        _set("data", b"png", lambda m: _chunk(m).image),
        "data[0].model_input.chunks[0].format: expected one of png, jpeg, webp; got ''",
    ),
    "audio": (
        _set("dmel", b"x", lambda m: _chunk(m).dmel),
        "data[0].model_input.chunks[0]: dmel (audio) is not supported",
    ),
    "empty chunk": (
        lambda m: _chunk(m).ClearField("chunk"),
        "data[0].model_input.chunks[0]: holds no tokens",
    ),
    "no inputs": (
        lambda m: m.data[0].ClearField("loss_fn_inputs"),
        "data[0].loss_fn_inputs: is empty",
    ),
    "shape": (_set_shape(11), f"{IN}.weights: 3 values for shape [11]"),
    "negative shape": (_set_shape(-1, -3), f"{IN}.weights.shape: [-1, -3] has a size below 1"),
    "huge shape": (_set_shape(2**62, 4), f"{IN}.weights: 3 values for shape [{2**62}, 4]"),
    "deep shape": (_set_shape(1, 3, 1), f"{IN}.weights.shape: 3 dimensions instead of 1 or 2"),
    "length": (
        lambda m: (_set_shape(1)(m), _set("dense", b"\0" * 4)(m)),
        f"{IN}.weights: 1 values for 3 tokens",
    ),
    "odd values": (
        _set("dense", b"12345"),
        f"{IN}.weights: 5 bytes are not a whole number of float32 values",
    ),
    "no values": (
        lambda m: (_tensor(m).ClearField("shape"), _set("dense", b"")(m)),
        f"{IN}.weights: no values",
    ),
    "no dtype": (_set("dtype", 0), f"{IN}.weights.dtype: unknown dtype 0"),
    "new dtype": (_set("dtype", 77), f"{IN}.weights.dtype: unknown dtype 77"),
    "float targets": (
        lambda m: _tensor(m, "target_tokens").CopyFrom(_tensor(m)),
        f"{IN}.target_tokens: float32 values instead of token ids",
    ),
    "negative target": (
        lambda m: setattr(
            _tensor(m, "target_tokens"), "dense", np.array([1, 2, -100], "<i8").tobytes()
        ),
        f"{IN}.target_tokens[2]: -100 is not a token id",
    ),
    "nan": (
        _set("dense", np.array([0, np.nan, 1], "<f4").tobytes()),
        f"{IN}.weights[1]: nan is not finite",
    ),
    "infinity": (
        _set("dense", np.array([0, 1, -np.inf], "<f4").tobytes()),
        f"{IN}.weights[2]: -inf is not finite",
    ),
    "crow count": (
        _set_csr([0, 1], [0], [1.0], [3, 4]),
        f"{IN}.weights: 2 crow indices for 3 rows",
    ),
    "crow end": (
        _set_csr([0, 1, 1, 2], [0], [1.0], [3, 4]),
        f"{IN}.weights: crow indices from 0 to 2 instead of 0 to 1",
    ),
    "crow falls": (
        _set_csr([0, 2, 1, 2], [0, 1], [1.0, 2.0], [3, 4]),
        f"{IN}.weights: crow index 2 is below the one before",
    ),
    "col count": (
        _set_csr([0, 1, 1, 1], [0, 1], [1.0], [3, 4]),
        f"{IN}.weights: 2 col indices for 1 values",
    ),
    "col outside": (
        _set_csr([0, 1, 1, 2], [0, 4], [1.0, 2.0], [3, 4]),
        f"{IN}.weights: col index 1 is 4, outside 4 columns",
    ),
    "col negative": (
        _set_csr([0, 1, 1, 2], [-1, 3], [1.0, 2.0], [3, 4]),
        f"{IN}.weights: col index 0 is -1, outside 4 columns",
    ),
    "col twice": (
        _set_csr([0, 0, 2, 2], [1, 1], [1.0, 2.0], [3, 4]),
        f"{IN}.weights: col index 1 is not above the one before in its row",
    ),
    "flat csr": (
        _set_csr([0, 1], [0], [1.0], [3]),
        f"{IN}.weights.shape: a sparse array has a shape [N, K]",
    ),
    "csr bomb": (
        _set_csr([0, 1, 1, 1], [2**40], [1.0], [3, 2**41]),
        f"{IN}.weights: the sparse arrays take more than",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_refused_by_name(case: str) -> None:
    change, sentence = REFUSALS[case]
    message = good_message()
    parse_forward_backward(message.SerializeToString())  # it is right before the change

    change(message)

    said = refusal(parse_forward_backward, message.SerializeToString())
    assert said is not None
    assert said.startswith(sentence)


def test_the_wrong_datum_is_named() -> None:
    message = sdk_message([good_datum()] * 4)
    message.data[3].loss_fn_inputs["weights"].shape[:] = [11]

    assert (
        refusal(parse_forward_backward, message.SerializeToString())
        == "data[3].loss_fn_inputs.weights: 3 values for shape [11]"
    )


def test_an_input_that_no_built_in_loss_takes_is_left_to_the_engine() -> None:
    datum = sdk_datum([1, 2, 3], target_tokens=TARGETS, scores=np.array([7, 8]))

    (got,) = parse_forward_backward(sdk_body([datum], loss_fn="custom")).data

    assert got.loss_fn_inputs["scores"].dtype == np.int64
    assert got.loss_fn_inputs["scores"].tolist() == [7, 8]


def test_the_ids_of_a_refused_request_are_known() -> None:
    message = good_message(seq_id=5)
    message.data[0].loss_fn_inputs["weights"].shape[:] = [-1]

    assert parse_ids(message.SerializeToString()) == ("s:train:0", 5)


def test_the_ids_must_be_there_too() -> None:
    with pytest.raises(InvalidRequest, match=r"^seq_id: expected"):
        parse_ids(good_message(seq_id=0).SerializeToString())
    with pytest.raises(InvalidRequest, match=r"^body: not a ForwardBackwardRequest"):
        parse_ids(b"\xff")


def test_limits_come_from_the_settings(settings: Any) -> None:
    settings.MAX_DATUMS = 1
    with pytest.raises(LimitExceeded, match=r"^data: 2 datums; this server takes 1"):
        parse_forward_backward(sdk_body([good_datum()] * 2))
    settings.MAX_DATUM_TOKENS = 2
    with pytest.raises(LimitExceeded, match=r"^data\[0\].model_input: 3 tokens; this server"):
        parse_forward_backward(sdk_body([good_datum()]))


def test_sparse_arrays_of_a_request_share_one_limit() -> None:
    parts = TensorParts(
        values=np.array([1.0], np.float32),
        shape=(2, 5),
        crow_indices=np.array([0, 1, 1]),
        col_indices=np.array([4]),
    )
    budget = DenseBudget(max_bytes=2 * 5 * 4)

    dense = build_array(parts, "first", pad=0, budget=budget)

    assert dense.tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    with pytest.raises(LimitExceeded, match=r"^second: the sparse arrays take more than 40 bytes"):
        build_array(parts, "second", pad=0, budget=budget)


def test_a_datum_error_is_its_own_class() -> None:
    message = good_message()
    message.data[0].loss_fn_inputs["weights"].dtype = 0

    with pytest.raises(InvalidDatum):
        parse_forward_backward(message.SerializeToString())
