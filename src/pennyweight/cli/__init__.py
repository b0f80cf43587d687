"""The command line: verbs in, pages and exit codes out. The only place that prints.

Exit codes: 0 done, 2 wrong input, 3 infeasible budget, 4 verification failed, 75 interrupted and resumable.
"""

from pennyweight.cli import prices, making, judging, running  # noqa: F401, I001  in the order of --help
from pennyweight.cli._common import app


def main() -> None:
    """Entry point of the `penny` command."""
    app()
