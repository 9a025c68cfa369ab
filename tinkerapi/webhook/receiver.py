"""One attempt: the signed request, and what the receiver said.

The signature is that of the Standard Webhooks specification, for which libraries exist.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import time

import httpx2
import orjson

from tinkerapi.config.webhook import WebhookConfig
from tinkerapi.models import Delivery

logging.getLogger("httpx2").setLevel(logging.WARNING)  # its lines would contain the URL

ATTEMPT_SECONDS = 10.0
"""Longest time of a whole attempt, from the look-up of the name to the answer's status."""


class NotTaken(Exception):
    """The receiver did not take the event; why, without its URL."""


def send(config: WebhookConfig, delivery: Delivery, *, seconds: float = ATTEMPT_SECONDS) -> None:
    """Post the event once. Only the answer's status counts; its body is not read.

    Raises:
        NotTaken: There was no answer in time, or one that is not 2xx.
    """
    body = message_body(delivery)
    headers = signed_headers(config.secret, delivery.message_id, int(time.time()), body)
    try:
        status = asyncio.run(_post(config.url, headers, body, seconds))
    except TimeoutError:
        raise NotTaken(f"no answer within {seconds:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        # Not the error's own words, which may repeat the URL.
        raise NotTaken(f"it cannot be reached ({type(error).__name__})") from None
    if 300 <= status < 400:
        raise NotTaken(f"status {status}; redirects are not followed")
    if not 200 <= status < 300:
        raise NotTaken(f"status {status}")


def message_body(delivery: Delivery) -> bytes:
    """The event in JSON, the same at each attempt."""
    return orjson.dumps(
        {
            "type": delivery.event,
            "timestamp": delivery.at.isoformat(),
            "text": delivery.text,
            "data": {"status": delivery.status, "subject": delivery.subject},
        }
    )


def signed_headers(key: bytes, message_id: str, seconds: int, body: bytes) -> dict[str, str]:
    """The headers by which the receiver knows sender, repeats and age.

    Args:
        seconds: The attempt's time, since 1970.
    """
    signed = f"{message_id}.{seconds}.".encode() + body
    signature = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return {
        "Content-Type": "application/json",
        "User-Agent": "tinkerapi",
        "webhook-id": message_id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": f"v1,{signature}",
    }


async def _post(url: str, headers: dict[str, str], body: bytes, seconds: float) -> int:
    # One limit for the whole: those of a client are for each read, which a slow answer renews.
    async with (
        asyncio.timeout(seconds),
        httpx2.AsyncClient(follow_redirects=False, timeout=None) as client,
        client.stream("POST", url, headers=headers, content=body) as answer,
    ):
        return int(answer.status_code)
