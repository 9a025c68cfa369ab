"""The limits of all images of one request together."""

from __future__ import annotations

from collections.abc import Iterable

from django.conf import settings

from training.errors import LimitExceeded
from training.images import Image, read_size


def images_check(images: Iterable[Image], where: str) -> None:
    """Refuse more images, or more pixels in all, than one request may have.

    A worker decodes each image, and the time for that grows with its pixels, while a file of a few
    kilobytes may have millions of them.

    Raises:
        LimitExceeded: (400)
    """
    given = list(images)
    if len(given) > settings.MAX_IMAGES:
        raise LimitExceeded(
            f"{where}: {len(given)} images; this server takes {settings.MAX_IMAGES} in one request"
        )
    sizes = [read_size(image.data, image.format) for image in given]
    num_pixels = sum(size.num_pixels for size in sizes if size is not None)
    if num_pixels > settings.MAX_REQUEST_PIXELS:
        raise LimitExceeded(
            f"{where}: {len(given)} images of {num_pixels} pixels in all; this server takes "
            f"{settings.MAX_REQUEST_PIXELS} pixels in one request: send smaller images, or fewer "
            "at a time"
        )
