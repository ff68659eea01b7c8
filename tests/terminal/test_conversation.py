"""A conversation by a pipe: one line a message or a command."""

import io
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, full_disk, run_command, write_family, write_folder

from ifp_mlx.chat import main as chat
from ifp_mlx.engine import Engine, EngineClosed
from ifp_mlx.storage.writer import write_store
from ifp_mlx.tasks import main as tasks
from ifp_mlx.terminal.bars import Bars
from ifp_mlx.terminal.commands import obey
from ifp_mlx.terminal.conversation import Conversation
from ifp_mlx.terminal.reading import Reader
from ifp_mlx.terminal.talk import hold

GERMANY = "What is Germany called in French?"
SHORT = ("--max-tokens", "4")


@pytest.fixture
def talk(monkeypatch, capsys):
    """Hold a conversation of some lines; return status, stdout and stderr in lines."""

    def hold(*lines, options=()):
        said = b"".join(
            line if isinstance(line, bytes) else line.encode() for line in lines
        )
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
        status, out, err = run_command(chat, capsys, *options)
        return status, out.splitlines(), err.splitlines()

    return hold


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a task in its library."""
    folder = write_folder(tmp_path_factory.mktemp("chat") / "tiny")
    made = ("make", "--model", folder, "--name", "french", "--keep", "0.5")
    tasks([*map(str, made), "--instruction", "You translate into French."])
    return folder


def test_it_answers_and_obeys_where_nobody_types():
    done = subprocess.run(
        [sys.executable, "-m", "ifp_mlx", "chat"],
        input=f"{GERMANY}\n/stats\n",
        capture_output=True,
        text=True,
    )
    answer, selected, *_ = done.stdout.splitlines()
    assert (done.returncode, answer) == (0, "Allemagne")
    assert "256 of 1024 channels (25%), mask" in selected
    assert done.stderr.startswith("[25% of the channels kept · ")
    assert done.stderr.count("\n") == 1


def test_the_shipped_model_is_the_default_and_each_answer_has_its_figures(talk):
    question = "Tell me the currency code of Japan."
    status, out, err = talk(f"{GERMANY}\n", "\n", "/reset\n", question)
    assert (status, [out[0], out[2]]) == (0, ["Allemagne", "JPY"])
    assert len(err) == 2  # an empty line is nothing
    for line in err:
        assert line.startswith("[25% of the channels kept · ")
        assert "tokens/s" in line and line.endswith("MB in memory]")


def test_the_guides_conversation_is_what_is_said(talk, tmp_path, monkeypatch):
    text = (ROOT / "examples/guides/chat.md").read_text(encoding="utf-8")
    shown = re.search(r"(    > .*\n(?:    .*\n)+)", text)[1]
    lines = [line.removeprefix("    ") for line in shown.splitlines()]
    monkeypatch.chdir(tmp_path)
    typed = [line.removeprefix("> ") + "\n" for line in lines if line.startswith("> ")]
    status, out, err = talk(*typed)
    share = [line.split(" · ")[0] for line in lines if line.startswith("[")]
    assert (status, [line.split(" · ")[0] for line in err]) == (0, share)
    assert out == [line for line in lines if line[0] not in "[>"]


def test_the_conversation_has_a_history_until_it_is_reset(talk, folder, tmp_path):
    file = tmp_path / "talk.json"
    options = (
        "--model",
        folder,
        "--keep",
        "0.5",
        "--system-prompt",
        "Be brief.",
        *SHORT,
    )
    lines = ("One.\n", "Two.\n", f"/save {file}\n", "/stats\n", "/reset\n", "Three.\n")
    status, out, _ = talk(*lines, f"/save {tmp_path}/new.json\n", options=options)
    assert status == 0
    saved = json.loads(file.read_text())
    roles = [message["role"] for message in saved["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    asked = [m["content"] for m in saved["messages"] if m["role"] == "user"]
    assert asked == ["One.", "Two."] and saved["model"] == "tiny"
    assert saved["selection"]["kept_channels"] == 96
    assert any(
        "yours: 2. Since the start, answers: 2, tokens read: " in line for line in out
    )
    assert any(" of 512 tokens" in line for line in out)
    new = json.loads((tmp_path / "new.json").read_text())["messages"]
    assert [m["content"] for m in new[:2]] == ["Be brief.", "Three."] and len(new) == 3


def test_tasks_instructions_and_shares_select(talk, folder):
    lines = ["/task\n", "/task french\n", "/keep 0.75\n", "Hello.\n", "/task off\n"]
    lines += ["/keep 0.75\n", "Hello.\n", "/select You sort numbers.\n", "/select\n"]
    lines += ["/keep 0.25\n", "/select off\n"]
    status, out, err = talk(*lines, options=("--model", folder, *SHORT))
    said = [line for line in out if "select" in line or "next answer" in line]
    assert status == 0 and said == [
        "Tasks: french. The first message of the conversation selects; nothing is "
        "selected yet.",
        said[1],
        "The first message of the conversation selects; nothing is selected yet.",
        "The next answer keeps 0.75.",
        said[4],
        said[4],
        said[6],
        "The first message of the conversation selects; nothing is selected yet.",
    ]
    assert said[1].startswith("The task french selects: 96 of 192 channels (50%")
    sort = "The instruction 'You sort numbers.' selects: "
    assert said[4].startswith(f"{sort}144 of 192 channels (75%, agreement ")
    assert said[6].startswith(f"{sort}48 of 192 channels (25%, agreement ")
    refused, of_task, of_first = err
    assert refused == (
        "How much is kept is fixed by the task french; /task off lets messages select again."
    )
    assert of_task.startswith("[50% of the channels kept")
    assert of_first.startswith("[75% of the channels kept · agreement ")


def test_a_task_an_instruction_or_a_mask_may_be_there_from_the_start(talk, folder):
    mask = folder / "tasks/french.safetensors"
    french = {"--task": "french", "--mask-file": mask, "--instruction": "Say it."}
    for name, value in french.items():
        how = ("--model", folder, name, value, *SHORT)
        size = ("--keep", "0.5") if name == "--instruction" else ()
        status, out, err = talk("/select\n", "Hello.\n", options=(*how, *size))
        assert status == 0 and "selects: 96 of 192 channels (50%" in out[0]
        assert err[0].startswith("[50% of the channels kept")


def test_the_system_message_can_change(talk, folder, tmp_path):
    file = tmp_path / "talk.md"
    lines = (
        "/system\n",
        "Hi.\n",
        "/system Be kind.\n",
        f"/save {file}\n",
        "/system off\n",
    )
    options = ("--model", folder, "--keep", "0.5", *SHORT)
    _, out, _ = talk(*lines, options=options)
    found = [line for line in out if "system message" in line]
    assert found == [
        "There is no system message.",
        "The system message is: Be kind.",
        "There is no system message.",
    ]
    title, _, system, _, asked, *_ = file.read_text().splitlines()
    assert title == "# A conversation with tiny"
    assert (system, asked) == ("**System:** Be kind.", "**You:** Hi.")


WRONG = {
    "/tsak x": "There is no command /tsak; did you mean /task?",
    "/etc/passwd": "There is no command /etc/passwd; /help lists them. A message ",
    "/task german": "There is no task 'german' in ",
    "/keep 2": "keep=2.0 is not a share of the units",
    "/keep most": "keep='most' is not a share of the units",
    "/save": "/save must name a file that ends in .json or .md.",
    "/save talk.doc": "talk.doc must name a file that ends in .json or .md.",
    "/save ~nobody-knows/talk.json": "~nobody-knows/talk.json begins with ~nobody-knows",
    "/task\tgerman": "There is no task 'german' in ",
    "/save /proc/talk.json": "/proc/talk.json cannot be written: ",
    "/save FOLDER/config.json": "FOLDER/config.json already exists; ",
    "long " * 300: "The prompt has ",
    b"fjor\xe9": "The line is not UTF-8 at byte 5 (0xe9)",
}


def test_what_cannot_be_done_is_a_sentence_and_the_conversation_goes_on(talk, folder):
    lines = [
        line
        if isinstance(line, bytes)
        else line.replace("FOLDER", str(folder)).encode()
        for line in WRONG
    ]
    options = ("--model", folder, "--keep", "0.5", *SHORT)
    status, out, err = talk(*(line + b"\n" for line in lines), "Hi.\n", options=options)
    assert (status, len(err)) == (0, len(WRONG) + 1) and out
    for said, sentence in zip(err, WRONG.values(), strict=False):
        assert said.startswith(sentence.replace("FOLDER", str(folder)))
    assert err[-1].startswith("[50% of the channels kept")


def test_saving_again_replaces_and_a_full_disk_leaves_the_file_as_it_was(
    folder, tmp_path
):
    file = tmp_path / "talk.json"
    how = {"choosing": {"keep": 0.5}, "decoding": {"max_tokens": 4}}
    with Engine.open(folder) as engine:
        conversation = Conversation(engine, **how)
        assert list(conversation.answer("Hi."))
        for _ in range(2):
            assert obey(conversation, f"/save {file}") == f"Saved in {file}."
        before = file.read_text()
        assert list(conversation.answer("Go on."))
        with full_disk(), pytest.raises(OSError, match="talk.json cannot be written"):
            obey(conversation, f"/save {file}")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--model", "/no/such"), "/no/such"),
        (("--keep", "3"), "keep=3.0 is not a share of the units"),
        (("--task", "german"), "There is no task 'german'"),
        (("--memory-gb", "0"), "--memory-gb 0 must be more than 0."),
        (("--mask-file", "/no/mask"), "There is no mask file /no/mask."),
        (("--task", "french", "--keep", "0.5"), "says which units are kept"),
        (("--memory-gb", "1e-5", "--instruction", "Hi", "--keep", "1"), "memory limit"),
        (("--temp", "-1"), "temp"),
        (("--kv-bits", "4", "--max-kv-size", "64"), "kv"),
        (("--reselect", "drift"), "reselect=drift"),
        (("--reselect", "turn", "--instruction", "Hi"), "reselect='turn'"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line_and_exit_status_2(
    talk, folder, options, sentence
):
    model = () if "--model" in options else ("--model", folder)
    status, out, err = talk("Hi.\n", options=(*model, *options))
    assert (status, out, len(err)) == (2, [], 1), err
    assert err[0].startswith("ifp_mlx.chat: error: ") and sentence in err[0]


def test_a_conversation_ends_with_its_engine(folder):
    with Engine.open(folder) as engine:
        conversation = Conversation(engine)
        engine.close()
        with pytest.raises(EngineClosed):
            hold(conversation, Reader(lambda: "Hi.", typed=True), Bars())


def test_two_slashes_begin_a_message(talk, folder, tmp_path):
    options = ("--model", folder, "--keep", "0.5", *SHORT)
    talk("//etc is a folder.\n", f"/save {tmp_path}/a.json\n", options=options)
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["messages"][0]["content"] == "/etc is a folder."


def test_help_lists_every_command_and_quit_ends(talk):
    status, out, err = talk("/help\n", "/quit\n", f"{GERMANY}\n")
    commands = "task keep select system save stats reset help quit".split()
    assert [line.split()[0] for line in out[:-1]] == [f"/{name}" for name in commands]
    assert (status, err) == (0, [])
    assert max(map(len, out)) <= 80


def test_the_whole_model_checks(talk, folder):
    options = (
        "--model",
        folder,
        "--keep",
        "0.5",
        "--check",
        "exact",
        "--max-tokens",
        "12",
    )
    status, out, err = talk("Hi.\n", "/stats\n", options=options)
    assert status == 0 and "checked, " in err[0] and " drafts stood" in err[0]
    assert out[-1].startswith("Checking: ")


def test_mixtures_and_stores_are_talked_to_alike(talk, tmp_path):
    mixture = write_family(tmp_path / "mixture", "olmoe")
    options = ("--keep", "0.5", *SHORT)
    _, _, err = talk("Hi.\n", options=("--model", mixture, *options))
    assert err[0].startswith("[50% of the experts kept")
    plain = write_folder(tmp_path / "plain")
    write_store(plain, tmp_path / "store")
    found = [
        talk("Hi.\n", options=("--model", model, *options))
        for model in (plain, tmp_path / "store")
    ]
    assert found[0][1] == found[1][1] and found[1][0] == 0


def test_what_is_selected_anew_with_each_turn_is_another_mask(talk, folder):
    lines = ("Sort 3 1 2.\n", "/select\n", "Tell a tale.\n", "/select\n")
    options = ("--model", folder, "--keep", "0.5", *SHORT)
    for reselect, masks in (("off", 1), ("turn", 2)):
        _, out, _ = talk(*lines, options=(*options, "--reselect", reselect))
        found = {line for line in out if line.startswith("The first message")}
        assert len({line.split("mask ")[1] for line in found}) == masks
