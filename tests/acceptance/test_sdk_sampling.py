"""The official tinker SDK, unmodified: samples of base models, of checkpoints, of live models.

Each test is a user's script. The model is tiny, so that the protocol is what takes the time.
"""

from __future__ import annotations

import pytest

from tests.acceptance.official_sdk import run_script
from tests.server import Server

pytestmark = pytest.mark.acceptance

_PROLOGUE = """
prompt = types.ModelInput.from_ints([5, 6, 7, 8])

def params(**more):
    return types.SamplingParams(**{"max_tokens": 8, "seed": 3, "stop": [], **more})

def sampled(client, **more):
    result = client.sample(prompt=prompt, num_samples=2, sampling_params=params(**more)).result()
    return [list(sequence.tokens) for sequence in result.sequences]
"""


def test_a_base_model_is_sampled_and_its_logprobs_are_those_of_compute_logprobs(
    sdk_server: Server,
) -> None:
    facts = run_script(
        sdk_server,
        _PROLOGUE
        + """
client = service.create_sampling_client(base_model=BASE_MODEL)
result = client.sample(
    prompt=prompt, num_samples=2, sampling_params=params(), include_prompt_logprobs=True
).result()
sequence = result.sequences[0]
whole = types.ModelInput.from_ints([5, 6, 7, 8, *sequence.tokens])
report(
    tokens=list(sequence.tokens), logprobs=list(sequence.logprobs),
    number=len(result.sequences), reason=str(sequence.stop_reason),
    names=[item.sequence_id for item in result.sequences],
    prompt=list(result.prompt_logprobs), scored=list(client.compute_logprobs(whole).result()),
)
greedy = [sampled(client, temperature=0.0, seed=seed) for seed in (1, 2)]
report(greedy=greedy)
""",
    )

    assert facts["number"] == len(set(facts["names"])) == 2
    assert len(facts["tokens"]) == 8
    assert "length" in facts["reason"].lower()
    assert facts["prompt"][0] is facts["scored"][0] is None
    assert facts["scored"][1:4] == pytest.approx(facts["prompt"][1:], abs=1e-4)
    assert facts["scored"][4:] == pytest.approx(facts["logprobs"], abs=1e-4)
    assert facts["greedy"][0] == facts["greedy"][1]
    assert facts["greedy"][0][0] == facts["greedy"][0][1]


def test_samplers_stay_as_they_were_saved_whatever_way_they_were_made(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        _PROLOGUE
        + """
import pickle

model = new_model(seed=1)

def train():
    for _ in range(3):
        model.forward_backward([datum([5, 6, 7, 8, 9])], "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=5e-2)).result()

train()
path = model.save_weights_for_sampler("first").result().path
live = model.save_weights_and_get_sampling_client()
named = service.create_sampling_client(model_path=path)
base = service.create_sampling_client(base_model=BASE_MODEL)
texts = {"named": sampled(named), "live": sampled(live), "base": sampled(base)}
train()
texts["later"] = sampled(named)
texts["trained"] = sampled(model.save_weights_and_get_sampling_client())
texts["clone"] = sampled(pickle.loads(pickle.dumps(named)))
report(**texts)
try:
    sampled(service.create_sampling_client(model_path="tinker://nobody/sampler_weights/none"))
    report(missing=None)
except tinker.APIStatusError as error:
    report(missing=error.status_code)
try:
    named.sample(prompt=types.ModelInput.from_ints([10**6]), num_samples=1,
                 sampling_params=params()).result()
    report(failed=None)
except tinker.TinkerError as error:
    report(failed=str(error))
""",
    )

    texts = [facts[name] for name in ("named", "live", "later", "clone")]
    assert all(text == texts[0] for text in texts)
    assert texts[0] != facts["base"]
    assert texts[0] != facts["trained"]
    assert facts["missing"] == 404
    assert "vocabulary" in facts["failed"]


def test_two_hundred_samples_at_once_all_arrive_through_one_poller(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        _PROLOGUE
        + """
from tinker.resources.futures import AsyncFuturesResource

polls = {"retrieve_multi": 0}
retrieve_multi = AsyncFuturesResource.retrieve_multi

async def counted(self, *args, **more):
    polls["retrieve_multi"] += 1
    return await retrieve_multi(self, *args, **more)

AsyncFuturesResource.retrieve_multi = counted
client = service.create_sampling_client(base_model=BASE_MODEL)
futures = [
    client.sample(prompt=prompt, num_samples=1, sampling_params=params(seed=i % 100))
    for i in range(200)
]
texts = [list(future.result().sequences[0].tokens) for future in futures]
report(number=len(texts), same=texts[:100] == texts[100:], different=len(set(map(tuple, texts))),
       polls=polls["retrieve_multi"])
""",
    )

    assert facts["number"] == 200
    assert facts["polls"] > 0
    assert facts["same"]
    assert facts["different"] > 50


def test_every_score_can_be_asked_for_and_agrees_with_compute_logprobs(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        _PROLOGUE
        + """
import torch

client = service.create_sampling_client(base_model=BASE_MODEL)
ids = torch.full((3, 2), -1, dtype=torch.int64)
ids[0, 1], ids[2, 0] = 6, 8  # the prompt's own tokens at 1 and 3
forms = {
    "dense": types.TensorData.from_torch(ids),
    "sparse": types.TensorData.from_torch_sparse(ids, pad_value=-1),
}
for name, target in forms.items():
    result = client.sample(
        prompt=prompt, num_samples=1, sampling_params=params(temperature=0.0),
        include_prompt_logprobs=True, prompt_logprobs_last_n=2, topk_prompt_logprobs=300,
        topk_sample_logprobs=2, target_prompt_logprobs=target, prompt_alt_tokens_k=2,
    ).result()
    report(**{name: result.target_prompt_logprobs.to_torch().to_dense().tolist()})
report(
    prompt=list(result.prompt_logprobs), top=result.topk_prompt_logprobs,
    sampled=result.sequences[0].topk_logprobs, tokens=list(result.sequences[0].tokens),
    alternatives=result.prompt_alt_tokens.tokens.to_torch().tolist(),
    scored=list(client.compute_logprobs(prompt).result()),
)
""",
    )

    scored = facts["scored"]
    for name in ("dense", "sparse"):
        expected = [[0.0, scored[1]], [0.0, 0.0], [scored[3], 0.0]]
        for row, wanted in zip(facts[name], expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)
    assert facts["prompt"][:2] == facts["top"][:2] == [None, None]
    assert facts["prompt"][2:] == pytest.approx(scored[2:], abs=1e-4)
    assert dict(facts["top"][3])[8] == pytest.approx(scored[3], abs=1e-4)
    assert [row[0][0] for row in facts["sampled"]] == facts["tokens"]  # greedy
    assert facts["alternatives"][2] == [facts["top"][3][0][0]] * 2


def test_the_ratio_of_an_on_policy_token_is_one(sdk_server: Server) -> None:
    """With an advantage of 1 the loss of a token is minus its ratio."""
    facts = run_script(
        sdk_server,
        _PROLOGUE
        + """
model = new_model(seed=2)
model.forward_backward([datum([5, 6, 7, 8, 9])], "cross_entropy")
model.optim_step(types.AdamParams(learning_rate=5e-2)).result()
client = model.save_weights_and_get_sampling_client()
result = client.sample(
    prompt=prompt, num_samples=2, sampling_params=params(max_tokens=40)
).result()
data, sampled_logprobs = [], []
for sequence in result.sequences:
    tokens = [5, 6, 7, 8, *sequence.tokens]
    sampled_logprobs.append(list(sequence.logprobs))
    data.append(types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * 3 + list(sequence.logprobs),
            "advantages": [0.0] * 3 + [1.0] * len(sequence.tokens),
        },
    ))
losses = {}
for loss_fn in ("importance_sampling", "ppo"):
    output = model.forward_backward(data, loss_fn).result()
    losses[loss_fn] = output.metrics["loss:sum"]
trained = [list(each["logprobs"].data)[3:] for each in output.loss_fn_outputs]
scored = [
    list(client.compute_logprobs(
        types.ModelInput.from_ints([5, 6, 7, 8, *sequence.tokens])
    ).result())[4:]
    for sequence in result.sequences
]
report(losses=losses, sampled=sampled_logprobs, trained=trained, scored=scored)
""",
    )

    num_tokens = sum(map(len, facts["sampled"]))
    assert num_tokens == 80
    assert facts["losses"] == {"importance_sampling": -num_tokens, "ppo": -num_tokens}
    assert facts["sampled"] == facts["trained"] == facts["scored"]
