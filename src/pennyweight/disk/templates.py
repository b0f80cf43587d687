"""Chat templates, rendered where they can do no harm.

A template is a program that came with a model. transformers runs it in jinja2's sandbox, which keeps it from Python's
insides but bounds neither time nor memory: two nested loops run for hours, `"x" * 3000000000` takes 3 GB, and neither
can be interrupted from within the process. So a template runs in a process of its own, which the system ends when its
processor time is spent and refuses memory beyond a limit. The same process renders one conversation after the other;
it starts in a tenth of a second and imports jinja2 and nothing of ours.

What a template is given, and what it means, is transformers' (utils/chat_template_utils.py), function for function;
tests hold one against the other.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

SECONDS = 2.0
"""Processor time of one conversation."""
MEMORY_BYTES = 512 * 2**20
CHARACTERS = 4 * 2**20
"""Of what a template writes."""
_SHOWN = 400


class Templates:
    """Renders conversations in a process of its own, one at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """What the template writes. `variables` are JSON values. Raises ValueError in one line: the template's own
        words, what is wrong with it, or the limit that it went over."""
        asked = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(asked)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if not answer.endswith(b"\n"):
                self._process = None
                self._end()
                if process.returncode == -signal.SIGPROF:
                    raise ValueError(f"the chat template takes more than {SECONDS:g} s of processor time")
                raise ValueError(f"the chat template ended the process that renders it (code {process.returncode})")
        found = json.loads(answer)
        if "error" in found:
            raise ValueError(found["error"])
        return found["text"]

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: nothing that lies in the current folder is imported. A session of its own: Ctrl-C is not for it.
        command = [sys.executable, "-P", __file__]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._process, self._end = process, weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # what was not written yet has no reader
            pipe.close()


def _serve() -> None:
    """The other process: a line of JSON in, a line of JSON out."""
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whatever it is doing then, the process ends
        try:
            asked = json.loads(line)
            template = compiled.get(asked["template"])
            if template is None:
                template = compiled[asked["template"]] = _compiled(asked["template"])
            answer = {"text": _text(template, asked["variables"])}
        except Exception as err:  # whatever other people's programs raise
            answer = {"error": _said(err)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _text(template: Any, variables: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        if size > CHARACTERS:
            raise _TooLong(f"it writes more than {CHARACTERS} characters")
    return "".join(parts)


class _TooLong(Exception):
    pass


def _said(err: Exception) -> str:
    from jinja2.exceptions import TemplateError

    words = " ".join((str(err) or type(err).__name__).split())[:_SHOWN]
    if type(err) is TemplateError:  # raise_exception
        return f"the chat template refuses this conversation: {words}"
    if isinstance(err, MemoryError):
        return f"the chat template needs more than {MEMORY_BYTES // 2**20} MiB of memory"
    return f"the chat template fails: {words}"


def _compiled(template: str) -> Any:
    """As transformers compiles it."""
    from datetime import datetime

    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what an assistant wrote, for training; here it only is what stands in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> str:
            return caller()

    class PlainNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
            self, given = args[0], dict(*args[1:], **kwargs)
            for name in given:
                PlainNamespace._check(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}: names may not begin with an underscore")

    class PlainDict:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=PlainDict(),
        namespace=PlainNamespace,
    )
    return environment.from_string(template)


if __name__ == "__main__":
    _serve()
