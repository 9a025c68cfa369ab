"""The allowed operations of a client's own loss, without torch.

A traced loss names its operations as torch.fx does: ``torch.exp``, ``operator.mul``, or a tensor
method such as ``sum``. Only operations listed here run; nothing is imported, looked up or evaluated
by a name that a client sent. Excluded on purpose: operations that leave torch (``item``), write in
place, draw random numbers, read or write files, use devices, or make a Python value of
unbounded size.

Each row names the rule that counts its cost before it runs. The rules are documented in
``training.engine.custom_loss.costs``, one function each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """How an operation may be called; a method's tensor is its first argument."""

    cost: str
    """The rule that counts its cost."""
    min_args: int
    """Fewest arguments, by position or by name."""
    max_args: int
    """Most arguments by position."""
    kwargs: frozenset[str] = frozenset()


MANY = 8
"""Most arguments of an operation that takes any number, such as ``x.reshape(2, 3)``."""


def _signatures(
    cost: str, names: str, min_args: int, max_args: int, kwargs: str = ""
) -> dict[str, Signature]:
    signature = Signature(cost, min_args, max_args, frozenset(kwargs.split()))
    return dict.fromkeys(names.split(), signature)


# Both as functions of torch and as methods of a tensor.
_BOTH: dict[str, Signature] = {
    **_signatures(
        "light",
        "abs neg negative positive square reciprocal sign sgn floor ceil trunc frac relu isnan "
        "isinf isfinite logical_not bitwise_not clone",
        1,
        1,
    ),
    **_signatures(
        "medium",
        "exp expm1 exp2 log log1p log2 log10 sqrt rsqrt sin cos tan sinh cosh tanh asin acos atan "
        "asinh acosh atanh sigmoid erf erfc logit",
        1,
        1,
    ),
    **_signatures("slow", "lgamma digamma", 1, 1),
    **_signatures("view", "detach t", 1, 1),
    **_signatures("free", "numel", 1, 1),
    **_signatures("light", "round", 1, 1, "decimals"),
    **_signatures("light", "nan_to_num", 1, 4, "nan posinf neginf"),
    **_signatures("light", "add sub subtract", 2, 2, "alpha other"),
    **_signatures("light", "div divide true_divide", 2, 2, "rounding_mode other"),
    **_signatures(
        "light",
        "mul multiply maximum minimum fmax fmin eq ne lt le gt ge greater less greater_equal "
        "less_equal not_equal logical_and logical_or logical_xor bitwise_and bitwise_or "
        "bitwise_xor",
        2,
        2,
        "other",
    ),
    **_signatures("medium", "logaddexp logaddexp2 atan2 hypot xlogy", 2, 2, "other"),
    **_signatures("heavy", "floor_divide remainder fmod", 2, 2, "other"),
    **_signatures("slow", "pow float_power", 2, 2, "exponent"),
    **_signatures("product", "dot mv mm matmul bmm", 2, 2),
    **_signatures("outer", "outer", 2, 2),
    **_signatures("light", "lerp addcmul addcdiv", 3, 3, "value weight"),
    **_signatures("reduction", "sum mean nansum nanmean", 1, 3, "dim keepdim dtype"),
    **_signatures("reduction", "prod logsumexp amax amin all any", 1, 3, "dim keepdim"),
    **_signatures("reduction", "argmax argmin", 1, 3, "dim keepdim"),
    **_signatures("extreme", "max min median", 1, 3, "dim keepdim other"),
    **_signatures("reduction", "std var", 1, 4, "dim keepdim unbiased correction"),
    **_signatures("norm", "norm", 1, 4, "p dim keepdim"),
    **_signatures("reduction", "count_nonzero", 1, 2, "dim"),
    **_signatures("heavy", "cumsum softmax log_softmax", 1, 2, "dim dtype"),
    **_signatures("slow", "cumprod logcumsumexp", 1, 2, "dim dtype"),
    **_signatures("scan", "cummax cummin", 1, 2, "dim"),
    **_signatures("differences", "diff", 1, 3, "n dim"),
    **_signatures("sorting", "sort argsort", 1, 3, "dim descending stable"),
    **_signatures("sorting", "topk", 2, 5, "k dim largest sorted"),
    **_signatures("light", "clamp clip", 1, 3, "min max"),
    **_signatures("light", "clamp_min", 2, 2, "min"),
    **_signatures("light", "clamp_max", 2, 2, "max"),
    **_signatures("light", "masked_fill", 3, 3, "mask value"),
    **_signatures("selection", "masked_select", 2, 2, "mask"),
    **_signatures("gathering", "gather", 3, 3, "dim index"),
    **_signatures("index_select", "index_select", 3, 3, "dim index"),
    **_signatures("gathering", "take_along_dim", 2, 3, "indices dim"),
    **_signatures("scattering", "scatter_add", 4, 4, "dim index src"),
    **_signatures("scattering", "index_add", 4, 4, "dim index source"),
    **_signatures("light", "tril triu", 1, 2, "diagonal"),
    **_signatures("view", "flatten", 1, 3, "start_dim end_dim"),
    **_signatures("view", "squeeze unsqueeze", 1, 2, "dim"),
    **_signatures("view", "transpose swapaxes", 3, 3, "dim0 dim1"),
    **_signatures("view", "movedim", 3, 3, "source destination"),
    **_signatures("shifting", "flip roll", 2, 3, "dims shifts"),
    **_signatures("part", "narrow", 4, 4, "dim start length"),
    **_signatures("part", "select", 3, 3, "dim index"),
    **_signatures("chunks", "chunk", 2, 3, "chunks dim"),
    **_signatures("splits", "split", 2, 3, "split_size dim"),
    **_signatures("rows", "unbind", 1, 2, "dim"),
    **_signatures("shaping", "reshape", 2, MANY, "shape dims"),
    **_signatures("view", "permute", 2, MANY, "shape dims"),
    **_signatures("repeating", "tile", 2, MANY, "shape dims"),
    **_signatures("spreading", "broadcast_to", 2, 2, "size"),
}
_METHODS: dict[str, Signature] = {
    **_signatures("shaping", "view", 2, MANY, "size"),
    **_signatures("spreading", "expand", 2, MANY, "size"),
    **_signatures("repeating", "repeat", 2, MANY, "size"),
    **_signatures("likeness", "view_as expand_as reshape_as type_as", 2, 2, "other"),
    **_signatures("free", "size", 1, 2, "dim"),
    **_signatures("free", "dim", 1, 1),
    **_signatures("light", "float double long int bool contiguous", 1, 1),
    **_signatures("conversion", "to", 1, 3, "dtype device other"),
    **_signatures("light", "where", 3, 3, "other"),
    **_signatures("filling_like", "new_zeros new_ones", 2, MANY, "size dtype device"),
    **_signatures("filling_like", "new_full", 3, 3, "size fill_value dtype device"),
}
_TORCH: dict[str, Signature] = {
    **_signatures("light", "where", 3, 3, "other"),
    **_signatures("joining", "stack cat concat concatenate", 1, 2, "dim tensors"),
    **_signatures("light", "zeros_like ones_like", 1, 1, "dtype device"),
    **_signatures("light", "full_like", 2, 2, "fill_value dtype device"),
    **_signatures("filling", "zeros ones", 1, MANY, "size dtype device"),
    **_signatures("filling", "full", 2, 2, "size fill_value dtype device"),
    **_signatures("range", "arange", 1, 3, "start end step dtype device"),
    **_signatures("points", "linspace", 3, 3, "start end steps dtype device"),
    **_signatures("square", "eye", 1, 2, "n m dtype device"),
    **_signatures("composed", "cosine_similarity", 2, 4, "dim eps"),
}
_FUNCTIONAL: dict[str, Signature] = {
    **_signatures("composed", "relu relu6 silu mish softsign tanhshrink tanh sigmoid", 1, 1),
    **_signatures("composed", "elu", 1, 2, "alpha"),
    **_signatures("composed", "leaky_relu", 1, 2, "negative_slope"),
    **_signatures("composed", "hardtanh", 1, 3, "min_val max_val"),
    **_signatures("composed", "softmax log_softmax softmin", 1, 2, "dim dtype"),
    **_signatures("composed", "normalize", 1, 4, "p dim eps"),
    **_signatures("composed", "mse_loss l1_loss", 2, 2, "reduction"),
    **_signatures("composed", "smooth_l1_loss", 2, 2, "reduction beta"),
    **_signatures("composed", "huber_loss", 2, 2, "reduction delta"),
    **_signatures("composed", "kl_div", 2, 2, "reduction log_target"),
    **_signatures("composed", "binary_cross_entropy", 2, 3, "weight reduction"),
    **_signatures(
        "composed", "binary_cross_entropy_with_logits", 2, 3, "weight reduction pos_weight"
    ),
    **_signatures("composed", "margin_ranking_loss", 3, 4, "margin reduction"),
    **_signatures("composed", "soft_margin_loss", 2, 2, "reduction"),
}
_OPERATOR: dict[str, Signature] = {
    **_signatures("light", "neg pos abs invert", 1, 1),
    **_signatures("light", "add sub mul truediv eq ne lt le gt ge and_ or_ xor", 2, 2),
    **_signatures("heavy", "floordiv mod", 2, 2),
    **_signatures("slow", "pow", 2, 2),
    **_signatures("product", "matmul", 2, 2),
    **_signatures("indexing", "getitem", 2, 2),
}

METHODS: Mapping[str, Signature] = {**_BOTH, **_METHODS}
"""Tensor methods by name."""

FUNCTIONS: Mapping[str, Signature] = {
    **{f"torch.{name}": signature for name, signature in (_BOTH | _TORCH).items()},
    **{f"torch.nn.functional.{name}": signature for name, signature in _FUNCTIONAL.items()},
    **{f"operator.{name}": signature for name, signature in _OPERATOR.items()},
    # torch.fx's names of functions that users know under other names.
    **_signatures("medium", "torch._C._nn.log_sigmoid", 1, 1),
    **_signatures("medium", "torch._C._nn.gelu", 1, 1, "approximate"),
    **_signatures("medium", "torch._C._nn.softplus", 1, 3, "beta threshold"),
    **_signatures("contraction", "torch.functional.einsum", 2, 3),
    **_signatures("norm", "torch.functional.norm", 1, 4, "p dim keepdim"),
    **_signatures("splits", "torch.functional.split", 2, 3, "dim"),
    **_signatures(
        "slow",
        "torch._C._special.special_expit torch._C._special.special_entr "
        "torch._C._special.special_log1p torch._C._special.special_expm1 "
        "torch._C._special.special_erf torch._C._special.special_log_ndtr "
        "torch._C._special.special_ndtr torch._C._special.special_logit",
        1,
        1,
    ),
    **_signatures(
        "medium", "torch._C._special.special_xlogy torch._C._special.special_xlog1py", 2, 2
    ),
    **_signatures("reduction", "torch._C._special.special_logsumexp", 2, 3, "dim keepdim"),
    **_signatures("heavy", "torch._C._special.special_softmax", 2, 2, "dim"),
    **_signatures("heavy", "torch._C._special.special_log_softmax", 2, 2, "dim"),
    **_signatures("norm", "torch._C._linalg.linalg_vector_norm", 1, 4, "ord dim keepdim"),
    **_signatures(
        "free", "math.sqrt math.exp math.log math.log2 math.log10 math.log1p math.floor", 1, 1
    ),
    **_signatures("free", "math.ceil math.fabs math.tanh", 1, 1),
    **_signatures("free", "math.pow", 2, 2),
    # Python's getattr, of the attributes below only.
    **_signatures("attribute", "getattr", 2, 2),
}
"""Functions by the qualified name under which torch.fx records them."""

NEUTRAL_KWARGS = frozenset(
    {"out", "inplace", "size_average", "reduce", "weight", "dtype", "_stacklevel"}
)
"""Arguments that torch.fx records in addition; None, False or, for the last one, any
number has no effect, and no other value is accepted if an operation does not take them."""

ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "values", "indices"})
"""What ``getattr`` may read: of a tensor, or of a result such as that of ``max(dim=0)``."""

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"})
