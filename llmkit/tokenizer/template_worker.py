"""Render chat templates in a separate process with limits on time, memory and output.

A template is an untrusted program: jinja2's sandbox keeps it from files and other code, but not from endless loops or
gigabytes of strings. The process imports this module, so it must not import anything heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import lru_cache, partial
from typing import Any

from llmkit.io.pool import Worker, WorkerDied

CPU_SECONDS, MEMORY = 3.0, 1 << 30  # per rendering; bytes of address space of the process
MORE_TEXT, TIMES_TEXT = 1 << 20, 20  # output limit in characters: MORE_TEXT + TIMES_TEXT * input


class TemplateFault(Exception):
    """A template failed; `refused` for errors of Jinja, such as its own raise_exception, `ended` at a limit."""

    def __init__(self, reason: str, refused: bool = False, ended: bool = False) -> None:
        super().__init__(reason)
        self.refused, self.ended = refused, ended


@lru_cache(maxsize=16)
def renderer(template: str) -> Callable[[dict[str, Any] | None], str]:
    """Return a function that renders a template with variables; compile it once, which may raise TemplateFault.

    The function raises TemplateFault, too; with None it only compiles.
    """
    worker = Worker(partial(Template, template), CPU_SECONDS)

    def render(values: dict[str, Any] | None) -> str:
        try:
            kind, text = worker.call(values)
        except WorkerDied:
            reason = f"it exceeds {CPU_SECONDS:.0f} s or {MEMORY >> 20} MB"
            raise TemplateFault(reason, ended=True) from None
        if kind != "text":
            raise TemplateFault(text, refused=kind == "refused")
        return text

    render(None)
    return render


class Template:
    """Work for a pool: one template, compiled at the first call; yields ("text" | "refused" | "fault", text)."""

    def __init__(self, source: str) -> None:
        import resource  # not available on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        self._source, self._compiled = source, None

    def __call__(self, values: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
        from jinja2 import TemplateError

        try:
            self._compiled = self._compiled or _compiled(self._source)
            text = "" if values is None else self._compiled.render(**values)
            most = MORE_TEXT + TIMES_TEXT * len(repr(values))
            yield ("text", text) if len(text) <= most else ("fault", f"its output has length {len(text)}")
        except MemoryError:
            yield "fault", f"it needs more than {MEMORY >> 20} MB"
        except TemplateError as error:
            yield "refused", str(error)[:500].replace("\n", " ") or type(error).__name__
        except Exception as error:
            yield "fault", f"{type(error).__name__}: {error}"[:500].replace("\n", " ")


def _compiled(template: str) -> Any:
    """Compile a template like transformers; SOURCE_DATE_EPOCH, if set, replaces today's date."""
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
    environment.globals["strftime_now"] = now.strftime  # the same day during the run
    return environment.from_string(template)
