"""Reinforcement learning with the tinker SDK: digits are rewarded, and the reward rises.

    pip install tinker transformers requests
    export TINKER_BASE_URL=http://localhost:8000 TINKER_API_KEY=tml-...
    python rl.py

Every step samples a group of answers to one prompt, gives each its advantage (its reward above the
group's mean), and trains on the sampled tokens with importance_sampling. The program records the
reward, so the console draws it beside the policy's curves, and shows the sampled texts.
"""

import os

import requests
import tinker
from tinker import types

STEPS = int(os.environ.get("STEPS", "15"))
GROUP = int(os.environ.get("GROUP", "16"))
LEARNING_RATE = float(os.environ.get("LEARNING_RATE", "3e-4"))

PROMPT = [{"role": "user", "content": "Tell me your phone number."}]

service = tinker.ServiceClient()
base_model = service.get_server_capabilities().supported_models[0].model_name
client = service.create_lora_training_client(
    base_model=base_model, rank=16, seed=1, user_metadata={"name": "rl example: digits"}
)
tokenizer = client.get_tokenizer()
prompt = tokenizer.apply_chat_template(
    PROMPT, tokenize=True, return_dict=False, add_generation_prompt=True
)


def reward_of(text):
    """The share of characters that are digits."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def record(step, **metrics):
    """Show numbers of our own in the console."""
    url = f"{os.environ['TINKER_BASE_URL']}/api/v1/runs/{client.model_id}/metrics"
    headers = {"X-API-Key": os.environ["TINKER_API_KEY"]}
    answer = requests.post(url, json={"step": step, "metrics": metrics}, headers=headers)
    answer.raise_for_status()


rewards = []
for step in range(1, STEPS + 1):
    sampler = client.save_weights_and_get_sampling_client()
    group = (
        sampler.sample(
            types.ModelInput.from_ints(prompt),
            num_samples=GROUP,
            sampling_params=types.SamplingParams(max_tokens=24, temperature=1.0, seed=step),
        )
        .result()
        .sequences
    )
    texts = [tokenizer.decode(sequence.tokens, skip_special_tokens=True) for sequence in group]
    values = [reward_of(text) for text in texts]
    mean = sum(values) / len(values)
    data = []
    for sequence, value in zip(group, values, strict=True):
        tokens = prompt + list(sequence.tokens)
        # Position t predicts token t + 1; the prompt's positions have no advantage.
        before = [0.0] * (len(prompt) - 1)
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": tokens[1:],
                    "logprobs": before + list(sequence.logprobs),
                    "advantages": before + [value - mean] * len(sequence.tokens),
                },
            )
        )
    passed = client.forward_backward(data, "importance_sampling")
    stepped = client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
    passed.result(), stepped.result()
    record(step, reward=mean)
    rewards.append(mean)
    print(f"step {step:3}  reward {mean:.3f}  {'#' * round(40 * mean)}", flush=True)

print(f"an answer: {texts[0]!r}")
service.close("success").result()
