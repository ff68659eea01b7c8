import json
import sys
import time

import pytest
from conftest import run_command, write_folder

from ifp_mlx import generate, load
from ifp_mlx.evaluate import main
from ifp_mlx.evaluation import sandbox, shares
from ifp_mlx.evaluation.checks import chance, judge

OPTIONS = ["run away.", "sing a song.", "sit down."]
ADD = {
    "kind": "program",
    "start": "import math\n\ndef add(a, b):\n    '''Add.'''\n",
    "entry": "add",
    "test": "def check(f):\n    assert f(2, 3) == 5 and f(-1, 1) == 0",
}


def test_numbers_are_read_as_people_write_them():
    check = {"kind": "number", "expected": "1200"}
    for right in ("so 1,200 in all.", "#### $1200\nThat is 3 more.", "x = 1200.0"):
        assert judge(check, "", right) is True
    assert judge(check, "", "1200, no: 12") is False
    assert judge(check, "", "I cannot say.") is None


def test_the_first_yes_or_no_counts():
    check = {"kind": "yes-no", "expected": "no"}
    assert judge(check, "", "No. Or yes?") is True
    assert judge(check, "", "Yes, no doubt") is False
    assert judge(check, "", "Nobody knows") is None


def test_a_choice_is_a_letter_or_the_option_itself():
    check = {"kind": "choice", "options": OPTIONS, "expected": 1}
    for right in (
        "B",
        "(B) because",
        "B) sing",
        "The answer is B.",
        "sing a song. Yes",
    ):
        assert judge(check, "", right) is True
    assert judge(check, "", "C.") is False
    assert judge(check, "", "A man who sings") is None  # "A" is a word here
    assert judge(check, "", "D.") is None
    assert chance(check) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "answer",
    [
        "    return a + b\n",
        "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
        "```\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return int(math.fsum((a, b)))",  # their import
    ],
)
def test_a_program_is_right_if_it_passes_the_tests(answer):
    assert judge(ADD, "", answer) is True


@pytest.mark.parametrize(
    "answer",
    [
        "    return a - b\n",
        "```python\nimport sys\nsys.exit(0)\n```",
        "```python\nimport os\ndef add(a, b): os._exit(0)\n```",
        "```python\ndef add(a, b):\n    while True: print('x' * 9999)\n```",
        "```python\ndef add(a, b):\n    while True: pass\n```",
        "```python\nx = bytearray(1 << 31)\ndef add(a, b): return a + b\n```",
    ],
)
def test_a_wrong_program_does_not_pass_however_it_ends(answer, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 2)
    assert judge(ADD, "", answer) is False


def test_text_without_a_program_is_not_run():
    assert judge(ADD, "", "I would add the numbers.") is None


def test_a_program_sees_no_environment_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_WORD", "open sesame")
    assert sandbox.passes("import os\nassert 'SECRET_WORD' not in os.environ")
    assert sandbox.passes("open('here.txt', 'w').write('x')")
    assert not sandbox.passes("open('large', 'wb').write(b'x' * (1 << 22))")


@pytest.mark.skipif(not sandbox.can_cut_off(), reason="unshare is not allowed here")
def test_a_program_has_no_network_and_is_not_outlived(tmp_path):
    assert sandbox.passes(
        "import socket\n"
        "try:\n    socket.create_connection(('1.1.1.1', 80), 1)\n"
        "except OSError: pass\n"
        "else: raise SystemExit('connected')\n"
        "assert [n for _, n in socket.if_nameindex()] == ['lo']\n"
    )
    mark = tmp_path / "mark"
    orphan = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); time.sleep(1)\n"
        f"    open({str(mark)!r}, 'w').write('alive'); os._exit(0)\n"
    )
    assert sandbox.passes(orphan)
    time.sleep(1.3)
    assert not mark.exists()


def test_the_verifiers_of_packages_judge():
    pytest.importorskip("reasoning_gym")
    entry = {"question": "2+3?", "answer": "5", "metadata": {}}
    check = {"kind": "reasoning-gym", "name": "chain_sum", "entry": entry}
    assert judge(check, "", "It is\n<answer>5</answer>") is True
    assert judge(check, "", "5") is True
    assert judge(check, "", "<answer>6</answer>") is False
    assert judge(check, "", "") is None


def test_a_missing_judge_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "if_verifiable", None)
    monkeypatch.setitem(sys.modules, "if_verifiable.common", None)
    with pytest.raises(ImportError, match=r"pip install 'ifp_mlx\[evaluate\]'"):
        judge({"kind": "instructions", "ids": [], "details": []}, "", "x")


def test_a_difference_is_paired():
    dense, worse = [1.0] * 8 + [0.0] * 2, [1.0] * 2 + [0.0] * 8
    found = shares.compare(worse, dense)
    assert found["minus_dense"] == pytest.approx(-0.6)
    low, high = found["minus_dense_interval"]
    assert low <= -0.6 <= high < 0
    assert found["mcnemar"] == pytest.approx(2 / 64)
    assert shares.compare(dense, dense)["minus_dense_interval"] == (0, 0)
    fractions = shares.compare([0.5, 0.25], [0.5, 0.5])
    assert fractions["mcnemar"] is None and fractions["mean"] == 0.375


def test_chance_is_named_where_the_dense_model_is_at_it():
    guess = shares.compare([1.0, 0.0] * 10, [1.0, 0.0] * 10)
    assert "cannot be told from a guess (50% right)" in shares.at_chance(
        "q", guess, 0.5
    )
    knows = shares.compare([1.0] * 20, [1.0] * 20)
    assert shares.at_chance("q", knows, 0.5) is None
    nothing = shares.compare([0.0] * 20, [0.0] * 20)
    assert "(none right)" in shares.at_chance("q", nothing, 0.0)


@pytest.fixture
def asked(tmp_path):
    model = write_folder(tmp_path / "tiny")
    questions = [
        {"prompt": f"Is {n} odd?", "check": {"kind": "yes-no", "expected": "no"}}
        for n in (2, 4)
    ]
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, questions)))
    program = {"prompt": "Add.", "check": ADD}
    (folder / "code.jsonl").write_text(json.dumps(program))
    (folder / "bad.jsonl").write_text('{"prompt": "Hm?", "check": {"kind": "taste"}}')
    return ["--model", model, "--answers-folder", folder, "--max-tokens", "3"]


def test_answers_are_judged_and_a_stopped_run_goes_on(
    asked, tmp_path, capsys, monkeypatch
):
    from ifp_mlx.evaluation import answers

    out = tmp_path / "out"
    given = [*asked, "--answers", "odd", "--output", out, "--json"]
    status, text, err = run_command(main, capsys, *given)
    assert status == 0, err
    assert "questions: odd 2; greedy, at most 3 tokens" in text
    assert "cannot be told from a guess" in text
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4  # two questions, dense and compact
    (out / "rows.jsonl").write_text("".join(lines[:3]))
    judged = []

    def counted(*question):
        judged.append(question)
        return judge(*question)

    monkeypatch.setattr(answers, "judge", counted)
    _, again, _ = run_command(main, capsys, *given)
    assert len(judged) == 1
    assert again.splitlines()[-1] == text.splitlines()[-1]


def test_keeping_everything_answers_like_the_dense_model(asked, tmp_path, capsys):
    given = [*asked, "--answers", "odd", "--keep", "1", "--output", tmp_path / "out"]
    run_command(main, capsys, *given)
    lines = map(json.loads, (tmp_path / "out/rows.jsonl").read_text().splitlines())
    texts: dict = {}
    for line in lines:
        texts.setdefault(line["question"], []).append(line["text"])
    assert all(dense == compact for dense, compact in texts.values())


def test_compensated_answers_are_what_generate_says(asked, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--answers", "odd", "--compensate", "--selector", "blend"]
    status, _, err = run_command(main, capsys, *asked, *given, "--output", out)
    assert status == 0, err
    lines = list(map(json.loads, (out / "rows.jsonl").read_text().splitlines()))
    model, tokenizer = load(asked[1])
    how = {"keep": 0.5, "compensate": True, "prefill": "compact", "max_tokens": 3}
    said = {generate(model, tokenizer, f"Is {n} odd?", **how) for n in (2, 4)}
    assert {line["text"] for line in lines if line["arm"] != "dense"} == said


def test_programs_run_only_when_that_was_allowed(asked, capsys):
    given = [*asked, "--answers", "code"]
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "give --run-generated-code" in err
    status, out, err = run_command(main, capsys, *given, "--run-generated-code")
    assert status == 0 and "programs that the model wrote are run here" in err
    assert "| code | 1 | dense | 0.0%" in out


def test_mistakes_are_one_line_and_exit_status_2(asked, capsys):
    for name, sentence in (
        ("gone", "has bad, code, odd"),
        ("bad", "Line 1 of"),
    ):
        status, _, err = run_command(main, capsys, *asked, "--answers", name)
        assert status == 2 and sentence in err and err.count("\n") == 1
    status, _, err = run_command(main, capsys, *asked)
    assert status == 2 and "--data --harness --answers" in err
