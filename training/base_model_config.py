"""The operator's configuration of one base model, as plain values: no Django, no torch."""

from __future__ import annotations

from dataclasses import dataclass

PACKED, PADDED = "packed", "padded"
MOST_WORKERS = 64
"""Of one base model on one machine."""
MOST_RANKS = 64
"""Processes of one worker."""
LAYOUTS = ("auto", PACKED, PADDED)
DTYPES = ("auto", "bfloat16", "float32")
BUILT_IN, VLLM = "builtin", "vllm"
SAMPLERS = (BUILT_IN, VLLM)
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM permits for its largest rank."""


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """The ``[base_model.vllm]`` table: a vLLM server that ``up`` starts, or that runs elsewhere."""

    python: str = ""
    """The Python of vLLM's own environment: ``up`` starts the server with it."""
    address: str = ""
    """``http://HOST:PORT`` of a server that runs elsewhere, and sees the data folder under the same
    path. Either this or ``python``."""
    key_file: str = ""
    """A file with the key of the server at ``address``; empty: it asks for none."""
    arguments: tuple[str, ...] = ()
    """Further arguments of ``vllm serve``."""
    environment: tuple[tuple[str, str], ...] = ()
    """Further environment variables of the server, by name."""
    max_loras: int = 8
    """Adapters in one batch of the server. More take turns."""
    max_lora_rank: int = 64
    """The largest rank that the server samples from, one of ``LORA_RANKS``; memory grows with it.
    Adapters of a larger rank are sampled by the built-in sampler."""
    max_sequences: int = 256
    """Sequences that the server samples at one time."""
    wait_seconds: int = 120
    """How long requests wait for a server that is lost or starts; then the built-in sampler takes
    them."""


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """One ``[[base_model]]`` table of the configuration file."""

    name: str
    """The name that clients use."""
    path: str
    """A folder, or a name on the model hub."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``auto`` and ``cuda`` spread several base models
    over the available GPUs."""
    devices: tuple[str, ...] = ()
    """One for each rank of each of its workers, in the words of ``device``, which then is not
    used."""
    workers: int = 1
    """How many workers hold it, each with a share of its runs."""
    tp_size: int = 1
    """Ranks of a worker among which each layer is split (tensor parallelism)."""
    fsdp_size: int = 1
    """Ranks of a worker that hold a part of each layer each, and compute other sequences."""
    ep_size: int = 1
    """Ranks of a worker among which the experts of a layer are divided: 1, or ``tp_size``."""
    dtype: str = "auto"
    """The frozen weights' dtype: ``auto`` is bfloat16 if the device computes it natively."""
    layout: str = "auto"
    """The layout of sequences in a pass: ``packed`` is one stream without padding; ``padded`` is
    rows of equal length, which more families support; ``auto`` is the first of the two that
    computes what transformers computes."""
    cache_bytes: int = 0
    """Memory budget of the adapters in its worker; 0: a share of the free memory."""
    activation_bytes: int = 0
    """A training pass whose activations take more computes them again in its backward pass; 0: a
    share of the free memory."""

    sampler: str = BUILT_IN
    """``builtin`` samples in the worker; ``vllm`` asks a vLLM server for all samples that it
    computes by our definitions, and the built-in sampler for the others."""
    vllm: VllmConfig | None = None
    """The server, for ``sampler="vllm"``."""

    @property
    def num_ranks(self) -> int:
        """Processes of one worker, each on a device of its own."""
        return self.tp_size * self.fsdp_size

    @property
    def num_processes(self) -> int:
        """Processes of all its workers on one machine."""
        return self.workers * self.num_ranks

    def device_of_process(self, number: int) -> str:
        """The device that one of its processes is asked to use: the first ranks are those of the
        first worker, and the first of all has number 0."""
        return self.devices[number] if self.devices else self.device


def is_folder(path: str) -> bool:
    """Whether a path is a folder's path; otherwise it is a name on the model hub."""
    return path.startswith((".", "/", "~"))
