"""A saved package as a program: its state, its functions, and what is refused.

The traps that fail silently on a device are programs here, right and wrong.
"""

import shutil

import numpy as np
import pytest
from mil_programs import (
    CONTEXT,
    MARKS,
    MODEL,
    TOKENS,
    WEIGHTS,
    D,
    V,
    ct,
    decoder_package,
    expected_logits,
    hf_package,
    mb,
    rng,
    save,
    stale_package,
)

from ifp_mlx.convert.mil.mlpackage import Package

__all__ = ["decoder_package", "hf_package", "stale_package"]  # fixtures
pytestmark = MARKS


def step_errors(path, extra=0):
    """Return the error of the prefill of 5 tokens, then of each decode step."""
    session, expected = Package(path).session(), expected_logits()
    errors, past = [], 0
    for q in (5, 1, 1, 1, 1):
        inputs = {
            "inputIds": TOKENS[None, past : past + q].astype(np.int32),
            "causalMask": np.zeros((1, 1, q, past + q + extra), np.float16),
        }
        logits = session.run(inputs)["logits"][0]
        wanted = expected[past : past + q]
        errors.append(float(np.abs(logits - wanted).max() / np.abs(expected).max()))
        past += q
    return errors


def test_a_state_stays_between_runs_and_sessions_have_their_own(decoder_package):
    assert max(step_errors(decoder_package)) < 0.01
    package = Package(decoder_package)
    session, other = package.session(), package.session()
    ids, mask = np.array([[1]], np.int32), np.zeros((1, 1, 1, 1), np.float16)
    session.run({"inputIds": ids, "causalMask": mask})
    assert session.state["keys"][1, 0].any() and not session.state["keys"][:, 1:].any()
    assert not other.state["keys"].any()


def test_a_state_that_every_layer_reads_again_is_right_in_prefill_alone(stale_package):
    prefill, *decode = step_errors(stale_package)
    assert prefill < 0.01 and max(decode) > 0.1


def test_a_mask_that_is_one_too_long_shows_as_a_phantom_position(
    decoder_package, hf_package
):
    assert max(step_errors(decoder_package, extra=1)) > 0.1
    assert max(step_errors(hf_package, extra=1)) < 0.01


def test_a_naive_norm_overflows_and_a_safe_one_does_not(tmp_path):
    def build(x):
        mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
        naive = mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=np.float16(1e-5)), name="naive")
        norm = mb.reduce_l2_norm(x=x, axes=[-1], keep_dims=True)
        unit = mb.real_div(x=x, y=norm)
        return naive, mb.mul(x=unit, y=np.float16(8), name="safe")

    path = save(tmp_path / "n.mlpackage", build, [("x", (1, 64), np.float16)])
    values = rng.normal(0, 1500, (1, 64)).astype(np.float16)
    found = Package(path).session().run({"x": values})
    wide = values.astype(np.float32)
    right = wide / np.sqrt((wide * wide).mean(-1, keepdims=True))
    np.testing.assert_allclose(found["safe"], right, rtol=5e-3, atol=1e-3)
    assert np.abs(found["naive"] - right).max() > 1


def test_a_position_past_the_cache_is_refused_not_clipped(decoder_package):
    session = Package(decoder_package).session()
    session.function.sizes = {}  # what the interface would refuse first
    mask = np.zeros((1, 1, 1, CONTEXT + 1), np.float16)
    with pytest.raises(ValueError, match="slice_update .* ends at 17 of 16"):
        session.run({"inputIds": np.array([[1]], np.int32), "causalMask": mask})


# --- what cannot be run is refused in a sentence ---


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"inputIds": np.zeros((1, 17), np.int32)},
            "inputIds has 17 along axis 1; it may have 1 to 16",
        ),
        (
            {"inputIds": np.zeros((1, 1), np.int64)},
            r"inputIds is int64\[1, 1\], but is declared INT32\[1, \?\]",
        ),
        ({"inputIds": np.zeros((2, 1), np.int32)}, r"inputIds is int32\[2, 1\]"),
        (
            {"inputIds": np.full((1, 1), V, np.int32)},
            "gather .* failed: index 17 is out of bounds",
        ),
        ({"other": np.zeros(1)}, "The inputs are causalMask, inputIds, other"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(decoder_package, change, sentence):
    session = Package(decoder_package).session()
    inputs = {
        "inputIds": np.zeros((1, 1), np.int32),
        "causalMask": np.zeros((1, 1, 1, 1), np.float16),
    }
    with pytest.raises(ValueError, match=sentence):
        session.run(inputs | change)


def edit(path, change):
    """Change a package's program."""
    package = Package(path)
    (function,) = package.spec.mlProgram.functions.values()
    change(function.block_specializations[function.opset].operations)
    (path / MODEL).write_bytes(package.spec.SerializeToString())


def test_an_unknown_operation_is_named(decoder_package, tmp_path):
    path = shutil.copytree(decoder_package, tmp_path / "d.mlpackage")

    def rename(operations):
        next(o for o in operations if o.type == "softmax").type = "hardmax"

    edit(path, rename)
    session = Package(path).session()
    inputs = {
        "inputIds": np.zeros((1, 1), np.int32),
        "causalMask": np.zeros((1, 1, 1, 1), np.float16),
    }
    with pytest.raises(ValueError, match="the operation 'hardmax' is not known"):
        session.run(inputs)


@pytest.mark.parametrize("what", ["shape", "type"])
def test_a_value_that_is_not_as_declared_is_an_error(decoder_package, tmp_path, what):
    path = shutil.copytree(decoder_package, tmp_path / "d.mlpackage")

    def lie(operations):
        operation = next(o for o in operations if o.type == "linear")
        declared = operation.outputs[0].type.tensorType
        if what == "shape":
            declared.dimensions[2].constant.size = D + 1
        else:
            declared.dataType = 11  # FLOAT32

    edit(path, lie)
    inputs = {
        "inputIds": np.zeros((1, 1), np.int32),
        "causalMask": np.zeros((1, 1, 1, 1), np.float16),
    }
    declared = r"FLOAT16\[1, \?, 9\]" if what == "shape" else r"FLOAT32\[1, \?, 8\]"
    with pytest.raises(ValueError, match=rf"linear .* but is declared {declared}"):
        Package(path).session().run(inputs)


def cut(path, bytes_left):
    content = path.read_bytes()
    path.write_bytes(content[:bytes_left])


DAMAGE = {
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "not a Core ML package"),
    "empty manifest": (lambda p: cut(p / "Manifest.json", 0), "not a Core ML package"),
    "no model": (lambda p: (p / MODEL).unlink(), "model.mlmodel is missing"),
    "cut model": (lambda p: cut(p / MODEL, 900), "is not a Core ML model"),
    "empty model": (lambda p: cut(p / MODEL, 0), "is not an ML program"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "weight.bin cannot be read"),
    "empty weights": (lambda p: cut(p / WEIGHTS, 0), "weight.bin cannot be read"),
    "cut weights": (lambda p: cut(p / WEIGHTS, 200), "it was cut off"),
    "cut before a blob": (lambda p: cut(p / WEIGHTS, 64), "has no blob"),
    "foreign weights": (
        lambda p: (p / WEIGHTS).write_bytes(b"\0" * 4096),
        "is not a weight file of version 2",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_package_is_one_sentence(decoder_package, tmp_path, what):
    path = shutil.copytree(decoder_package, tmp_path / "d.mlpackage")
    damage, sentence = DAMAGE[what]
    damage(path)
    with pytest.raises(ValueError, match=sentence):
        Package(path).session()


def test_an_offset_outside_of_the_file_and_a_file_outside_of_the_package_are_refused(
    decoder_package, tmp_path
):
    def value(operations):
        blobs = (o.attributes["val"] for o in operations if o.type == "const")
        return next(b for b in blobs if b.HasField("blobFileValue")).blobFileValue

    far = shutil.copytree(decoder_package, tmp_path / "far.mlpackage")
    edit(far, lambda operations: setattr(value(operations), "offset", 1 << 40))
    with pytest.raises(ValueError, match=f"at offset {1 << 40} has no blob"):
        Package(far).session()
    out = shutil.copytree(decoder_package, tmp_path / "out.mlpackage")
    name = "@model_path/../../../far.mlpackage/" + WEIGHTS
    edit(out, lambda operations: setattr(value(operations), "fileName", name))
    with pytest.raises(ValueError, match="has weights outside of it"):
        Package(out).session()


# --- functions ---


def test_functions_share_weights_and_keep_their_own_state(
    decoder_package, hf_package, tmp_path
):
    parts = ct.utils.MultiFunctionDescriptor()
    parts.add_function(str(decoder_package), "main", "plain")
    parts.add_function(str(hf_package), "main", "hf")
    parts.default_function_name = "plain"
    both = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(parts, str(both))
    package = Package(both)
    assert package.functions == ["plain", "hf"]
    size = (decoder_package / WEIGHTS).stat().st_size
    assert (both / WEIGHTS).stat().st_size < 1.1 * size
    inputs = {
        "inputIds": TOKENS[None].astype(np.int32),
        "causalMask": np.zeros((1, 1, 9, 9), np.float16),
    }
    plain = package.session("plain")
    np.testing.assert_allclose(
        plain.run(inputs)["logits"][0], expected_logits(), rtol=1e-2, atol=5e-2
    )
    longer = inputs | {"causalMask": np.zeros((1, 1, 9, 10), np.float16)}
    np.testing.assert_array_equal(
        package.session("hf").run(longer)["logits"],
        package.session("plain").run(inputs)["logits"],
    )
    assert package.session("hf").largest("causalMask", 3) == CONTEXT + 1
    with pytest.raises(ValueError, match="no function 'main'; it has plain, hf"):
        package.session()
