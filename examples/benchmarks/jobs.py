"""Run a bench's own command line again, in several processes at once."""

import os
import subprocess
import sys
from collections.abc import Sequence


def in_parallel(module: str, arguments: Sequence[str], jobs: int) -> None:
    """Run ``python -m module *arguments --job N`` for every ``N`` below ``jobs``.

    Exits with a line that says so if one fails.
    """
    again = [sys.executable, "-m", module, *arguments, "--job"]
    # More BLAS threads than cores would wait for each other, for half of the time.
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    alone = os.environ | {"OPENBLAS_NUM_THREADS": threads}
    processes = [subprocess.Popen([*again, str(job)], env=alone) for job in range(jobs)]
    if any([process.wait() for process in processes]):
        sys.exit("A job failed; run this again to go on.")
