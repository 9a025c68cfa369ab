"""Conversations with images become the tokens that the model's own processor makes of them."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures
from transformers import AutoConfig, AutoTokenizer

from tests.engine.vision_families import save_vision_model
from tests.pictures import picture
from training.engine.interface import Renderer
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.renderer.images.decoding import decode
from training.engine.renderer.images.processor_files import load_processor
from training.engine.renderer.images.reader import ImageReader
from training.errors import InvalidRequest
from training.images import Chunks, Image

FAMILIES = ["llava", "mistral3", "gemma3", "glm46v", "qwen3_vl"]
ONE = Image(data=picture(24, 16), format="png")
TWO = Image(data=picture(30, 30, format="webp", seed=1), format="webp")
ANSWER = {"role": "assistant", "content": "It is red."}


class Model:
    """A renderer, and the processor it should agree with."""

    def __init__(self, folder: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        self.processor: Any = load_processor(folder, config, tokenizer)
        self.processor.chat_template = tokenizer.chat_template
        reader = ImageReader(self.processor, config.image_token_id)
        self.renderer: Renderer = ChatRenderer(tokenizer, len(tokenizer), images=reader)

    def expected(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        images = [
            decode(part["image"])
            for message in messages
            for part in (message["content"] if isinstance(message["content"], list) else ())
            if part["type"] == "image"
        ]
        written = self.processor.apply_chat_template(messages, tokenize=False, **options)
        batch = self.processor(
            text=[written], images=[images], add_special_tokens=False, return_tensors="np"
        )
        tokens: list[int] = batch["input_ids"][0].tolist()
        return tokens


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(save_vision_model(request.param, tmp_path_factory.mktemp(request.param)))


def asks(*parts: str | Image) -> dict[str, Any]:
    content = [
        {"type": "image", "image": part}
        if isinstance(part, Image)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


CONVERSATIONS = [
    [asks(ONE, "What is it?"), ANSWER],
    [asks("First ", ONE, " and then ", TWO, "?"), ANSWER],
    [{"role": "user", "content": "Hi."}, ANSWER, asks(TWO, TWO), ANSWER],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompts_and_training_have_the_processors_tokens(
    model: Model, messages: list[dict[str, Any]]
) -> None:
    prompt = model.renderer.render_image_prompt(messages[:-1])
    datum = model.renderer.render_conversation(messages, train_on="auto")

    expected = model.expected(messages[:-1], add_generation_prompt=True)
    assert prompt.tokens.tolist() == expected
    whole = [*datum.model_input.tolist(), int(datum.loss_fn_inputs["target_tokens"][-1])]
    assert whole[: len(expected)] == expected
    assert whole == model.expected(messages)[: len(whole)]
    trained = datum.loss_fn_inputs["weights"].nonzero()[0] + 1
    assert trained[-1] >= len(expected)
    assert len(expected) in trained
    images = [
        part["image"]
        for m in messages
        for part in m["content"]
        if isinstance(part, dict) and "image" in part
    ]
    assert [placed.image for placed in datum.images] == images
    assert [placed.start for placed in prompt.images] == [p.start for p in datum.images]
    for placed in datum.images:
        own = datum.model_input[placed.start : placed.end]
        chunk = model.renderer.place_images(Chunks(chunks=(placed.image,)))
        assert own.tolist() == chunk.tokens.tolist()


def test_another_process_reads_the_same(model: Model) -> None:
    copied: Renderer = pickle.loads(pickle.dumps(model.renderer))  # noqa: S301 - our own
    chunks = Chunks(chunks=(np.array([5], np.int32), ONE))
    assert (
        copied.place_images(chunks).tokens.tolist()
        == model.renderer.place_images(chunks).tokens.tolist()
    )


def test_only_answers_are_trained_beside_images(model: Model) -> None:
    for train_on, messages in (("all", CONVERSATIONS[0]), ("auto", [asks(ONE, "hi")])):
        with pytest.raises(InvalidRequest, match="train_on: with images only the assistant's"):
            model.renderer.render_conversation(messages, train_on=train_on)


def test_an_expected_number_of_tokens_is_compared(model: Model) -> None:
    right = len(model.renderer.place_images(Chunks(chunks=(ONE,))).tokens)
    for expected in (right, right + 1):
        image = Image(data=ONE.data, format="png", expected_tokens=expected)
        chunks = Chunks(chunks=(np.array([5], np.int32), image))
        if expected == right:
            assert len(model.renderer.place_images(chunks).tokens) == 1 + right
        else:
            with pytest.raises(InvalidRequest, match=rf"^chunks\[1\]: .* makes {right} tokens"):
                model.renderer.place_images(chunks)


def test_a_template_that_reads_parts_only_gets_parts(tmp_path: Path) -> None:
    folder = save_vision_model("llava", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>"
        "{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = AutoConfig.from_pretrained(folder)
    reader = ImageReader(load_processor(folder, config, tokenizer), config.image_token_id)
    renderer = ChatRenderer(tokenizer, len(tokenizer), images=reader)

    plain = renderer.render_prompt([{"role": "user", "content": "hi"}])

    assert renderer.conversation_fault is None
    assert "hi" in renderer.decode(plain)
    assert len(renderer.render_image_prompt([asks("hi", ONE)]).images) == 1


def test_an_image_is_decoded_as_transformers_loads_it() -> None:
    """Upright by its metadata, without transparency."""
    turned = Pictures.new("RGB", (8, 4), "red")
    turned.putpixel((0, 0), (0, 0, 255))
    exif = Pictures.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = BytesIO()
    turned.save(file, "png", exif=exif)
    clear = BytesIO()
    Pictures.new("RGBA", (3, 2), (255, 0, 0, 0)).save(clear, "png")

    upright = decode(Image(data=file.getvalue(), format="png"))
    assert upright.size == (4, 8)
    assert upright.getpixel((3, 0)) == (0, 0, 255)
    assert decode(Image(data=clear.getvalue(), format="png")).getpixel((0, 0)) == (255, 0, 0)
