import json
from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest
from conftest import run_command, write_folder

from ifp_mlx import load
from ifp_mlx.evaluate import main
from ifp_mlx.evaluation.teacher import Setting
from ifp_mlx.selection.prompts import tokenize

pytest.importorskip("lm_eval", reason="needs pip install '.[evaluate]'")

from lm_eval.api.instance import Instance

from ifp_mlx.evaluation import harness

HALF = Setting("activation", 0.5, "uniform")
ASKED = {"selector": "activation", "keep": 0.5, "allocation": "uniform"}  # the same
COMPENSATED = replace(HALF, compensate=True)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
  cache_dir: {folder}/cache
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
"""
CHOICES = """\
output_type: multiple_choice
training_split: train
doc_to_choice: ["no", "yes"]
metric_list: [{metric: acc}]
"""
WORDS = """\
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    for part, first in (("train", 10), ("test", 0)):
        docs = [
            {"question": f"Is {n} odd?", "answer": n % 2}
            for n in range(first, first + 4)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, rest in (("tiny_choice", CHOICES), ("tiny_words", WORDS)):
        (folder / f"{name}.yaml").write_text(
            TASK.format(folder=folder, name=name) + rest
        )
    write_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return harness.SelectingLM(load(folder / "model")[0])


@pytest.fixture(scope="module")
def tasks(folder):
    return harness.open_tasks(["tiny_choice", "tiny_words"], folder)


def request(kind, *arguments, task="tiny_choice"):
    return Instance(kind, {}, arguments, 0, metadata=(task, 0, 1))


@pytest.mark.parametrize("setting", [HALF, COMPENSATED], ids=["plain", "compensated"])
def test_a_request_selects_for_its_continuations(lm, setting):
    model = lm._ifp
    lm.use(setting)
    question, ends = "Is it so?", (" yes", " nope")
    found = lm.loglikelihood([request("loglikelihood", question, e) for e in ends])
    prompt = lm._tokenize([question])[0]
    selection = model.select(list(prompt), **ASKED)
    if setting.compensate:
        selection = selection.compensated(prompt)
    compact = model.compact(selection)
    for (score, _), end in zip(found, ends, strict=True):
        tokens = lm._tokenize([question + end])[0]
        logits = compact(mx.array([tokens]))[0]
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        at = range(len(prompt), len(tokens))
        expected = sum(float(logs[n - 1, tokens[n]]) for n in at)
        assert score == pytest.approx(expected, rel=1e-4)


def test_dense_is_what_mlx_lm_makes_of_it(lm, folder):
    from mlx_lm.evaluate import MLXLM

    stock = MLXLM(str(folder / "model"))
    asked = [request("loglikelihood", f"Is {n} so?", " yes") for n in range(3)]
    for setting in (HALF, COMPENSATED):
        lm.use(setting)
        lm.loglikelihood(asked)  # leaves a mask behind, or a compact model
    lm.use(None)
    expected = stock.loglikelihood(asked)
    assert lm.loglikelihood(asked) == [
        (pytest.approx(score, rel=1e-5), greedy) for score, greedy in expected
    ]
    texts = [request("generate_until", "Go on", {"until": ["\n"], "max_gen_toks": 4})]
    assert lm.generate_until(texts) == stock.generate_until(texts)


def test_generated_requests_select_one_by_one(lm):
    model, tokenizer = lm._ifp, lm.tokenizer
    lm.use(HALF)
    asked = [f"Tell me of {what}" for what in ("dogs", "cats and the sea")]
    options = {"until": ["\n\n"], "max_gen_toks": 4}
    found = lm.generate_until([request("generate_until", a, options) for a in asked])
    from mlx_lm import generate

    for text, question in zip(found, asked, strict=True):
        prompt = list(lm._tokenize([question])[0])
        selection = model.select(prompt, **ASKED)
        compact = model.compact(selection)
        assert (
            text == generate(compact, tokenizer, prompt, max_tokens=4).split("\n\n")[0]
        )


def test_a_task_mask_is_made_from_examples_that_are_not_evaluated(lm, tasks):
    texts = harness.task_texts(tasks["tiny_choice"], lm.tokenizer, chat=True)
    asked = [{"role": "user", "content": "Is 11 odd?"}]
    expected = tokenize(lm.tokenizer, asked) + lm.tokenizer.encode("yes")
    assert len(texts) == 4 and texts[1] == expected
    lm.use(HALF, {"tiny_choice": tasks["tiny_choice"]})
    selection = lm._task_masks["tiny_choice"]
    assert selection.sizes == [32] * 3 and selection.text is None
    lm.use(COMPENSATED, {"tiny_choice": tasks["tiny_choice"]})
    selection = lm._task_masks["tiny_choice"]
    assert selection.compensates and selection.text == tuple(sum(texts, []))


def test_a_description_selects_where_there_are_no_examples(lm, tasks):
    task = tasks["tiny_words"]
    with pytest.raises(ValueError, match="tiny_words has no description"):
        lm.use(HALF, {"tiny_words": task})
    task.config.description = "Say whether it is odd."
    texts = harness.task_texts(task, lm.tokenizer, chat=True)
    assert [lm.tokenizer.decode(t).count("whether it is odd") for t in texts] == [1]
    task.config.description = ""


def test_every_task_is_answered_under_its_own_mask(lm, tasks):
    task = tasks["tiny_choice"]
    lm.use(HALF, {"a": task, "b": task})
    lm._task_masks["b"] = lm._ifp.select([0], keep=0.5, selector="random")
    asked = [request("loglikelihood", "So?", " yes", task=t) for t in ("a", "b", "a")]
    one, other, again = lm.loglikelihood(asked)
    assert one == again and one != other


def test_whole_texts_have_no_prompt_to_select_by(lm):
    lm.use(HALF)
    with pytest.raises(ValueError, match="tiny_choice scores whole texts.*select-by"):
        lm.loglikelihood_rolling([request("loglikelihood_rolling", "A text.")])


def test_the_command_compares_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    given = ["--model", folder / "model", "--harness", "tiny_choice", "tiny_words"]
    given += ["--harness-path", folder, "--limit", "3", "--output", tmp_path / "out"]
    status, out, err = run_command(main, capsys, *given, "--json")
    assert status == 0, err
    assert "a mask for each request" in out and "tiny_choice, acc | 3 | dense" in out
    found = json.loads(out.splitlines()[-1])["results"]
    assert set(found) == {"tiny_choice, acc", "tiny_words, exact_match"}
    assert "tiny_choice, acc: the dense model's" in out  # three documents say nothing
    monkeypatch.setattr(harness, "run", None)  # nothing is left to run
    status, again, _ = run_command(main, capsys, *given, "--json")
    assert status == 0 and again == out


def test_mistakes_are_one_line_and_exit_status_2(folder, capsys, monkeypatch):
    few = partial(harness.TaskManager, include_defaults=False)  # all take 10 seconds
    monkeypatch.setattr(harness, "TaskManager", few)
    given = ["--model", folder / "model", "--harness", "tiny_choise"]
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "There is no task tiny_choise in lm-eval" in err
    given = ["--model", folder / "model", "--harness", "tiny_words"]
    given += ["--harness-path", folder, "--select-by", "task"]
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "give --select-by input" in err
