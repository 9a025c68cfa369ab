"""Folders as people have them: what is wrong with each is said in one true sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.platform.model_folders import make_model_folder, weights
from training.model_folder import model_folder_problem

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model")


def configure(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(values))


def without_weights(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(weights())


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "gptq", "awq", "aqlm", "compressed-tensors", "hqq", "torchao", "quanto"],
)
@pytest.mark.parametrize("where", ["top", "text_config"])
def test_quantized_weights_are_refused_by_their_method(folder, method, where):
    quantization = {"quantization_config": {"quant_method": method}}
    configure(folder, **(quantization if where == "top" else {where: quantization}))
    assert f"quantized by {method}, which this server does not train on; give it" in str(
        model_folder_problem(folder)
    )


@pytest.mark.parametrize(("method", "undo"), [("mxfp4", "Mxfp4"), ("fp8", "FineGrainedFP8")])
def test_quantized_weights_that_transformers_can_undo_say_how(folder, method, undo):
    configure(folder, quantization_config={"quant_method": method})
    problem = str(model_folder_problem(folder))
    assert f"transformers.{undo}Config(dequantize=True) and save it" in problem
    import transformers

    assert getattr(transformers, f"{undo}Config")(dequantize=True).dequantize


@pytest.mark.parametrize(
    ("values", "file", "method"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, None, "mlx"),
        ({"quantization_config": {"bits": 4}}, None, "an unknown method"),
        ({"compression_config": {"quant_method": "x"}}, None, "x"),
        ({}, "quantize_config.json", "gptq"),
        ({}, "quant_config.json", "awq"),
        ({}, "hf_quant_config.json", "modelopt"),
    ],
)
def test_older_and_other_ways_to_say_quantized_are_known(folder, values, file, method):
    configure(folder, **values)
    if file:
        (folder / file).write_text("{}")
    assert f"quantized by {method}, which" in str(model_folder_problem(folder))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["pytorch_model.bin"], "weights in pytorch_model.bin, a pickle"),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            "weights in pytorch_model-00001-of-00002.bin, a pickle",
        ),
        (["consolidated.00.pth"], "weights in consolidated.00.pth, a pickle"),
        (["m-q4_k_m.gguf"], "weights in m-q4_k_m.gguf, a GGUF file"),
        (["tf_model.h5"], "weights in tf_model.h5, a format of TensorFlow"),
        (["flax_model.msgpack"], "weights in flax_model.msgpack, a format of TensorFlow"),
        (["consolidated.safetensors"], "consolidated.safetensors, but not model.safetensors"),
        ([SHARDS[0]], f"{SHARDS[0]}, but not model.safetensors.index.json"),
        (["training_args.bin", "optimizer.pt"], "has no weights"),
        ([], "has no weights"),
    ],
)
def test_other_weights_are_named_and_not_opened(folder, names, sentence):
    without_weights(folder, *names)
    assert sentence in str(model_folder_problem(folder))


def test_a_gguf_file_or_folder_is_not_taken_for_something_else(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert str(model_folder_problem(path)).startswith(f"{path} is a GGUF file")
    assert f"{tmp_path} has its weights in m.gguf" in str(model_folder_problem(tmp_path))
    path.unlink()
    assert "it has no config.json" in str(model_folder_problem(tmp_path))


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS)}}
    without_weights(folder, *SHARDS)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_folder_problem(folder) is None
    (folder / SHARDS[1]).unlink()
    assert f"lacks {SHARDS[1]}, which its index names" in str(model_folder_problem(folder))
    (folder / SHARDS[2]).unlink()
    assert f"lacks {SHARDS[1]} and 1 more" in str(model_folder_problem(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "is not an index of weights" in str(model_folder_problem(folder))


def test_an_adapter_is_no_base_model(folder):
    adapter = {"base_model_name_or_path": "somebody/base"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    assert "holds an adapter beside the model" in str(model_folder_problem(folder))
    (folder / "config.json").unlink()
    problem = str(model_folder_problem(folder))
    assert "is an adapter and no model; serve 'somebody/base', and import the adapter" in problem
    (folder / "adapter_config.json").write_text("{")
    assert "serve its base model" in str(model_folder_problem(folder))


def test_a_pointer_of_git_lfs_is_not_taken_for_broken_weights(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_bytes(pointer)
    assert "is a pointer of Git LFS" in str(model_folder_problem(folder))


def test_a_whole_folder_has_no_problem(folder):
    assert model_folder_problem(folder) is None
