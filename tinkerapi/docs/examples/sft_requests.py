"""Supervised fine-tuning over HTTP: an adapter learns one answer.

pip install requests
python sft_requests.py
"""

import os

import requests

URL = os.environ.get("TINKER_BASE_URL", "http://localhost:8000")
KEY = os.environ.get("TINKER_API_KEY")  # programs on the server's machine may need none
STEPS = int(os.environ.get("STEPS", "8"))
LEARNING_RATE = float(os.environ.get("LEARNING_RATE", "1e-3"))
RUN = os.environ.get("RUN", "example-sft")

CONVERSATION = [
    {"role": "user", "content": "What is the secret word?"},
    {"role": "assistant", "content": "The secret word is pineapple."},
]

session = requests.Session()
if KEY:
    session.headers["X-API-Key"] = KEY


def call(path, **body):
    """The result of one request; a refusal raises, and its text names the field."""
    answer = session.post(URL + path, json=body)
    if not answer.ok:
        raise SystemExit(f"{path}: {answer.status_code} {answer.text}")
    return answer.json()


losses = []
for step in range(1, STEPS + 1):
    # The gradient is added to the adapter's; the step applies it. The first call makes the adapter.
    result = call(
        "/api/v1/forward_backward", model_id=RUN, data=[CONVERSATION], loss_fn="cross_entropy"
    )
    call("/api/v1/optim_step", model_id=RUN, adam_params={"learning_rate": LEARNING_RATE})
    losses.append(result["loss"])
    print(f"step {step:3}  loss {result['loss']:.4f}")

answer = call(
    "/api/v1/sample",
    model_id=RUN,
    messages=CONVERSATION[:1],
    sampling_params={"max_tokens": 40, "temperature": 0},
)
print(f"{CONVERSATION[0]['content']} -> {answer['generated_text']}")
