"""What every MIL operation computes (iOS 18 opset), in numpy.

Parameters have MIL's own names and defaults. ``ARITHMETIC`` gets floats as float32, and
its results are rounded back to the type of the inputs, as a device stores float16
between two operations; ``MOVES`` gets values as they are and keeps their type. Constant
weights are lazy: ``weight[rows]`` dequantises only those rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .storage import is_lazy

Array = np.ndarray
CHUNK = 250_000  # weights in float32 at a time: 1 MB stays in the processor's cache


# --- arithmetic: float32 inside, rounded to the type of the inputs afterwards ---


def linear(x: Array, weight: Any, bias: Array | None = None) -> Array:
    """Return x @ weight.T + bias; ``weight`` ``[N, K]`` is widened in row chunks."""
    N, K = weight.shape
    out = np.empty((*x.shape[:-1], N), np.float32)
    step = max(1, CHUNK // K)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        out[..., rows] = x @ weight[rows].astype(np.float32).T
    return out if bias is None else out + bias


def matmul(
    x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False
) -> Array:
    """Return x @ y over the last two axes."""
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    y = np.swapaxes(y, -1, -2) if transpose_y else y
    return x @ y


def softmax(x: Array, axis: int = -1) -> Array:
    """Return exp(x) / Σ exp(x), shifted by the largest."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """Return attention over ``[B, …, T, E]``; a Boolean mask says what takes part."""
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1]:
        raise ValueError("query, key and value do not fit together")
    scores = query @ np.swapaxes(key, -1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        boolean = attn_mask.dtype == bool
        added = np.where(attn_mask, 0.0, -np.inf) if boolean else attn_mask
        scores = scores + added.astype(np.float32)
    return softmax(scores) @ value


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Return x Φ(x), or one of its two approximations."""
    if mode == "TANH_APPROXIMATION":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    return x / 2 * (1 + erf(x / math.sqrt(2)))


def erf(x: Array) -> Array:
    """Return the error function."""
    return np.vectorize(math.erf, otypes=[np.float32])(x)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """Return (x - mean) / √(variance + epsilon) * gamma + beta."""
    over: Any = {"axis": _axes(axes), "keepdims": True}
    x = (x - x.mean(**over)) / np.sqrt(x.var(**over) + epsilon)
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


def floor_div(x: Array, y: Array) -> Array:
    """Return the floor of x / y."""
    return np.floor_divide(x, y)


def real_div(x: Array, y: Array) -> Array:
    """Return x / y, of integers rounded towards zero."""
    return x / y if x.dtype.kind == "f" else np.trunc(x / y).astype(x.dtype)


def cumsum(
    x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False
) -> Array:
    """Return running sums along ``axis``."""
    x = np.flip(x, axis) if reverse else x
    sums = np.cumsum(x, axis=axis, dtype=x.dtype)
    sums = sums - x if exclusive else sums
    return np.flip(sums, axis) if reverse else sums


def _axes(axes: Array | None) -> tuple[int, ...] | None:
    return None if axes is None else tuple(int(a) for a in np.ravel(axes))


def _reduction(formula: Callable[..., Array]) -> Callable[..., Array]:
    def reduce(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Array:
        result = formula(x, axis=_axes(axes), keepdims=bool(keep_dims))
        return np.asarray(result).astype(x.dtype)

    return reduce


def _pair(formula: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, y: formula(x, y)  # numpy's own take no names


def _single(formula: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x: formula(x)


BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": real_div,
    "floor_div": floor_div,
    "mod": np.mod,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
UNARY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "floor": np.floor,
    "round": np.round,
    "sign": np.sign,
    "exp": np.exp,
    "exp2": np.exp2,
    "sqrt": np.sqrt,
    "square": np.square,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "logical_not": np.logical_not,
}
REDUCTIONS: dict[str, Callable[..., Array]] = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_l1_norm": lambda x, **over: np.abs(x).sum(**over),
    "reduce_l2_norm": lambda x, **over: np.sqrt(np.square(x).sum(**over)),
    "reduce_sum_square": lambda x, **over: np.square(x).sum(**over),
}
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "matmul": matmul,
    "softmax": softmax,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "gelu": gelu,
    "erf": erf,
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
    "layer_norm": layer_norm,
    "cumsum": cumsum,
    "log": lambda x, epsilon=1e-45: np.log(x + epsilon),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    **{name: _pair(formula) for name, formula in BINARY.items()},
    **{name: _single(formula) for name, formula in UNARY.items()},
    **{name: _reduction(formula) for name, formula in REDUCTIONS.items()},
}


# --- moves: the same values in another place; types are kept ---


def gather(
    x: Any, indices: Array, axis: int = 0, batch_dims: int = 0, **_: Any
) -> Array:
    """Return the slices of ``x`` at ``indices``; of quantised ``x`` only those rows."""
    if batch_dims:
        raise ValueError(f"batch_dims={batch_dims} is not supported")
    if axis == 0:
        found = x[np.ravel(indices)]
        return found.reshape((*indices.shape, *x.shape[1:]))
    return np.take(np.asarray(x), indices, axis=axis)


def gather_along_axis(x: Array, indices: Array, axis: int = 0, **_: Any) -> Array:
    """Return x at ``indices`` along one axis."""
    return np.take_along_axis(x, indices, axis=axis)


def reshape(x: Array, shape: Array) -> Array:
    """Return ``x`` in another shape; 0 is the same size, counted from the right."""
    sizes = [int(s) for s in shape]
    for back in range(1, len(sizes) + 1):
        if sizes[-back] == 0:
            sizes[-back] = x.shape[-back] if back <= x.ndim else 1
    return x.reshape(sizes)


def split(
    x: Array,
    num_splits: int | None = None,
    split_sizes: Array | None = None,
    axis: int = 0,
) -> tuple[Array, ...]:
    """Return ``x`` cut along ``axis`` into equal parts, or parts of these sizes."""
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits or 1), axis=axis))
    if sum(split_sizes) != x.shape[axis]:
        raise ValueError(f"sizes {list(split_sizes)} do not add up to {x.shape[axis]}")
    return tuple(np.split(x, np.cumsum(split_sizes)[:-1], axis=axis))


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    """Return the values one after the other; all of one type."""
    if interleave or len({v.dtype for v in values}) > 1:
        raise ValueError("values are interleaved or of different types")
    # MIL lets scalars be concatenated as vectors of one.
    return np.concatenate([np.atleast_1d(v) for v in values], axis=axis)


def _slices(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    """Return the index, and refuse bounds that numpy would silently clip."""
    none = np.zeros(x.ndim, bool)
    masks = [none if m is None else m for m in (begin_mask, end_mask, squeeze_mask)]
    parts: list[slice | int] = []
    for axis, size in enumerate(x.shape):
        step = 1 if stride is None else int(stride[axis])
        start, stop = int(begin[axis]), int(end[axis])
        no_start, no_stop, squeeze = (bool(m[axis]) for m in masks)
        if not no_start and not -size <= start <= size:
            raise ValueError(f"begins at {start} of {size} along axis {axis}")
        if squeeze:
            parts.append(0 if no_start else start)
            continue
        if not no_stop and not -size <= stop <= size:
            raise ValueError(f"ends at {stop} of {size} along axis {axis}")
        parts.append(
            slice(None if no_start else start, None if no_stop else stop, step)
        )
    return tuple(parts)


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """Return x[begin:end:stride, …]."""
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """Return a copy of ``x`` with x[begin:end:stride, …] = update."""
    place = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[place].shape != update.shape or x.dtype != update.dtype:
        raise ValueError(
            f"the update {update.dtype}{list(update.shape)} does not fill "
            f"{x.dtype}{list(x[place].shape)}"
        )
    x = x.copy()
    x[place] = update
    return x


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """Return ``size`` elements from ``begin`` on; -1 is all that follow."""
    size = np.where(np.asarray(size) == -1, np.array(x.shape) - begin, size)
    return slice_by_index(x, begin, np.asarray(begin) + size)


def band_part(x: Array, lower: int = -1, upper: int = -1) -> Array:
    """Return ``x`` with zeros outside a band around the diagonal."""
    down = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    inside = ((lower < 0) | (down <= lower)) & ((upper < 0) | (-down <= upper))
    return x * inside.astype(x.dtype)


def select(cond: Array, a: Array, b: Array) -> Array:
    """Return ``a`` where ``cond``, else ``b``."""
    if a.dtype != b.dtype:
        raise ValueError(f"its operands are {a.dtype} and {b.dtype}")
    return np.where(cond, a, b)


def range_1d(end: Any, start: Any, step: Any) -> Array:
    """Return start, start + step, … below ``end``, in the type of ``end``."""
    return np.arange(start, end, step, dtype=end.dtype)


NUMPY_NAMES = {"fp16": "float16", "fp32": "float32"}
MOVES: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "reshape": reshape,
    "split": split,
    "concat": concat,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "band_part": band_part,
    "select": select,
    "identity": lambda x: x,
    "cast": lambda x, dtype: x.astype(NUMPY_NAMES.get(dtype, dtype)),
    "transpose": lambda x, perm: x.transpose(perm),
    "stack": lambda values, axis: np.stack(values, axis=axis),
    "expand_dims": lambda x, axes: np.expand_dims(x, _axes(axes) or ()),
    "squeeze": lambda x, axes=None: np.squeeze(x, _axes(axes)),
    "tile": lambda x, reps: np.tile(x, reps),
    "reverse": lambda x, axes=None: np.flip(x, _axes(axes)),
    "shape": lambda x: np.array(x.shape, np.int32),
    "range_1d": range_1d,
    "fill": lambda shape, value=0.0: np.full(tuple(shape), value),
    "reduce_argmax": lambda x, axis=-1, keep_dims=False, **_: np.argmax(
        x, axis=axis, keepdims=bool(keep_dims)
    ).astype(np.int32),
}

# Operands that must have one type; other floats, such as epsilon, are parameters.
OPERANDS = ("x", "y", "query", "key", "value", "weight", "bias")


def apply(kind: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Run one operation and return its outputs.

    Args:
        kind: MIL's name of it.
        arguments: by MIL's parameter names: arrays, lazy weights, lists and strings.

    Raises:
        ValueError: if the operation is not known, or its arguments do not fit.
    """
    if kind not in ("linear", "gather"):
        arguments = {
            k: np.asarray(v) if is_lazy(v) else v for k, v in arguments.items()
        }
    if kind in MOVES:
        result = MOVES[kind](**arguments)
    elif kind in ARITHMETIC:
        types = [arguments[name].dtype for name in OPERANDS if name in arguments]
        if len(set(types)) > 1:
            raise ValueError(f"its operands are {' and '.join(map(str, types))}")
        wide = {k: v if k == "weight" else _widen(v) for k, v in arguments.items()}
        result = np.asarray(ARITHMETIC[kind](**wide))
        if result.dtype.kind == "f":
            result = result.astype(types[0], copy=False)
    else:
        raise ValueError(f"the operation {kind!r} is not known to this interpreter")
    results = result if isinstance(result, tuple) else (result,)
    return tuple(map(np.asarray, results))


def _widen(value: Any) -> Any:
    is_float = isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f"
    return value.astype(np.float32, copy=False) if is_float else value
