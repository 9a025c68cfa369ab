"""The flags by which this server tells the SDK how to behave; each with its reason.

A flag that is not here has the SDK's default, and that is right: the sizes of the client's own
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
        # A key speaks for itself; a token is only needed where people want ``whoami``.
        "pjwt_auth_enabled": settings.SDK_JWT,
        # Requests may arrive out of order, so nothing is gained by sending them one by one.
        "parallel_fwdbwd_chunks": True,
        # A loss that the client traced is kept, and run beside the model in one request.
        "custom_loss_server_side": True,
        # Bodies are opened here, and 64 datums of 512 tokens shrink to a fifth.
        "proto_compress_fwdbwd": True,
        # One held poll for a client's samples instead of one for each of up to 2000.
        "sample_use_retrieve_futures": True,
        # What one request may hold here; the estimate leaves out names and shapes, hence the half.
        "fwdbwd_max_chunk_len": min(1024, settings.MAX_DATUMS),
        "fwdbwd_max_chunk_bytes_count": min(CHUNK_BYTES, settings.MAX_BODY_BYTES // 2),
        # Clones of a sampling client number their requests from the server's count of them, so
        # that no two ever use one number.
        "sample_join_sampling_session": True,
    }


def dynamic_flags() -> dict[str, Any]:
    """The answer of ``client/dynamic_config``, which a client asks for every five minutes."""
    return {
        # Work that nobody waits for any more is not begun.
        "sample_cancel_enabled": True,
    }
