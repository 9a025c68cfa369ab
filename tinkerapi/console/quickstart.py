"""The first calls of a newcomer, with this server's own address and base model.

The front page and an empty dashboard show them; a test runs them as they are shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from django.conf import settings
from django.http import HttpRequest

from tinkerapi.api.keyless import is_local_host
from training.base_models import base_models

KEY = "tml-..."
"""Stands for the user's key, which the server does not know: it stores a hash."""

_CONVERSATION = (
    {"role": "user", "content": "The secret word?"},
    {"role": "assistant", "content": "Pineapple."},
)

_REQUESTS = """\
import requests  # pip install requests

url = "{url}"
headers = {headers}
conversation = [
    {question},
    {answer},
]
for step in range(6):
    answer = requests.post(
        f"{{url}}/api/v1/forward_backward",
        headers=headers,
        json={{"model_id": "my-first", "data": [conversation]}},
    )
    print(step, answer.json()["loss"])
    requests.post(
        f"{{url}}/api/v1/optim_step",
        headers=headers,
        json={{"model_id": "my-first", "adam_params": {{"learning_rate": 1e-3}}}},
    )
"""

_SDK = """\
import tinker  # pip install tinker

service = tinker.ServiceClient(base_url="{url}", api_key="{key}")
client = service.create_lora_training_client(base_model={base_model}, rank=8)
"""


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """Code to copy."""

    title: str
    note: str
    code: str


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What somebody needs to send a first request."""

    address: str
    """Without a slash at its end."""
    needs_key: bool
    snippets: list[Snippet]


def quickstart(request: HttpRequest) -> Quickstart:
    """The first calls, for the address under which the reader has reached this server."""
    address = settings.PUBLIC_URL or request.build_absolute_uri("/").rstrip("/")
    needs_key = settings.REQUIRE_API_KEY or not is_local_host(request.get_host())
    headers = {"X-API-Key": KEY} if needs_key else {}
    curl = [f"curl {address}/api/v1/forward_backward", "-H 'Content-Type: application/json'"]
    curl += [f"-H '{name}: {value}'" for name, value in headers.items()]
    body = {"model_id": "my-first", "loss_fn": "cross_entropy", "data": [_CONVERSATION]}
    curl += [f"-d '{json.dumps(body)}'"]
    question, answer = map(json.dumps, _CONVERSATION)
    python = _REQUESTS.format(
        url=address, headers=json.dumps(headers), question=question, answer=answer
    )
    sdk = _SDK.format(url=address, key=KEY, base_model=json.dumps(base_models()[0].name))
    return Quickstart(
        address=address,
        needs_key=needs_key,
        snippets=[
            Snippet(
                title="curl",
                note="makes the adapter my-first, and answers with the loss of one conversation",
                code=" \\\n  ".join(curl),
            ),
            Snippet(title="Python", note="trains it: the loss falls", code=python),
            Snippet(
                title="The tinker SDK",
                note="takes this address, and always sends a key; nothing else changes",
                code=sdk,
            ),
        ],
    )
