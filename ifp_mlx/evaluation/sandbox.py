"""Run a program that a model wrote, in a process of its own.

A fence, not a prison: the process has a clean environment, a folder that goes away,
limits of time, memory, files and size, and, where Linux lets it be cut off, no network
and no process that outlives it. It can read whatever the user can read.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SECONDS = 10  # of the processor, and of the clock
MEMORY = 1 << 30  # bytes
FILE_SIZE = 1 << 20  # bytes
CUT_OFF = ["unshare", "--user", "--net", "--pid", "--fork", "--kill-child"]

# A program passes if this ends by repeating a word it was given; one that exits early,
# with whatever status, does not.
BOOT = """
import os, resource, sys
word = sys.stdin.buffer.read()
result = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for limit, most in (("CPU", {seconds}), ("AS", {memory}), ("FSIZE", {size}),
                    ("NOFILE", 32), ("CORE", 0)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
    except (ValueError, OSError):  # macOS has no limit of memory
        pass
exec(compile(open("program.py").read(), "program.py", "exec"), {{"__name__": "__main__"}})
os.write(result, word)
"""


def passes(program: str) -> bool:
    """Whether a Python program runs to its end, without an exception.

    Args:
        program: its text; of the standard library alone.
    """
    boot = BOOT.format(seconds=SECONDS, memory=MEMORY, size=FILE_SIZE)
    prefix = CUT_OFF if can_cut_off() else []
    command = [*prefix, sys.executable, "-I", "-S", "-B", "-c", boot]
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8")
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(word.encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            # The process is not reaped yet, so its id cannot be another's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
    return process.returncode == 0 and out == word.encode()


@cache
def can_cut_off() -> bool:
    """Whether programs can be run without a network here."""
    try:
        done = subprocess.run([*CUT_OFF, "true"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0
