"""The benchmark of a mixture larger than memory, on a small one; its page."""

import json

import pytest

from examples.benchmarks import pages
from examples.benchmarks.experts import memory
from ifp_mlx.selection.masks import Selection

SMALL = memory.QUARTER._replace(
    shape=memory.QUARTER.shape
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    fits=8,
    kept=8,
    tokens=2,
    turns=1,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Measure everything of a small model; the commands are made up."""
    scratch = tmp_path_factory.mktemp("scratch")
    asked = []

    def child(*command, limit=0):
        """Answer as commands do, the dense model with a failure under a limit."""
        asked.append((command, limit))
        if command[0] == "mlx_lm.generate":
            return int(limit > 0), [json.dumps({"peak": 300})]
        said = {"text": "Ho", "prompt_tokens": 9, "generation_tokens": 2}
        said |= {
            "selection": {"mask_id": "ab", "layers": [8, 8]},
            "peak_memory_bytes": 5,
        }
        said["seconds"] = {"select": 1.0, "load": 0.5}
        return 0, ["Ho", json.dumps(said), json.dumps({"peak": 300_000})]

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "child", child)
        for part in memory.PARTS:
            if part == "limited":
                model = memory.load(scratch / "model")[0]
                one, _ = memory.two_selections(model, SMALL.kept)
                one.save(scratch / "mask.safetensors")
            found[part] = memory.measure(part, scratch, SMALL)
    return json.loads(json.dumps(found)), asked, scratch


def test_a_switch_reads_a_quarter_and_a_sweep_the_file_once(results):
    found, _, _ = results
    for part in (found["folder"], found["store"]):
        assert part["same"]
        assert part["switch_bytes"] < part["load_bytes"]
    sizes = found["model"]
    assert sizes["file_bytes"] <= found["sweep"]["bytes"] <= 1.5 * sizes["file_bytes"]


def test_two_selections_share_three_quarters(results):
    model = memory.load(results[2] / "model")[0]
    one, other = (s.mask() > 0 for s in memory.two_selections(model, 8))
    assert ((one * other).sum(axis=1) == 6).all() and (one.sum(axis=1) == 8).all()


def test_the_dense_model_and_the_command_have_one_limit_and_the_control_none(results):
    found, asked, scratch = results
    (dense, limit), (empty, free), *runs = asked
    assert dense[:3] == ("mlx_lm.generate", "--model", scratch / "model")
    assert empty[2] == scratch / "empty" and (limit, free) == (SMALL.limit_bytes, 0)
    assert [limit for _, limit in runs] == [SMALL.limit_bytes] * 2 + [0]
    assert ["--memory-gb" in run for run, _ in runs] == [True, True, False]
    assert ["--mask-file" in run for run, _ in runs] == [False, False, True]
    assert not found["limited"]["dense_runs"]
    mask = Selection.load(scratch / "mask.safetensors")
    needed, sizes = found["limited"]["needed_bytes"], found["model"]
    assert (
        needed["compact"]
        == sizes["core_bytes"] + sum(mask.sizes) * sizes["expert_bytes"]
    )


def test_the_table_says_where_texts_differ(results):
    found = json.loads(json.dumps(results[0]))
    assert "DIFFERENT" not in memory.table(found)
    found["limited"]["whole"]["text"] = "Ha"
    assert memory.table(found).count("DIFFERENT") == 1
    found["store"]["same"] = False
    assert memory.table(found).count("DIFFERENT") == 2


def test_the_page_has_what_was_measured_and_nothing_else():
    page = memory.PAGE.read_text(encoding="utf-8")
    measured = json.loads(memory.RESULTS.read_text())
    assert pages.filled(page, {"memory": memory.table(measured)}) == page
    assert all(mark.format("memory") in page for mark in pages.MARKS)
