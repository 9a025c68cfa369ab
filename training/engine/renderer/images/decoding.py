"""Decodes image files that clients sent, with Pillow."""

from __future__ import annotations

import warnings
from io import BytesIO

from PIL import Image as Pictures
from PIL import ImageOps

from training.errors import InvalidRequest
from training.images import Image, read_size


def decode(image: Image) -> Pictures.Image:
    """The image as transformers' ``load_image`` gives it to a processor: RGB, upright.

    Decoding takes memory in proportion to its pixels. Their number was limited when the request was
    accepted, from the header (``training.images``), so here only a decoder that has found another
    size is refused. A worker first decodes an image in a process beside it, whose memory
    and time are limited.

    Raises:
        InvalidRequest: It cannot be decoded, has several frames, or another size.
    """
    size = read_size(image.data, image.format)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its size, or about its metadata
            with Pictures.open(BytesIO(image.data), formats=[image.format]) as picture:
                if picture.size != size:
                    raise InvalidRequest(
                        f"the {image.format} file names several sizes, {picture.size} among them"
                    )
                if getattr(picture, "is_animated", False):
                    raise InvalidRequest("it is an animation; send one frame as an image")
                picture.load()
                return ImageOps.exif_transpose(picture).convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # a decoder of somebody's bytes raises anything
        what = " ".join(str(error).split())[:120]
        raise InvalidRequest(f"the {image.format} file cannot be decoded: {what}") from error
