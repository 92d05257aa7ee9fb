"""Chat templates rendered in a process of their own, whose time, memory and output are bounded.

A template is a program of whoever made the folder: jinja2's sandbox keeps it from files and other code, but not from
loops without end or strings of gigabytes. The process holds one template, reads a request a line and answers a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from functools import lru_cache
from typing import Any

from llmkit.io.ranks import interrupts_held

CPU_SECONDS, MEMORY = 3.0, 1 << 30  # of one rendering; bytes of address space in all
MORE_TEXT, TIMES_TEXT = 1 << 20, 20  # characters of output: so many and so many for each character of input
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from llmkit.tokenizer.template_worker import serve; serve()"
)
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ", "LANG", "LC_ALL", "SOURCE_DATE_EPOCH", "HOME")


class TemplateFault(Exception):
    """Failure of a template; `refused` where the template itself says no, `ended` at a limit."""

    def __init__(self, reason: str, refused: bool = False, ended: bool = False) -> None:
        super().__init__(reason)
        self.refused, self.ended = refused, ended


@lru_cache(maxsize=16)
def renderer(template: str) -> Renderer:
    """The process for a template, started with the first text. Raises TemplateFault where it is no valid Jinja."""
    prepared = Renderer(template)
    prepared.ask(None)
    return prepared


class Renderer:
    """One template in a process, which is started again after it was ended, and in a fork of this process."""

    def __init__(self, template: str) -> None:
        self._template, self._process, self._owner = template, None, 0
        self._lock = threading.Lock()

    def ask(self, values: dict[str, Any] | None) -> str:
        """The text for the template's variables, or nothing for None. Raises TemplateFault."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            answer = self._exchange(values)
        if "text" in answer:
            return answer["text"]
        raise TemplateFault(answer["fault"], answer.get("refused", False), answer.get("ended", False))

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with interrupts_held():
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._process, self._owner)
        answer = self._exchange(self._template)
        if "fault" in answer:
            raise TemplateFault(answer["fault"])

    def _exchange(self, request: Any) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an answer may be on its way that belongs to no later request
            self._process = None
            _end(process, os.getpid())
            raise
        if line.endswith(b"\n"):
            return json.loads(line)
        self._process = None
        _end(process, os.getpid())
        return {"fault": f"it does not end within {CPU_SECONDS:.0f} s and {MEMORY >> 20} MB", "ended": True}


def _end(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not pipe.closed:
                with suppress(OSError):  # a request that nobody has read
                    pipe.close()


# ---- in the process


def serve() -> None:
    """Answer the requests of standard input: first the template, then the values of its variables."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes our input
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if template is None:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, also within one long operation
        answer = _answered(template, request, len(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        if template is None and not isinstance(answer, dict):
            template, answer = answer, {"text": ""}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answered(template: Any, request: Any, size: int) -> Any:
    """The compiled template, or the answer to a request."""
    from jinja2 import TemplateError

    try:
        if template is None:
            return _compiled(request)
        text = "" if request is None else template.render(**request)
        if len(text) > MORE_TEXT + TIMES_TEXT * size:
            return {"fault": f"it makes {len(text)} characters of {size}"}
        return {"text": text}
    except MemoryError:
        return {"fault": f"it needs more than {MEMORY >> 20} MB"}
    except TemplateError as error:
        return {"fault": str(error)[:500].replace("\n", " ") or type(error).__name__, "refused": True}
    except BaseException as error:
        return {"fault": f"{type(error).__name__}: {error}"[:500].replace("\n", " ")}


def _compiled(template: str) -> Any:
    """The template in the environment that transformers gives it; SOURCE_DATE_EPOCH is today where it is set."""
    from datetime import datetime, timezone

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch.isdecimal() else datetime.now()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now.strftime  # one day for a whole run
    return environment.from_string(template)
