"""What the verbs share: the application, common options, and errors as one screen and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight import __version__, variants

_HELP = "pennyweight: given a model and a budget, which model fits best — and run it."
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_AXES = ",".join(variants.default())
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder, a GGUF file, or a name of a hub: owner/name, with @revision, or :Q4_K_M for one "
        "GGUF file of it; or a name that penny models lists."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pennyweight {__version__}")
        raise typer.Exit


@app.callback()
def _penny(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def errors(*, resumes: bool = False) -> Iterator[None]:
    """Turn what users can cause into one screen and an exit code; bugs keep their traceback. `resumes`: whether an
    interrupted command goes on where it stopped when it is called again."""
    from pennyweight.search import Infeasible

    try:
        yield
    except typer.Exit:  # a RuntimeError, and decided already
        raise
    except Infeasible as err:
        say(f"infeasible budget: {err}")
        raise typer.Exit(3) from err
    except KeyboardInterrupt as err:
        if not resumes:
            raise typer.Exit(130) from err
        say("interrupted; the same command goes on where it stopped")
        raise typer.Exit(75) from err
    except BrokenPipeError as err:  # whoever reads has seen enough
        raise typer.Exit(141) from err
    except OSError as err:
        if err.errno == errno.ENOSPC:
            goes_on = ", the same command goes on" if resumes else ""
            say(f"the disk is full ({err.filename or 'while writing'}); free some space{goes_on}")
            raise typer.Exit(75 if resumes else 2) from err
        say(str(err))
        raise typer.Exit(2) from err
    except (ValueError, RuntimeError) as err:
        say(str(err))
        raise typer.Exit({"VerificationFailed": 4, "Unfetched": 75}.get(type(err).__name__, 2)) from err


def say(message: str) -> None:
    print(f"penny: {message}", file=sys.stderr)


def located(typed: str, *, only_config: bool = False) -> Path:
    """The folder or GGUF file that somebody typed, fetched if it is a name."""
    from pennyweight.disk import hub

    return hub.find(typed, only_config=only_config, tell=say)


@contextlib.contextmanager
def own_stdout() -> Iterator[None]:
    """What libraries print past sys.stdout is dropped: HiGHS as built into scipy 1.17 has a leftover debug line. For
    commands that have their process to themselves: file descriptor 1 is everybody's."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no such descriptor: nothing can be printed
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


def quiet_libraries() -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=UserWarning, module=r"transformers|torch")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def table(values: dict[str, Any], prefix: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            table(value, f"{prefix}{name}.")
        else:
            print(f"{prefix + name:<32} {value:.6g}" if isinstance(value, float) else f"{prefix + name:<32} {value}")
