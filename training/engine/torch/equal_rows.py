"""Asks Intel's MKL for float32 products in which the number of rows shows in no row's bits.

On AMD's processors torch's products have this property unasked (measured on EPYC). On Intel's, MKL
has kernels for few rows that sum in another order: a row of up to 96 had other bits among more of
them where the product was scaled, and one of four rows with 128 columns always (measured on a Xeon
with AMX, MKL 2024.2). In the strict mode of its "conditional numerical reproducibility" it had the
same in every shape that was tried, and took no longer.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

VARIABLE = "MKL_CBWR"
"""MKL reads it once, at the first product of a process."""

CPU_INFO = Path("/proc/cpuinfo")


def ask_for_equal_rows() -> None:
    """Set ``VARIABLE`` on an Intel processor, unless it is set; call it before the first
    product."""
    branch = torch.backends.cpu.get_cpu_capability()
    if is_intel() and branch in ("AVX2", "AVX512"):
        os.environ.setdefault(VARIABLE, f"{branch},STRICT")


def is_intel() -> bool:
    """Whether this is an Intel processor; False where the system does not tell."""
    try:
        return "GenuineIntel" in CPU_INFO.read_text()
    except OSError:
        return False
