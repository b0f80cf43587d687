"""The command line: verbs in, pages and exit codes out. The only place that prints.

Exit codes: 0 done, 2 wrong input, 3 infeasible budget, 4 verification failed, 75 interrupted and resumable, 130
interrupted and to be started anew, 141 nobody reads what is printed any more.
"""

import os  # noqa: I001  the verbs below are in the order of --help
import sys

from pennyweight.cli import prices, making, judging, exporting, running, models  # noqa: F401
from pennyweight.cli._common import app


def main() -> None:
    """Entry point of the `penny` command. Where a reader has seen enough (`penny plan ... | head`) it ends quietly."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # the interpreter flushes once more when it ends
        os.dup2(nowhere, sys.stderr.fileno())
        sys.exit(141)
