"""The flags that this server sends to the SDK, each with its reason.

A flag that is not listed here keeps the SDK's default on purpose: the sizes of the client's own
buffers, its retries, its HTTP library.
"""

from __future__ import annotations

from typing import Any

from django.conf import settings

CHUNK_BYTES = 5_000_000
"""The SDK's default size of a chunk, by its own estimate before compression."""


def client_flags() -> dict[str, Any]:
    """The answer of ``client/config``, which a client asks for once. A flag may not be null."""
    return {
        # A key is enough; a token is only needed for ``whoami``.
        "pjwt_auth_enabled": settings.SDK_JWT,
        # Requests may arrive out of order, so sending them one by one has no benefit.
        "parallel_fwdbwd_chunks": True,
        # The server stores a loss that the client traced, and runs it within one request.
        "custom_loss_server_side": True,
        # The server decompresses bodies, and 64 datums of 512 tokens shrink to a fifth.
        "proto_compress_fwdbwd": True,
        # One long poll for all samples of a client instead of one for each of up to 2000.
        "sample_use_retrieve_futures": True,
        # The limits of one request; halved, because the estimate ignores names and shapes.
        "fwdbwd_max_chunk_len": min(1024, settings.MAX_DATUMS),
        "fwdbwd_max_chunk_bytes_count": min(CHUNK_BYTES, settings.MAX_BODY_BYTES // 2),
        # Clones of a sampling client number their requests from the server's count of them, so
        # that no two ever use one number.
        "sample_join_sampling_session": True,
    }


def dynamic_flags() -> dict[str, Any]:
    """The answer of ``client/dynamic_config``, which a client asks for every five minutes."""
    return {
        # Requests that no client waits for any more are not begun.
        "sample_cancel_enabled": True,
    }
