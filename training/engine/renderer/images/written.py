"""Conversations with images: what their images are in text and in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.engine.renderer.chat_template import ChatTemplate, Message
from training.engine.renderer.images.reader import ImageReader, ReadImage
from training.errors import InvalidRequest
from training.images import Chunks, Image, PlacedImage
from training.types import ChatOptions, TokenPrompt


class TemplateWithImages(ChatTemplate):
    """A chat template that writes each image's text in place of the mark for an image."""

    def __init__(self, template: ChatTemplate, mark: str, written: Sequence[str]) -> None:
        """
        Args:
            mark: What the template writes for an image.
            written: The texts of a conversation's images, in order.
        """
        vars(self).update(vars(template))
        self._mark, self._written = mark, written

    def render(self, messages: Sequence[Message], options: ChatOptions, **how: bool) -> str:
        first, *others = super().render(messages, options, **how).split(self._mark)
        if len(others) > len(self._written):
            raise InvalidRequest(
                "messages: the model's chat template writes more images than the messages have"
            )
        return first + "".join(
            written + text for written, text in zip(self._written, others, strict=False)
        )


def images_of_messages(messages: Sequence[Message]) -> dict[str, Image]:
    """The images of a conversation by their places, in order."""
    found: dict[str, Image] = {}
    for n, message in enumerate(messages):
        content = message.get("content")
        for index, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, Mapping) and isinstance(part.get("image"), Image):
                found[f"messages[{n}].content[{index}]"] = part["image"]
    return found


def read_images(reader: ImageReader, images: Mapping[str, Image]) -> list[ReadImage]:
    """Decode and process images.

    Raises:
        InvalidRequest: One of them cannot be read; the message begins with its place.
    """
    read = []
    known: dict[bytes, ReadImage] = {}
    for place, image in images.items():
        try:
            if image.digest not in known or image.expected_tokens is not None:
                known[image.digest] = reader.read(image)
        except InvalidRequest as error:
            raise InvalidRequest(f"{place}: {error}") from error
        read.append(known[image.digest])
    return read


def find_images(
    ids: Sequence[int], images: Sequence[Image], read: Sequence[ReadImage]
) -> tuple[PlacedImage, ...]:
    """Where a conversation's tokens have its images, each after the one before.

    Raises:
        InvalidRequest: One of them is missing: the template does not write it.
    """
    tokens = np.asarray(ids, np.int32)
    placed: list[PlacedImage] = []
    at = 0
    for image, each in zip(images, read, strict=True):
        length = len(each.tokens)
        while at + length <= len(tokens) and (tokens[at : at + length] != each.tokens).any():
            at += 1
        if at + length > len(tokens):
            raise InvalidRequest(
                "messages: the model's chat template does not write all images of the messages; "
                "send tokens and images as chunks instead"
            )
        placed.append(PlacedImage(image=image, start=at, num_tokens=length))
        at += length
    return tuple(placed)


def place_chunks(reader: ImageReader, chunks: Chunks) -> TokenPrompt:
    """Token ids and images as one sequence of tokens; see ``Renderer.place_images``."""
    named = {f"chunks[{n}]": c for n, c in enumerate(chunks.chunks) if isinstance(c, Image)}
    read = iter(read_images(reader, named))
    arrays: list[Any] = [np.empty(0, np.int32)]
    placed: list[PlacedImage] = []
    start = 0
    for chunk in chunks.chunks:
        array = next(read).tokens if isinstance(chunk, Image) else chunk
        if isinstance(chunk, Image):
            placed.append(PlacedImage(image=chunk, start=start, num_tokens=len(array)))
        arrays.append(array)
        start += len(array)
    return TokenPrompt(tokens=np.concatenate(arrays).astype(np.int32), images=tuple(placed))
