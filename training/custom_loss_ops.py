"""The operations that a client's own loss may be made of: the allow-list, without torch.

A traced loss names its operations as torch.fx does: ``torch.exp``, ``operator.mul``, or a tensor
method such as ``sum``. Only what is listed here runs; nothing is imported, looked up or evaluated
by a name that a client sent. Left out on purpose: all that leaves torch (``item``), writes in
place, draws random numbers, reads or writes files, knows devices, or makes a Python value of
unbounded size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """How an operation may be called; a method's tensor is its first argument."""

    min_args: int
    """Fewest arguments, by position or by name."""
    max_args: int
    """Most arguments by position."""
    kwargs: frozenset[str] = frozenset()


MANY = 8
"""Most arguments where an operation takes any number, such as ``x.reshape(2, 3)``."""


def _signatures(names: str, min_args: int, max_args: int, kwargs: str = "") -> dict[str, Signature]:
    signature = Signature(min_args, max_args, frozenset(kwargs.split()))
    return dict.fromkeys(names.split(), signature)


# As functions of torch and as methods of a tensor alike.
_BOTH: dict[str, Signature] = {
    **_signatures(
        "abs neg negative positive exp expm1 exp2 log log1p log2 log10 sqrt rsqrt square "
        "reciprocal sign sgn sin cos tan sinh cosh tanh asin acos atan asinh acosh atanh sigmoid "
        "erf erfc lgamma digamma floor ceil trunc frac relu logit isnan isinf isfinite logical_not "
        "bitwise_not detach t numel clone",
        1,
        1,
    ),
    **_signatures("round", 1, 1, "decimals"),
    **_signatures("nan_to_num", 1, 4, "nan posinf neginf"),
    **_signatures("add sub subtract", 2, 2, "alpha other"),
    **_signatures("div divide true_divide", 2, 2, "rounding_mode other"),
    **_signatures(
        "mul multiply floor_divide remainder fmod maximum minimum fmax fmin logaddexp "
        "logaddexp2 atan2 hypot xlogy eq ne lt le gt ge greater less greater_equal less_equal "
        "not_equal logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor",
        2,
        2,
        "other",
    ),
    **_signatures("pow", 2, 2, "exponent"),
    **_signatures("float_power", 2, 2, "exponent"),
    **_signatures("dot outer mv mm matmul bmm", 2, 2),
    **_signatures("lerp addcmul addcdiv", 3, 3, "value weight"),
    **_signatures("sum mean nansum nanmean", 1, 3, "dim keepdim dtype"),
    **_signatures("prod logsumexp amax amin all any argmax argmin", 1, 3, "dim keepdim"),
    **_signatures("max min median", 1, 3, "dim keepdim other"),
    **_signatures("std var", 1, 4, "dim keepdim unbiased correction"),
    **_signatures("norm", 1, 4, "p dim keepdim"),
    **_signatures("count_nonzero", 1, 2, "dim"),
    **_signatures("cumsum cumprod logcumsumexp softmax log_softmax", 1, 2, "dim dtype"),
    **_signatures("cummax cummin", 1, 2, "dim"),
    **_signatures("diff", 1, 3, "n dim"),
    **_signatures("sort argsort", 1, 3, "dim descending stable"),
    **_signatures("topk", 2, 5, "k dim largest sorted"),
    **_signatures("clamp clip", 1, 3, "min max"),
    **_signatures("clamp_min", 2, 2, "min"),
    **_signatures("clamp_max", 2, 2, "max"),
    **_signatures("masked_fill", 3, 3, "mask value"),
    **_signatures("masked_select", 2, 2, "mask"),
    **_signatures("gather", 3, 3, "dim index"),
    **_signatures("index_select", 3, 3, "dim index"),
    **_signatures("take_along_dim", 2, 3, "indices dim"),
    **_signatures("scatter_add", 4, 4, "dim index src"),
    **_signatures("index_add", 4, 4, "dim index source"),
    **_signatures("tril triu", 1, 2, "diagonal"),
    **_signatures("flatten", 1, 3, "start_dim end_dim"),
    **_signatures("squeeze unsqueeze", 1, 2, "dim"),
    **_signatures("transpose swapaxes", 3, 3, "dim0 dim1"),
    **_signatures("movedim", 3, 3, "source destination"),
    **_signatures("flip roll", 2, 3, "dims shifts"),
    **_signatures("narrow", 4, 4, "dim start length"),
    **_signatures("select", 3, 3, "dim index"),
    **_signatures("chunk", 2, 3, "chunks dim"),
    **_signatures("split", 2, 3, "split_size dim"),
    **_signatures("unbind", 1, 2, "dim"),
    **_signatures("reshape permute tile", 2, MANY, "shape dims"),
    **_signatures("broadcast_to", 2, 2, "size"),
}
_METHODS: dict[str, Signature] = {
    **_signatures("view expand repeat", 2, MANY, "size"),
    **_signatures("view_as expand_as reshape_as type_as", 2, 2, "other"),
    **_signatures("size", 1, 2, "dim"),
    **_signatures("dim float double long int bool contiguous", 1, 1),
    **_signatures("to", 1, 3, "dtype device other"),
    **_signatures("where", 3, 3, "other"),
    **_signatures("new_zeros new_ones", 2, MANY, "size dtype device"),
    **_signatures("new_full", 3, 3, "size fill_value dtype device"),
}
_TORCH: dict[str, Signature] = {
    **_signatures("where", 3, 3, "other"),
    **_signatures("stack cat concat concatenate", 1, 2, "dim tensors"),
    **_signatures("zeros_like ones_like", 1, 1, "dtype device"),
    **_signatures("full_like", 2, 2, "fill_value dtype device"),
    **_signatures("zeros ones", 1, MANY, "size dtype device"),
    **_signatures("full", 2, 2, "size fill_value dtype device"),
    **_signatures("arange", 1, 3, "start end step dtype device"),
    **_signatures("linspace", 3, 3, "start end steps dtype device"),
    **_signatures("eye", 1, 2, "n m dtype device"),
    **_signatures("cosine_similarity", 2, 4, "dim eps"),
}
_FUNCTIONAL: dict[str, Signature] = {
    **_signatures("relu relu6 silu mish softsign tanhshrink tanh sigmoid", 1, 1),
    **_signatures("elu", 1, 2, "alpha"),
    **_signatures("leaky_relu", 1, 2, "negative_slope"),
    **_signatures("hardtanh", 1, 3, "min_val max_val"),
    **_signatures("softmax log_softmax softmin", 1, 2, "dim dtype"),
    **_signatures("normalize", 1, 4, "p dim eps"),
    **_signatures("mse_loss l1_loss", 2, 2, "reduction"),
    **_signatures("smooth_l1_loss", 2, 2, "reduction beta"),
    **_signatures("huber_loss", 2, 2, "reduction delta"),
    **_signatures("kl_div", 2, 2, "reduction log_target"),
    **_signatures("binary_cross_entropy", 2, 3, "weight reduction"),
    **_signatures("binary_cross_entropy_with_logits", 2, 3, "weight reduction pos_weight"),
    **_signatures("margin_ranking_loss", 3, 4, "margin reduction"),
    **_signatures("soft_margin_loss", 2, 2, "reduction"),
}
_OPERATOR: dict[str, Signature] = {
    **_signatures("neg pos abs invert", 1, 1),
    **_signatures(
        "add sub mul truediv floordiv mod pow matmul eq ne lt le gt ge and_ or_ xor getitem", 2, 2
    ),
}

METHODS: Mapping[str, Signature] = {**_BOTH, **_METHODS}
"""Tensor methods by name."""

FUNCTIONS: Mapping[str, Signature] = {
    **{f"torch.{name}": signature for name, signature in (_BOTH | _TORCH).items()},
    **{f"torch.nn.functional.{name}": signature for name, signature in _FUNCTIONAL.items()},
    **{f"operator.{name}": signature for name, signature in _OPERATOR.items()},
    # Where torch.fx finds functions that are known to people by another name.
    **_signatures("torch._C._nn.log_sigmoid", 1, 1),
    **_signatures("torch._C._nn.gelu", 1, 1, "approximate"),
    **_signatures("torch._C._nn.softplus", 1, 3, "beta threshold"),
    **_signatures("torch.functional.einsum", 2, 3),
    **_signatures("torch.functional.norm", 1, 4, "p dim keepdim"),
    **_signatures("torch.functional.split", 2, 3, "dim"),
    **_signatures(
        "torch._C._special.special_expit torch._C._special.special_entr "
        "torch._C._special.special_log1p torch._C._special.special_expm1 "
        "torch._C._special.special_erf torch._C._special.special_log_ndtr "
        "torch._C._special.special_ndtr torch._C._special.special_logit",
        1,
        1,
    ),
    **_signatures("torch._C._special.special_xlogy torch._C._special.special_xlog1py", 2, 2),
    **_signatures("torch._C._special.special_logsumexp", 2, 3, "dim keepdim"),
    **_signatures("torch._C._special.special_softmax", 2, 2, "dim"),
    **_signatures("torch._C._special.special_log_softmax", 2, 2, "dim"),
    **_signatures("torch._C._linalg.linalg_vector_norm", 1, 4, "ord dim keepdim"),
    **_signatures("math.sqrt math.exp math.log math.log2 math.log10 math.log1p math.floor", 1, 1),
    **_signatures("math.ceil math.fabs math.tanh", 1, 1),
    **_signatures("math.pow", 2, 2),
    # Python's getattr, of the attributes below only.
    **_signatures("getattr", 2, 2),
}
"""Functions by the qualified name under which torch.fx records them."""

NEUTRAL_KWARGS = frozenset(
    {"out", "inplace", "size_average", "reduce", "weight", "dtype", "_stacklevel"}
)
"""What torch.fx records beside the arguments that were given; None, False or, for the last one, any
number asks for nothing, and nothing else is accepted where an operation does not take them."""

ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "values", "indices"})
"""What ``getattr`` may read: of a tensor, or of a result such as that of ``max(dim=0)``."""

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"})
