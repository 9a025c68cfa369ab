"""Datums that begin alike share the rows of their beginning, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.reference import PeftReference, TinyTrainer
from tests.engine.test_thread_team import datum_of
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import ForwardBackwardJob
from training.engine.torch.attention.blocks import KEPT_KEYS
from training.engine.torch.packing.micro_batches import MicroBatch, plan_micro_batches
from training.engine.torch.packing.plan import KEYS_PER_ROW, Limits, PlannedJob
from training.engine.torch.packing.prefix_tree import (
    SHARED_BLOCK,
    WORTHWHILE,
    lay_out,
    shared_paths,
)
from training.engine.torch.packing.stream import ROWS_MULTIPLE, round_up
from training.types import Datum, LoraConfig

MakeDatum = Callable[..., Datum]
MakeEngine = Callable[..., TinyTrainer]


def beginning_with(beginning: Sequence[int], datum: Datum) -> Datum:
    """The same datum with other first tokens; its trained tokens stay."""
    tokens = datum.model_input.copy()
    tokens[: len(beginning)] = beginning
    return Datum(model_input=tokens, loss_fn_inputs=datum.loss_fn_inputs)


def samples_of_a_prompt(make_datum: MakeDatum, **kwargs: object) -> list[Datum]:
    prompt = range(40)
    return [
        beginning_with(prompt, make_datum(n, seed=n, **kwargs)) for n in (48, 43, 61, 47, 41, 50)
    ]


def turns_of_a_conversation(make_datum: MakeDatum) -> list[Datum]:
    """Each begins with all of the one before; two end where a block does."""
    tokens = make_datum(90).model_input
    return [beginning_with(tokens[:n], make_datum(n, seed=n)) for n in (90, 20, 64, 33, 80)]


def prompts_under_a_system_message(make_datum: MakeDatum) -> list[Datum]:
    """Two groups of samples whose prompts begin alike, and a datum that shares nothing."""
    system = list(range(16))
    prompts = [system + [100 + n] * 20 for n in range(2)]
    alone = make_datum(30, seed=9)
    return [beginning_with(p, make_datum(45, seed=s)) for s in range(3) for p in prompts] + [alone]


def the_same_twice(make_datum: MakeDatum) -> list[Datum]:
    """All tokens and targets alike, and all tokens but no target."""
    first = make_datum(48)
    return [first, make_datum(48), beginning_with(first.model_input, make_datum(48, seed=1))]


def long_samples(make_datum: MakeDatum) -> list[Datum]:
    """Some longer than the limit for joint attention, and one shorter."""
    prompt = np.arange(KEPT_KEYS - 30) % VOCAB_SIZE
    lengths = (KEPT_KEYS + 40, KEPT_KEYS - 20, KEPT_KEYS + 9)
    return [beginning_with(prompt, make_datum(n, seed=n)) for n in lengths]


def many_targets(make_datum: MakeDatum) -> list[Datum]:
    data = samples_of_a_prompt(make_datum, num_targets=3)
    return data[:3] + samples_of_a_prompt(make_datum)[3:]


CASES = [
    samples_of_a_prompt,
    turns_of_a_conversation,
    prompts_under_a_system_message,
    the_same_twice,
    long_samples,
    many_targets,
]


def planned(data: Sequence[Datum], part: int = 0) -> PlannedJob:
    job = ForwardBackwardJob(adapter_name="a", data=data, loss_fn="cross_entropy")
    return PlannedJob(job=job, config={}, part=("a", part))


def one_batch(data: Sequence[Datum]) -> MicroBatch:
    (batch,) = plan_micro_batches([planned(data)], Limits(token_budget=10_000))
    return batch


def assert_close(ours: np.ndarray, reference: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=atol * np.abs(reference).max())


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_peft_datum_by_datum(
    case, engine, make_datum, tied_folder
) -> None:
    engine.create_adapter("a", LoraConfig(rank=4))
    engine.randomise("a")
    data = case(make_datum)
    reference = PeftReference(tied_folder, engine, "a")

    output = engine.train_one("a", data)

    batch = one_batch(data)
    assert len(batch.tokens) < sum(len(datum.model_input) for datum in data)
    total = size = 0.0
    for datum, logprobs in zip(data, output.logprobs, strict=True):
        expected = reference.logprobs(datum)
        weights = torch.from_numpy(datum.loss_fn_inputs["weights"]).reshape(expected.shape)
        losses = -weights * expected
        losses.sum().backward()
        total += losses.sum().item()
        size += losses.abs().sum().item()
        # peft's own rounding on sequences of this length, which is there without sharing too.
        np.testing.assert_allclose(
            logprobs, expected.detach().reshape(logprobs.shape), rtol=1e-5, atol=5e-4
        )
    assert output.loss == pytest.approx(total, abs=1e-6 * size)
    assert_close(engine.grad("a"), reference.grad(), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_datums_one_by_one(
    case, make_engine: MakeEngine, make_datum: MakeDatum
) -> None:
    together, alone = make_engine(), make_engine()
    for engine in (together, alone):
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
    data = case(make_datum)
    output = together.train_one("a", data)
    parts = [alone.train_one("a", [datum]) for datum in data]
    for ours, part in zip(output.logprobs, parts, strict=True):
        np.testing.assert_allclose(ours, part.logprobs[0], rtol=1e-5, atol=1e-5)
    assert output.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-5)
    assert_close(together.grad("a"), alone.grad("a"), atol=5e-5)


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 5 * 4 * 259])
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_every_loss_reads_its_own_datums_numbers(
    loss_fn: str,
    chunk_bytes: int,
    make_engine: MakeEngine,
    make_datum: MakeDatum,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Advantages and old log-probabilities differ on the rows that are shared."""
    monkeypatch.setattr("training.engine.torch.lm_head.CHUNK_BYTES", chunk_bytes)
    data = samples_of_a_prompt(make_datum, loss_fn=loss_fn)
    config = {"dro": {"beta": 0.1}}.get(
        loss_fn, {"clip_low_threshold": 0.0, "clip_high_threshold": 1e9}
    )
    together, alone = make_engine(), make_engine()
    for engine in (together, alone):
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
    kwargs = {} if loss_fn == "importance_sampling" else {"loss_fn_config": config}
    output = together.train_one("a", data, loss_fn=loss_fn, **kwargs)
    parts = [alone.train_one("a", [datum], loss_fn=loss_fn, **kwargs) for datum in data]
    assert output.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-5)
    for ours, part in zip(output.logprobs, parts, strict=True):
        np.testing.assert_allclose(ours, part.logprobs[0], rtol=1e-5, atol=1e-5)
    assert_close(together.grad("a"), alone.grad("a"))


@pytest.mark.parametrize("token_budget", [1, 70, 100, 150])
def test_the_token_budget_changes_no_result(
    token_budget: int, make_engine: MakeEngine, make_datum: MakeDatum
) -> None:
    data = samples_of_a_prompt(make_datum) + prompts_under_a_system_message(make_datum)
    small, large = make_engine(token_budget=token_budget), make_engine()
    outputs = []
    for engine in (small, large):
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
        outputs.append(engine.train_one("a", data))
    assert outputs[0].loss == pytest.approx(outputs[1].loss, rel=1e-5)
    for ours, theirs in zip(outputs[0].logprobs, outputs[1].logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_close(small.grad("a"), large.grad("a"))


def test_jobs_share_with_each_other_only_where_bits_do_not_count(
    make_engine: MakeEngine, make_datum: MakeDatum
) -> None:
    jobs = [
        ForwardBackwardJob(adapter_name="a", data=[datum], loss_fn="cross_entropy")
        for datum in samples_of_a_prompt(make_datum)
    ]
    together, one_by_one, as_on_a_gpu = make_engine(), make_engine(), make_engine()
    as_on_a_gpu._sums_by_job = False
    rows: dict[TinyTrainer, int] = dict.fromkeys((together, one_by_one, as_on_a_gpu), 0)
    for engine in rows:
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
        forward = engine._base_model._decoder.forward

        def counting(*args, engine=engine, forward=forward, **kwargs):
            rows[engine] += kwargs["input_ids"].numel()
            return forward(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._base_model._decoder, "forward", counting)
            for call in [[job] for job in jobs] if engine is one_by_one else [jobs]:
                engine.forward_backward(call)
    assert 0 <= rows[one_by_one] - rows[together] < ROWS_MULTIPLE * len(jobs)  # padding
    assert rows[together] > rows[as_on_a_gpu]
    np.testing.assert_array_equal(together.grad("a"), one_by_one.grad("a"))
    assert_close(as_on_a_gpu.grad("a"), together.grad("a"))


def test_a_bad_sample_of_a_prompt_leaves_the_others_as_without_it(
    make_engine: MakeEngine, make_datum: MakeDatum
) -> None:
    """If jobs share rows, the infinite gradient of one must not affect another."""
    data = samples_of_a_prompt(make_datum)
    data[2].loss_fn_inputs["weights"][:] = 3e37
    clean, mixed = make_engine(), make_engine()
    for engine in (clean, mixed):
        engine._sums_by_job = False
        engine.create_adapter("a", LoraConfig(rank=4))
        engine.randomise("a")
    jobs = [
        ForwardBackwardJob(adapter_name="a", data=[datum], loss_fn="cross_entropy")
        for datum in data
    ]
    clean.forward_backward([*jobs[:2], *jobs[3:]])
    outcome = mixed.forward_backward(jobs)
    assert [type(each).__name__ for each in outcome].count("NonFiniteResult") == 1
    assert type(outcome[2]).__name__ == "NonFiniteResult"
    assert_close(mixed.grad("a"), clean.grad("a"))


def test_a_prompt_has_its_rows_once(make_datum: MakeDatum) -> None:
    data = samples_of_a_prompt(make_datum)
    batch = one_batch(data)
    blocks = 40 // SHARED_BLOCK * SHARED_BLOCK
    num_tokens = sum(len(datum.model_input) for datum in data)
    num_rows = num_tokens - (len(data) - 1) * blocks
    assert len(batch.tokens) == round_up(num_rows, ROWS_MULTIPLE)
    assert len(batch.places) == num_tokens


def test_a_beginning_that_is_a_small_part_of_everybody_is_not_shared() -> None:
    length = SHARED_BLOCK * WORTHWHILE
    begin = np.zeros(SHARED_BLOCK, np.int32)

    def sequence(fill: int, length: int) -> np.ndarray:
        return np.concatenate([begin, np.full(length - SHARED_BLOCK, fill, np.int32)])

    just, too_long = [sequence(n, length) for n in (1, 2)], sequence(3, length + 1)
    paths = shared_paths([*just, too_long])
    assert [len(path) for path in paths] == [1, 1, 0]
    assert shared_paths([just[0], too_long]) == [(), ()]


def test_a_row_is_read_as_a_key_by_a_bounded_number_of_datums(make_datum: MakeDatum) -> None:
    """Many short answers to a long prompt: few rows, but each answer copies the prompt's keys."""
    prompt = np.arange(320) % VOCAB_SIZE
    data = [beginning_with(prompt, make_datum(321, seed=seed)) for seed in range(40)]
    batches = plan_micro_batches([planned(data)], Limits(token_budget=400))
    assert len(batches) > 1
    for batch in batches:
        assert sum(len(packed.datum.model_input) for packed in batch.datums) <= KEYS_PER_ROW * 400
        assert len(batch.tokens) <= 400
    assert sum(len(batch.datums) for batch in batches) == len(data)


@settings(deadline=None)
@given(st.data())
def test_stretches_put_together_are_the_sequences_and_no_row_is_there_twice(
    data: st.DataObject,
) -> None:
    block = st.sampled_from([bytes([n] * SHARED_BLOCK) for n in range(2)])
    rest = st.binary(max_size=SHARED_BLOCK + 3)
    drawn = data.draw(st.lists(st.tuples(st.lists(block, max_size=5), rest), min_size=1))
    sequences = [np.frombuffer(b"".join(blocks) + end, np.uint8) for blocks, end in drawn]
    sequences = [s.astype(np.int32) for s in sequences if len(s)]
    paths = shared_paths(sequences)
    some = sorted(data.draw(st.sets(st.sampled_from(range(len(sequences))))) if sequences else [])

    laid_out = lay_out([len(sequences[i]) for i in some], [paths[i] for i in some], 7)

    stream: dict[int, int] = {}
    for i, stretches in zip(some, laid_out, strict=True):
        position = 0
        for n, stretch in enumerate(stretches):
            assert stretch.before == tuple(stretches[:n])
            assert stretch.num_before == position
            for row in range(stretch.start, stretch.end):
                # A row is of one token, and that is every sharer's.
                assert stream.setdefault(row, sequences[i][position]) == sequences[i][position]
                position += 1
        assert position == len(sequences[i])
    assert sorted(stream) == list(range(7, 7 + len(stream)))
    # Independently: the different prefixes of whole shared blocks, and all remainders.
    shared = {
        sequences[i][: n * SHARED_BLOCK].tobytes()
        for i in some
        for n in range(1, len(paths[i]) + 1)
    }
    rests = sum(len(sequences[i]) - SHARED_BLOCK * len(paths[i]) for i in some)
    assert len(stream) == SHARED_BLOCK * len(shared) + rests


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), min_size=1, max_size=5))
def test_every_part_has_whole_blocks_of_rows_that_no_datum_sees(lengths: list[list[int]]) -> None:
    """A product with an adapter's matrices then needs no padding of its own."""
    jobs = [
        planned([datum_of(length, seed) for seed, length in enumerate(some)], part)
        for part, some in enumerate(lengths)
    ]
    (batch,) = plan_micro_batches(jobs, Limits(token_budget=10_000))
    bounds = [span.rows for span in batch.part_spans]
    assert [start for start, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert all(start % ROWS_MULTIPLE == 0 == end % ROWS_MULTIPLE for start, end in bounds)
    assert sum(end - start for start, end in bounds) - batch.scored_rows.size < sum(
        ROWS_MULTIPLE for _ in bounds
    )
    covered = [row for each in batch.row_ranges for row in range(each.start, each.end)]
    assert covered == list(range(len(batch.tokens)))
    own = {row for p in batch.datums for r in p.row_ranges for row in range(r.start, r.end)}
    for row_range in batch.row_ranges:
        of_datum = [row in own for row in range(row_range.start, row_range.end)]
        assert of_datum == sorted(of_datum, reverse=True)  # no token sees a later row
