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


_EXPERTS = """
## Experts

`adapter_model.safetensors` is for peft, which adapts the stacked parameters of all experts
(`target_parameters`). peft 0.21 warns that it ignores `rank_pattern` and `alpha_pattern` for them;
it uses both.

`tinker_adapter.safetensors` is the same adapter, with one matrix where all experts share it, for
tools that merge the hosted service's adapters into a model's files. They want it alone in a folder,
under peft's name:

```sh
mkdir tinker
cp adapter_config.json tinker/
cp tinker_adapter.safetensors tinker/adapter_model.safetensors
```

tinker-cookbook's `build_hf_model` then takes `tinker` as `adapter_path`, for the families that it
knows: its merge was checked with Qwen3-MoE, Qwen3.5 MoE, DeepSeek V3 and gpt-oss.
"""


def export_readme(base_model: str, layout: AdapterLayout, head_name: str | None) -> str:
    """Instructions for loading and merging the adapter.

    Args:
        head_name: The output head's module, if the adapter has it.
    """
    text = _LOADING.format(base_model=base_model, rank=layout.rank, alpha=layout.config.alpha)
    if head_name is not None:
        text += _MERGING.format(base_model=base_model, head_name=head_name)
    if layout.has_experts:
        text += _EXPERTS
    return text
