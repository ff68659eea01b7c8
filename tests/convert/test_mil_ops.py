"""Every operation and every way to store a weight, against numpy's formulas."""

import math

import numpy as np
import pytest
from mil_programs import MARKS, WEIGHTS, mb, save, softmax, string_to_nptype

from ifp_mlx.convert.mil import storage
from ifp_mlx.convert.mil.mlpackage import Package

pytestmark = MARKS
rng = np.random.default_rng(0)

X = rng.normal(0, 2, (2, 3, 4)).astype(np.float16)
Y = rng.normal(0, 2, (2, 3, 4)).astype(np.float16)
I = rng.integers(0, 3, (2, 3, 4)).astype(np.int32)
W = rng.normal(size=(5, 4)).astype(np.float16)
B = rng.normal(size=5).astype(np.float16)
x, y, w, b = (a.astype(np.float32) for a in (X, Y, W, B))


def attention(mask):
    return softmax(x @ y.swapaxes(1, 2) / 2 + mask) @ x


BAND = np.tril(np.ones((3, 3), bool))
UPDATED = X.copy()
UPDATED[:, 1:3] = Y[:, :2]
# name: what to build of x, y and i, and what numpy says.
OPERATIONS = {
    "add": (lambda x, y, i: mb.add(x=x, y=y), x + y),
    "sub": (lambda x, y, i: mb.sub(x=x, y=y), x - y),
    "mul": (lambda x, y, i: mb.mul(x=x, y=y), x * y),
    "real_div": (lambda x, y, i: mb.real_div(x=x, y=y), x / y),
    "floor_div": (lambda x, y, i: mb.floor_div(x=i, y=np.int32(2)), I // 2),
    "mod": (lambda x, y, i: mb.mod(x=i, y=np.int32(2)), I % 2),
    "pow": (lambda x, y, i: mb.pow(x=mb.abs(x=x), y=y), np.abs(x) ** y),
    "maximum": (lambda x, y, i: mb.maximum(x=x, y=y), np.maximum(x, y)),
    "minimum": (lambda x, y, i: mb.minimum(x=x, y=y), np.minimum(x, y)),
    "rsqrt": (
        lambda x, y, i: mb.rsqrt(x=mb.square(x=x), epsilon=np.float16(0.25)),
        1 / np.sqrt(x * x + 0.25),
    ),
    "sqrt": (lambda x, y, i: mb.sqrt(x=mb.abs(x=x)), np.sqrt(np.abs(x))),
    "exp": (lambda x, y, i: mb.exp(x=x), np.exp(x)),
    "sin": (lambda x, y, i: mb.sin(x=x), np.sin(x)),
    "cos": (lambda x, y, i: mb.cos(x=x), np.cos(x)),
    "tanh": (lambda x, y, i: mb.tanh(x=x), np.tanh(x)),
    "sigmoid": (lambda x, y, i: mb.sigmoid(x=x), 1 / (1 + np.exp(-x))),
    "silu": (lambda x, y, i: mb.silu(x=x), x / (1 + np.exp(-x))),
    "gelu": (
        lambda x, y, i: mb.gelu(x=x, mode="EXACT"),
        x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    ),
    "gelu_tanh": (
        lambda x, y, i: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    ),
    "softmax": (lambda x, y, i: mb.softmax(x=x, axis=-1), softmax(x)),
    "clip": (
        lambda x, y, i: mb.clip(x=x, alpha=np.float16(-1), beta=np.float16(1)),
        np.clip(x, -1, 1),
    ),
    "linear": (lambda x, y, i: mb.linear(x=x, weight=W, bias=B), x @ w.T + b),
    "matmul": (
        lambda x, y, i: mb.matmul(x=x, y=y, transpose_y=True),
        x @ y.swapaxes(1, 2),
    ),
    "matmul_of_transposed": (
        lambda x, y, i: mb.matmul(x=x, y=y, transpose_x=True),
        x.swapaxes(1, 2) @ y,
    ),
    "attention": (
        lambda x, y, i: mb.scaled_dot_product_attention(query=x, key=y, value=x),
        attention(0),
    ),
    "attention_float_mask": (
        lambda x, y, i: mb.scaled_dot_product_attention(
            query=x, key=y, value=x, attn_mask=X[:, :, :3]
        ),
        attention(x[:, :, :3]),
    ),
    "attention_bool_mask": (
        lambda x, y, i: mb.scaled_dot_product_attention(
            query=x, key=y, value=x, attn_mask=BAND[None]
        ),
        attention(np.where(BAND, 0, -np.inf)),
    ),
    "reduce_sum": (lambda x, y, i: mb.reduce_sum(x=x, axes=[1, 2]), x.sum((1, 2))),
    "reduce_mean": (
        lambda x, y, i: mb.reduce_mean(x=x, axes=[-1], keep_dims=True),
        x.mean(-1, keepdims=True),
    ),
    "reduce_max": (lambda x, y, i: mb.reduce_max(x=x, axes=[1]), x.max(1)),
    "reduce_min": (lambda x, y, i: mb.reduce_min(x=i, axes=[1]), I.min(1)),
    "reduce_l2_norm": (
        lambda x, y, i: mb.reduce_l2_norm(x=x, axes=[-1], keep_dims=True),
        np.sqrt((x * x).sum(-1, keepdims=True)),
    ),
    "reduce_argmax": (lambda x, y, i: mb.reduce_argmax(x=x, axis=1), x.argmax(1)),
    "layer_norm": (
        lambda x, y, i: mb.layer_norm(x=x, axes=[-1], epsilon=np.float16(0.1)),
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1),
    ),
    "cumsum": (
        lambda x, y, i: mb.cumsum(x=i, axis=1, exclusive=True),
        np.cumsum(I, axis=1) - I,
    ),
    "gather": (lambda x, y, i: mb.gather(x=W, indices=i, axis=0), W[I]),
    "gather_along_last": (
        lambda x, y, i: mb.gather(x=x, indices=np.array([3, 0]), axis=-1),
        X[..., [3, 0]],
    ),
    "gather_along_axis": (
        lambda x, y, i: mb.gather_along_axis(x=x, indices=i, axis=2),
        np.take_along_axis(X, I, 2),
    ),
    "reshape": (lambda x, y, i: mb.reshape(x=x, shape=[3, -1]), X.reshape(3, 8)),
    "reshape_keeping": (
        lambda x, y, i: mb.reshape(x=x, shape=[-1, 1, 0]),
        X.reshape(6, 1, 4),
    ),
    "transpose": (
        lambda x, y, i: mb.transpose(x=x, perm=[2, 0, 1]),
        X.transpose(2, 0, 1),
    ),
    "concat": (
        lambda x, y, i: mb.concat(values=[x, y], axis=-1),
        np.concatenate([X, Y], -1),
    ),
    "stack": (lambda x, y, i: mb.stack(values=[x, y], axis=1), np.stack([X, Y], 1)),
    "split": (
        lambda x, y, i: mb.split(x=x, split_sizes=[1, 3], axis=-1)[1],
        X[..., 1:],
    ),
    "split_evenly": (
        lambda x, y, i: mb.split(x=x, num_splits=2, axis=-1)[0],
        X[..., :2],
    ),
    "slice_by_index": (
        lambda x, y, i: mb.slice_by_index(
            x=x,
            begin=[1, -2, 0],
            end=[0, 0, 3],
            stride=[1, 1, 2],
            end_mask=[False, True, False],
            squeeze_mask=[True, False, False],
        ),
        X[1, -2:, 0:3:2],
    ),
    "slice_by_size": (
        lambda x, y, i: mb.slice_by_size(x=x, begin=[0, 1, 2], size=[-1, 2, -1]),
        X[:, 1:3, 2:],
    ),
    "slice_update": (
        lambda x, y, i: mb.slice_update(
            x=x,
            update=mb.slice_by_size(x=y, begin=[0, 0, 0], size=[2, 2, 4]),
            begin=[0, 1, 0],
            end=[0, 3, 0],
            begin_mask=[True, False, True],
            end_mask=[True, False, True],
        ),
        UPDATED,
    ),
    "expand_dims": (
        lambda x, y, i: mb.expand_dims(x=x, axes=[0, -1]),
        X[None, ..., None],
    ),
    "squeeze": (
        lambda x, y, i: mb.squeeze(x=mb.expand_dims(x=x, axes=[0]), axes=[0]),
        X,
    ),
    "tile": (lambda x, y, i: mb.tile(x=x, reps=[1, 2, 1]), np.tile(X, [1, 2, 1])),
    "reverse": (lambda x, y, i: mb.reverse(x=x, axes=[1]), X[:, ::-1]),
    "cast": (lambda x, y, i: mb.cast(x=x, dtype="int32"), X.astype(np.int32)),
    "cast_to_wide": (lambda x, y, i: mb.cast(x=x, dtype="fp32"), x),
    "band_part": (
        lambda x, y, i: mb.band_part(x=x, lower=1, upper=0),
        np.tril(X) * np.triu(np.ones((3, 4)), -1),
    ),
    "select": (
        lambda x, y, i: mb.select(cond=mb.less(x=x, y=y), a=x, b=y),
        np.minimum(X, Y),
    ),
    "logical": (
        lambda x, y, i: mb.cast(
            x=mb.logical_and(
                x=mb.greater_equal(x=i, y=np.int32(1)),
                y=mb.logical_not(x=mb.equal(x=i, y=np.int32(2))),
            ),
            dtype="fp16",
        ),
        I == 1,
    ),
    "shape": (
        lambda x, y, i: mb.shape(x=mb.gather(x=W, indices=i, axis=0)),
        (2, 3, 4, 4),
    ),
    "range": (
        lambda x, y, i: mb.range_1d(
            start=np.int32(1), end=mb.reduce_max(x=i, axes=[0, 1, 2]), step=np.int32(1)
        ),
        np.arange(1, I.max()),
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def build(x, y, i):
        made = [build(x, y, i) for build, _ in OPERATIONS.values()]
        return [
            mb.identity(x=value, name=f"{name}_result")
            for name, value in zip(OPERATIONS, made, strict=True)
        ]

    path = tmp_path_factory.mktemp("operations") / "all.mlpackage"
    inputs = [("x", X.shape, np.float16), ("y", Y.shape, np.float16)]
    save(path, build, [*inputs, ("i", I.shape, np.int32)], passes=False)
    return Package(path).session().run({"x": X, "y": Y, "i": I})


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_numpys(results, name):
    expected = np.asarray(OPERATIONS[name][1])
    found = results[f"{name}_result"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


# --- weights ---


def packed(values, bits, kind="uint"):
    return values.astype(string_to_nptype(f"{kind}{bits}"))


def quantised(data, scale, offset=None):
    def build(i):
        weight = mb.constexpr_blockwise_shift_scale(
            data=data, scale=scale, **({} if offset is None else {"offset": offset})
        )
        rows = mb.gather(x=weight, indices=i, axis=0)
        return mb.linear(x=rows, weight=weight, name="out")

    return build


def tables(indices, lut):
    def build(i):
        weight = mb.constexpr_lut_to_dense(indices=indices, lut=lut)
        rows = mb.gather(x=weight, indices=i, axis=0)
        return mb.linear(x=rows, weight=weight, name="out")

    return build


def check_rows(path, dense):
    """Compare ``dense[i] @ dense.T`` with a package that computes it."""
    i = np.array([3, 0, 5], np.int32)
    found = Package(path).session().run({"i": i})["out"]
    dense = dense.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(found, dense[i] @ dense.T, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    "bits, kind", [(4, "uint"), (8, "uint"), (4, "int"), (8, "int")]
)
@pytest.mark.parametrize("offset_kind", ["none", "same", "float"])
def test_blockwise_weights_are_scale_times_data_minus_offset(
    tmp_path, bits, kind, offset_kind
):
    low = 0 if kind == "uint" else -(1 << (bits - 1))
    data = rng.integers(low, low + (1 << bits), (8, 32))
    scale = rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16)
    zero = rng.integers(low, low + (1 << bits), (8, 2))
    offset = {
        "none": None,
        "same": packed(zero, bits, kind),
        "float": (zero + 0.25).astype(np.float16),
    }[offset_kind]
    build = quantised(packed(data, bits, kind), scale, offset)
    path = save(tmp_path / "p.mlpackage", build, [("i", (3,), np.int32)], passes=False)
    shift = {"none": 0 * zero, "same": zero, "float": zero + 0.25}[offset_kind]
    check_rows(path, np.repeat(scale, 16, 1) * (data - np.repeat(shift, 16, 1)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_look_up_tables_hold_a_value_per_index_and_group(tmp_path, bits):
    indices = rng.integers(0, 1 << bits, (8, 32))
    lut = rng.normal(size=(4, 2, 1 << bits, 1)).astype(np.float16)
    build = tables(packed(indices, bits), lut)
    path = save(tmp_path / "p.mlpackage", build, [("i", (3,), np.int32)], passes=False)
    dense = np.empty((8, 32), np.float16)
    for row, column in np.ndindex(8, 32):
        dense[row, column] = lut[row // 2, column // 16, indices[row, column], 0]
    check_rows(path, dense)


def test_packed_rows_that_share_bytes_are_unpacked_too():
    values = rng.integers(0, 8, (3, 5))  # 15 bits a row
    bits = (values.reshape(-1, 1) >> np.arange(3)) & 1
    data = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")
    stored = storage.Packed(data, (3, 5), 3, signed=False)
    np.testing.assert_array_equal(stored[1:], values[1:])
    np.testing.assert_array_equal(np.asarray(stored), values)


def test_blobs_are_what_coremltools_own_reader_reads(tmp_path):
    from coremltools.libmilstoragepython import _BlobStorageReader

    data = rng.integers(0, 16, (8, 32))
    scale = rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16)
    path = save(
        tmp_path / "p.mlpackage",
        quantised(packed(data, 4), scale),
        [("i", (3,), np.int32)],
        passes=False,
    )
    blobs = {}
    block = Package(path).spec.mlProgram.functions["main"].block_specializations
    for operation in block["CoreML8"].operations:
        if operation.type == "constexpr_blockwise_shift_scale":
            blobs = {
                key: argument.arguments[0].value.blobFileValue.offset
                for key, argument in operation.inputs.items()
            }
    theirs = _BlobStorageReader(str(path / WEIGHTS))
    ours = storage.BlobFile(path / WEIGHTS)
    np.testing.assert_array_equal(
        np.asarray(ours.read(blobs["data"], "UINT4", (8, 32))).reshape(-1),
        np.asarray(theirs.read_uint4_data(blobs["data"])).astype(np.uint8),
    )
    np.testing.assert_array_equal(
        ours.read(blobs["scale"], "FLOAT16", (16,)).view(np.uint16),
        np.asarray(theirs.read_fp16_data(blobs["scale"])),
    )


def test_quantised_rows_do_not_dequantise_the_whole_table():
    data = storage.Packed(np.zeros(1 << 19, np.uint8), (1 << 14, 64), 4, signed=False)
    scale = np.ones((1 << 14, 2), np.float16)
    weight = storage.Blockwise(data, scale, np.full_like(scale, 8))
    unpacked = []
    unpack = data._unpack
    data._unpack = lambda part, shape: unpacked.append(part.size) or unpack(part, shape)
    np.testing.assert_array_equal(weight[np.array([7, 9])], np.full((2, 64), -8))
    assert unpacked == [64]
