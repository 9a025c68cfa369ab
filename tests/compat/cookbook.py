"""Run recipes of the tinker-cookbook against a whole server, and keep their numbers.

    python -m tests.compat.cookbook PYTHON [RECIPE ...]

PYTHON is the interpreter of an environment that has ``tinker-cookbook``, and for ``rl_loop`` also
``pylatexenc`` and ``math-verify``; together they are too large to be asked for by our tests. The
model is the default one; neither a model hub nor a data set is fetched. Writes ``cookbook.json``
and the table in ``tinkerapi/docs/sdk.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from tests.compat.old_clients import commit
from tests.compat.tables import markdown_table, write_table
from tests.server import Server, free_port

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUMBERS: Mapping[str, str] = {
    "sl_loop": "train_mean_nll",
    "supervised": "train_mean_nll",
    "prompt_distillation": "train_mean_nll",
    "dpo": "dpo_loss",
    "on_policy_distillation": "teacher_kl",  # its teacher is what sl_loop saves
    "rl_loop": "reward",
}
"""The metric of each recipe; a reward should rise, all others should fall."""
RESULTS = Path(__file__).parent / "cookbook.json"
RECIPE_SECONDS = 600

THINGS = ("the sea", "a stone", "my door", "the moon", "a horse", "this book", "the rain", "a star")
LANGUAGES = {
    "de": "Das ist der Weg, und er ist nicht weit.",
    "fr": "Merci, le pain est sur la table avec des fruits.",
    "es": "Gracias, la casa no es de la familia.",
    "tr": "Bir ev ve bir araba var ama yol yok.",
}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_folder(folder: Path, models: Path) -> None:
    """Make the recipes' tokenizer and data sets, under the hub's names."""
    for model in models.iterdir():
        link = folder / model.name.replace("--", "/")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(model)
    pirate = [
        chat(f"{verb} {thing}?", f"Arr, {thing} be a fine treasure, matey!")
        for verb, thing in product(("What is", "Where is", "Who has", "How is"), THINGS)
    ]
    write_rows(folder / "HuggingFaceH4" / "no_robots" / "train.jsonl", pirate)
    write_rows(folder / "conversations.jsonl", pirate)
    sums = [
        {"question": f"How many letters are in the word {word}?", "answer": "Count.\n#### 3"}
        for word in ("cat", "dog", "sun", "ice", "sea", "sky", "oak", "ant") * 4
    ]
    gsm8k = folder / "openai" / "gsm8k"
    write_rows(gsm8k / "train.jsonl", sums)
    (gsm8k / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n"
    )
    write_rows(
        folder / "labels.jsonl",
        [chat(sentence, label) for label, sentence in LANGUAGES.items()] * 4,
    )
    write_rows(
        folder / "tinker_cookbook" / "example_data" / "unused.jsonl", []
    )  # makes the folder in which a recipe looks for its sentences
    sentences = folder / "tinker_cookbook" / "example_data" / "multilingual.txt"
    sentences.write_text("\n".join(LANGUAGES.values()) + "\n")
    write_rows(
        folder / "comparisons.jsonl",
        [
            {
                "comparison": {
                    "prompt_conversation": [{"role": "user", "content": f"What is {thing}?"}],
                    "completion_A": [{"role": "assistant", "content": f"Arr, {thing}, matey!"}],
                    "completion_B": [{"role": "assistant", "content": f"It is {thing}."}],
                },
                "label": "A",
            }
            for thing in THINGS * 3
        ],
    )
    write_rows(folder / "allenai" / "tulu-3-sft-mixture" / "train.jsonl", pirate)


def run_recipe(server: Server, python: str, recipe: str, folder: Path) -> dict[str, Any]:
    """The recipe's numbers, its seconds, and whether they went where they should."""
    key = re.search(r"tml-\S+", server.log())
    assert key is not None
    begin = time.monotonic()
    process = subprocess.run(
        [python, str(Path(__file__).with_name("cookbook_recipes.py")), recipe],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TINKER_BASE_URL": server.url,
            "TINKER_API_KEY": key.group(),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        timeout=RECIPE_SECONDS,
    )
    (folder / f"{recipe}.log").write_text(process.stderr + process.stdout)
    if process.returncode:
        return {"error": (process.stderr or process.stdout)[-600:]}
    numbers = json.loads(process.stdout.strip().splitlines()[-1])
    third = max(1, len(numbers) // 3)
    before, after = sum(numbers[:third]) / third, sum(numbers[-third:]) / third
    return {
        "numbers": numbers,
        "as_it_should": after > before if NUMBERS[recipe] == "reward" else after < before,
        "seconds": round(time.monotonic() - begin),
    }


def recipe_table(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each recipe, with its numbers step by step."""
    rows = [["Recipe", "Number", "Step by step", ""]]
    for name in NUMBERS:
        outcome = recipes[name]
        numbers = ", ".join(f"{number:.2f}" for number in outcome.get("numbers", ()))
        verdict = "works" if outcome.get("as_it_should") else "fails"
        rows.append([f"`{name}`", f"`{NUMBERS[name]}`", numbers, verdict])
    return markdown_table(rows)


def installed(python: str) -> dict[str, str]:
    """The versions that matter, in that environment."""
    names = ("tinker-cookbook", "tinker", "torch", "transformers")
    code = (
        f"import importlib.metadata as m, json; print(json.dumps([m.version(n) for n in {names}]))"
    )
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, json.loads(shown.stdout), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python")
    parser.add_argument("recipes", nargs="*", default=list(NUMBERS))
    chosen = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "recipes"
        folder.mkdir()
        # One thread: the recipes compute too, and threads that wait for each other are slow.
        server = Server(Path(name) / "data", free_port(), {"TINKERAPI_NUM_THREADS": "1"})
        server.data_dir.mkdir()
        server.start()
        try:
            make_folder(folder, server.data_dir / "models")
            for recipe in chosen.recipes:
                outcome = run_recipe(server, chosen.python, recipe, folder)
                outcome["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
                results.setdefault("recipes", {})[recipe] = outcome | {"commit": commit()}
        finally:
            server.stop()
    results |= {
        "model": MODEL,
        "installed": installed(chosen.python),
        "python": platform.python_version(),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    write_table("recipes", recipe_table(results["recipes"]))


if __name__ == "__main__":
    main()
