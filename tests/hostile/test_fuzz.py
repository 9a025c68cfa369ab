"""Bodies with anything changed anywhere: read or refused, and no number is left unconsumed.

A few hundred of each kind with the suite; ``HOSTILE=all python -m pytest tests/hostile`` runs ten
thousand of each. The cases are the same at every run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from google.protobuf.message import DecodeError

from tests.hostile.conftest import NUMBERED, WHOLE, Attacker
from tests.hostile.examples import examples
from tests.hostile.values import LONG, VALUES
from tests.sdk.official_sdk import sdk_datum, sdk_message
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.sdk import tinker_public_pb2 as pb

CASES = 10_000 if WHOLE else 300

SHORT_VALUES = [
    text.encode("utf-8", "surrogatepass") for text in VALUES.values() if len(text) < LONG
]
JSON_PIECES = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"e9", b"-", b".", b"null", b'"model_id"', b'"seq_id"', *SHORT_VALUES),
]
PROTO_PIECES = [
    *(b"\0", b"\xff" * 10, b"\x7f", b"\x80", b"\x1a\0", b"\x0a\x02", b"\x7b", b"\x7c"),
    *(b"\xff" * 7 + b"\x7f", b"\xed\xa0\x80", b"\0\0\xc0\x7f", b"\0\0\x80\xff"),
]


def mutated(body: bytes, pieces: list[bytes], chance: random.Random) -> bytes:
    """The body with one to four bytes or stretches changed, moved, repeated, added or lost."""
    for _ in range(chance.randint(1, 4)):
        at, to = sorted(chance.randint(0, len(body)) for _ in range(2))
        to = min(to, at + chance.choice((0, 1, 4, 40, len(body))))
        piece = chance.choice(pieces)
        changed = bytes([chance.randrange(256)])
        stretch = body[at:to]
        body = chance.choice(
            (
                body[:at] + piece + body[to:],
                body[:at] + piece + body[at:],
                body[:at] + body[to:],
                body[:at] + changed + body[at + 1 :],
                body[:at] + stretch + body[at:],
                body[:at] + stretch[::-1] + body[to:],
                body[:to],
            )
        )
    return body


def token_swapped(body: bytes, pieces: list[bytes], chance: random.Random) -> bytes:
    """The JSON with the value of one or two members replaced by a hostile one, all else whole."""
    for _ in range(chance.randint(1, 2)):
        parts = body.split(b": ")
        at = chance.randrange(1, len(parts)) if len(parts) > 1 else 0
        end = len(parts[at]) - len(parts[at].lstrip(b'"')) or 1
        while end < len(parts[at]) and parts[at][end : end + 1] not in b",]}":
            end += 1
        parts[at] = chance.choice(pieces) + parts[at][end:]
        body = b": ".join(parts)
    return body


def protobuf_ids(body: bytes) -> tuple[str, int] | None:
    """The library's reading of a valid message."""
    try:
        message = pb.ForwardBackwardIds.FromString(body)
    except DecodeError:
        return None
    return message.model_id, message.seq_id


def test_protobuf(attacker: Attacker) -> None:
    chance = random.Random(20)  # noqa: S311
    data = [
        sdk_datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0.5, 1.0, 0.0]),
        sdk_datum([9], target_tokens=[[1, 2]], weights=[[0.25, 0.75]]),
    ]
    model = attacker.ids["sdk_model"]
    for count in range(1, CASES + 1):
        attacker.seq_id += 1
        message = sdk_message(
            data[: chance.randint(1, 2)],
            model_id=model,
            seq_id=attacker.seq_id,
            config={"beta": 0.1, "kl": "x"} if chance.random() < 0.3 else None,
            loss_fn=chance.choice(("cross_entropy", "ppo", "custom")),
        )
        body = mutated(message.SerializeToString(), PROTO_PIECES, chance)
        answer = attacker.send(
            "POST", "/api/v1/forward_backward", body, sdk=True, content_type=PROTOBUF
        )
        attacker.check_number(protobuf_ids(body), body, answer)
        if count % 250 == 0:
            attacker.settle(f"case {count}")
    attacker.check()
    print(f"{attacker.requests} requests: {sorted(attacker.statuses.items())}")  # noqa: T201


def test_json(attacker: Attacker) -> None:
    chance = random.Random(21)  # noqa: S311
    found = [
        example
        for example in examples(attacker.ids, attacker.base_model)
        if example.body is not None
    ]
    changes: list[Callable[[bytes, list[bytes], random.Random], bytes]] = [mutated, token_swapped]
    for count in range(1, CASES + 1):
        example = chance.choice(found)
        text = json.dumps(attacker.next_body(example.body)).encode()
        change = chance.choice(changes)
        body = change(text, JSON_PIECES if change is mutated else SHORT_VALUES, chance)
        if NUMBERED.match(example.path) and example.sdk and "model_id" in example.body:
            attacker.numbered(example, body)
        else:
            attacker.seq_id -= 1
            attacker.send(example.method, example.path, body, sdk=example.sdk)
        if count % 250 == 0:
            attacker.settle(f"case {count}")
    attacker.check()
    print(f"{attacker.requests} requests: {sorted(attacker.statuses.items())}")  # noqa: T201
