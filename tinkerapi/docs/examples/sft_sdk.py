"""Supervised fine-tuning with the tinker SDK: an adapter learns one answer.

    pip install tinker transformers
    export TINKER_BASE_URL=http://localhost:8000 TINKER_API_KEY=tml-...
    python sft_sdk.py

The SDK loads the base model's tokenizer on this machine: from a folder of the base model's name
below the current one, or from the hub.
"""

import os

import tinker
from tinker import types

STEPS = int(os.environ.get("STEPS", "8"))
LEARNING_RATE = float(os.environ.get("LEARNING_RATE", "1e-3"))

QUESTION = [{"role": "user", "content": "What is the secret word?"}]
ANSWER = [{"role": "assistant", "content": "The secret word is pineapple."}]

service = tinker.ServiceClient()
base_model = service.get_server_capabilities().supported_models[0].model_name
client = service.create_lora_training_client(base_model=base_model, rank=16)
tokenizer = client.get_tokenizer()


def tokens_of(messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


prompt = tokens_of(QUESTION, add_generation_prompt=True)
tokens = tokens_of(QUESTION + ANSWER)
# Position t predicts token t + 1; only the answer is trained.
weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
datum = types.Datum(
    model_input=types.ModelInput.from_ints(tokens[:-1]),
    loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
)

losses = []
for step in range(1, STEPS + 1):
    loss = client.forward_backward([datum], "cross_entropy")  # both are sent before
    done = client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))  # either is waited for
    losses.append(loss.result().metrics["loss:sum"] / sum(weights))
    done.result()
    print(f"step {step:3}  loss {losses[-1]:.4f}")

sampler = client.save_weights_and_get_sampling_client()
sample = sampler.sample(
    types.ModelInput.from_ints(prompt),
    num_samples=1,
    sampling_params=types.SamplingParams(max_tokens=40, temperature=0),
).result()
text = tokenizer.decode(sample.sequences[0].tokens, skip_special_tokens=True)
print(f"{QUESTION[0]['content']} -> {text}")
service.close("success").result()
