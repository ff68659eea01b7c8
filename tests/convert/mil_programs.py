"""Small programs in coremltools' own builder, for tests; none is the exporter's."""

import logging
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    ct = pytest.importorskip("coremltools")

from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import get_new_symbol, types
from coremltools.converters.mil.mil.types.type_mapping import (  # noqa: F401
    string_to_nptype,
)

MARKS = [
    pytest.mark.coreml,
    # coremltools leaves this to the garbage collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]
rng = np.random.default_rng(0)
MIL_TYPES = {np.float16: types.fp16, np.float32: types.fp32, np.int32: types.int32}
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MODEL = "Data/com.apple.CoreML/model.mlmodel"


def save(path, build, inputs, states=(), *, passes=True):
    """Save the program that ``build`` makes of its inputs as a package.

    ``inputs`` are (name, shape, type); a size is a number or the largest of a range.
    ``states`` are (name, shape), all float16. ``build`` takes them in this order, under these names.
    """
    symbols: dict = {}
    specs, flexible = {}, []
    for name, shape, kind in inputs:
        sizes = [
            symbols.setdefault(n, get_new_symbol()) if isinstance(n, str) else n
            for n in shape
        ]
        specs[name] = mb.TensorSpec(tuple(sizes), dtype=MIL_TYPES[kind])
        ranges = [
            ct.RangeDim(1, int(n[1:]), default=1) if isinstance(n, str) else n
            for n in shape
        ]
        flexible.append(ct.TensorType(name, tuple(ranges), kind))
    for name, shape in states:
        specs[name] = mb.StateTensorSpec(shape, dtype=types.fp16)
    decorate = mb.program(
        input_specs=list(specs.values()), opset_version=ct.target.iOS18
    )
    ct.convert(
        decorate(build),
        convert_to="mlprogram",
        inputs=flexible,
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.DEFAULT if passes else ct.PassPipeline.EMPTY,
    ).save(str(path))
    return path


V, D, LAYERS, CONTEXT = 17, 8, 2, 16
E = rng.normal(size=(V, D)).astype(np.float16)
K = rng.normal(0, 0.5, (LAYERS, 3, D, D)).astype(np.float16)  # query, key, value
TOKENS = rng.integers(0, V, 9)


def decoder(path, *, read_again=False, surplus=0):
    """Save two layers of attention and nothing else, with a cache.

    ``read_again`` reads the state in every layer, which coremltools' passes merge into
    one stale read; ``surplus`` is how much longer the mask is than the tokens so far.
    """

    def vector(*parts):
        values = [np.array([p], np.int32) if isinstance(p, int) else p for p in parts]
        return mb.concat(values=values, axis=0)

    def size(x, axis):
        return mb.slice_by_size(x=mb.shape(x=x), begin=[axis], size=[1])

    def layer(x, i, caches, states, past, end, mask):
        q, *new = (mb.linear(x=x, weight=K[i, part]) for part in range(3))
        for number, (state, value) in enumerate(zip(states, new, strict=True)):
            if read_again:
                caches[number] = mb.read_state(input=state)
            update = mb.slice_update(
                x=caches[number],
                update=value,
                begin=vector(i, past, 0),
                end=vector(i + 1, end, D),
            )
            caches[number] = mb.coreml_update_state(state=state, value=update)
        k, v = (
            mb.slice_by_index(x=c, begin=vector(i, 0, 0), end=vector(i + 1, end, D))
            for c in caches
        )
        scores = mb.matmul(x=q, y=k, transpose_y=True)
        weights = mb.softmax(x=mb.add(x=scores, y=mask), axis=-1)
        return mb.add(x=x, y=mb.matmul(x=weights, y=v))

    def build(inputIds, causalMask, keys, values):
        q, end = size(inputIds, 1), size(causalMask, 3)
        end = mb.sub(x=end, y=np.array([surplus], np.int32)) if surplus else end
        past = mb.sub(x=end, y=q)
        scalar = [mb.squeeze(x=n) for n in (end, past)]
        columns = mb.range_1d(start=np.int32(0), end=scalar[0], step=np.int32(1))
        rows = mb.range_1d(start=scalar[1], end=scalar[0], step=np.int32(1))
        later = mb.greater(x=columns, y=mb.expand_dims(x=rows, axes=[1]))
        mask = mb.mul(x=mb.cast(x=later, dtype="fp16"), y=np.float16(-3e4))
        x = mb.gather(x=E, indices=inputIds, axis=0)
        states, caches = (keys, values), [None, None]
        if not read_again:
            caches = [mb.read_state(input=state) for state in states]
        for i in range(LAYERS):
            x = layer(x, i, caches, states, past, end, mask)
        return mb.linear(x=x, weight=E, name="logits")

    inputs = [
        ("inputIds", (1, f"q{CONTEXT}"), np.int32),
        ("causalMask", (1, 1, f"m{CONTEXT}", f"e{CONTEXT + surplus}"), np.float16),
    ]
    states = [(name, (LAYERS, CONTEXT, D)) for name in ("keys", "values")]
    return save(path, build, inputs, states)


def expected_logits():
    """Return the decoder's logits for ``TOKENS`` at once, float32 ``[T, V]``."""
    x = E.astype(np.float32)[TOKENS]
    hidden = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    for layer in K.astype(np.float32):
        q, k, v = (x @ part.T for part in layer)
        x = x + softmax(q @ k.T + hidden) @ v
    return x @ E.astype(np.float32).T


def softmax(scores):
    """Return the softmax over the last axis."""
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def decoder_package(tmp_path_factory):
    return decoder(tmp_path_factory.mktemp("decoder") / "d.mlpackage")


@pytest.fixture(scope="module")
def stale_package(tmp_path_factory):
    path = tmp_path_factory.mktemp("stale") / "d.mlpackage"
    return decoder(path, read_again=True)


@pytest.fixture(scope="module")
def hf_package(tmp_path_factory):
    return decoder(tmp_path_factory.mktemp("hf") / "d.mlpackage", surplus=1)
