"""A person at a terminal: Ctrl-C stops an answer and not the program."""

import os
import pty
import re
import select
import signal
import sys
import time

import pytest
from conftest import write_folder

pytest.importorskip("prompt_toolkit")
SECONDS = 120
PENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, and moves of the cursor


class Person:
    """Types at a program's terminal and reads what it shows."""

    def __init__(self, *command):
        self.shown = ""
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execv(command[0], command)

    def types(self, text):
        self.shown = ""
        os.write(self.end, text.encode())

    def sees(self, pattern):
        """Read until a pattern is shown."""
        until = time.monotonic() + SECONDS
        while not (found := re.search(pattern, PENS.sub("", self.shown), re.DOTALL)):
            left = until - time.monotonic()
            assert left > 0 and select.select([self.end], [], [], left)[0], self.shown
            try:
                self.shown += os.read(self.end, 4096).decode(errors="replace")
            except OSError:  # the program has ended
                raise AssertionError(self.shown) from None
        return found

    def status(self):
        """Return the program's exit status, once it has ended."""
        until = time.monotonic() + SECONDS
        try:
            while select.select([self.end], [], [], until - time.monotonic())[0]:
                if not os.read(self.end, 4096):
                    break
            else:
                os.kill(self.pid, signal.SIGKILL)
        except OSError:  # the terminal has gone with the program
            pass
        os.close(self.end)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(tmp_path):
    # Its end is the only token that this model never says: it goes on until stopped.
    size = {"max_position_embeddings": 1 << 20, "eos_token_id": 258}
    folder = write_folder(tmp_path / "endless", **size)
    how = ("--model", str(folder), "--keep", "0.5", "--max-tokens", "1000000")
    person = Person(sys.executable, "-m", "ifp_mlx", "chat", *how)
    person.sees(">")
    person.types("Hello\r")
    person.sees("\n.{40}")
    person.types("\x03")
    person.sees("stopped]")
    person.sees(">")
    person.types("\x03")  # of a line, not of an answer
    person.sees("Ctrl-D or /quit ends the conversation.")
    person.types("/stats\r")
    # What is typed before the next prompt is there may be lost, and a Ctrl-D with it.
    person.sees("Messages of yours: 1. Since the start, answers: 1.*\n>")
    person.types("\x04")
    assert person.status() == 0
