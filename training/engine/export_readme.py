"""The README.md in an exported adapter's folder."""

from __future__ import annotations

from training.engine.torch.adapters import AdapterLayout

_LOADING = """\
# A LoRA adapter of {base_model}

Rank {rank}, alpha {alpha:g}. Load it with peft, in this folder:

```python
import peft
import transformers

base = transformers.AutoModelForCausalLM.from_pretrained({base_model!r})
model = peft.PeftModel.from_pretrained(base, ".")
```
"""

_MERGING = """
## Before you merge it

The adapter changes the output head, `{head_name}`. Many models share one matrix between head and
embedding (`"tie_word_embeddings": true` in their config.json). Loaded as above, the adapter is then
computed as it was trained; merged into that matrix, its update changes the embedding too, and the
merged model gives other results (by more than a nat where much was trained). Give the head its own
matrix first:

```python
import torch

base = transformers.AutoModelForCausalLM.from_pretrained({base_model!r})
base.config.tie_word_embeddings = False
head = base.get_output_embeddings()
head.weight = torch.nn.Parameter(head.weight.detach().clone())
base.save_pretrained("untied-base")
merged = peft.PeftModel.from_pretrained(base, ".").merge_and_unload()
```

Tools that merge files, such as tinker-cookbook's `build_hf_model`, take the folder `untied-base`
(with the tokenizer saved beside it) as their base model: in a folder without a separate head they
do not find `{head_name}`. An adapter that was trained with `train_unembed=False` merges unchanged.
"""


def export_readme(base_model: str, layout: AdapterLayout, head_name: str | None) -> str:
    """Instructions for loading and merging the adapter.

    Args:
        head_name: The output head's module, if the adapter has it.
    """
    text = _LOADING.format(base_model=base_model, rank=layout.rank, alpha=layout.config.alpha)
    if head_name is not None:
        text += _MERGING.format(base_model=base_model, head_name=head_name)
    return text
