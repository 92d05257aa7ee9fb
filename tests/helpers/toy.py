"""The smallest stage on the real command line: `python tests/helpers/toy.py toy in.jsonl -o out.jsonl`.

Run as a program, it registers itself as the only subcommand; test_cli.py uses it for exits that are hard to reach with
a real stage.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import ClassVar

from llmkit import cli
from llmkit.config import CommonConfig, argument, option
from llmkit.errors import GateError
from llmkit.io.files import atomic_folder, check_output
from llmkit.io.jsonl import open_output, read_jsonl


@dataclass(frozen=True, kw_only=True)
class ToyConfig(CommonConfig):
    """Options of the toy."""

    examples: ClassVar[str] = """
        Example:
          llmkit toy in.jsonl -o out.jsonl
          llmkit toy [more] -o out.jsonl
    """
    following: ClassVar[str] = "llmkit toy out.jsonl [again]"

    inputs: tuple[str, ...] = argument("Records [JSONL].", metavar="INPUT...")
    act: str = option(
        "copy", "What to do [how it ends].", choices=("copy", "folder", "gate", "bug", "eof", "memory", "wait", "fork")
    )
    size: int = option(1000, "A size.", group="Model", unit="count", at_least=10, at_most=10**6)
    rate: float | None = option(0.5, "A rate.", group="Model", above=0)
    stop: tuple[str, ...] = option((), "Stop strings.")
    tie: bool = option(True, "A switch that is on.")

    def reads_stdin(self) -> bool:
        """True if the input is stdin."""
        return not self.inputs or "-" in self.inputs


@dataclass(frozen=True)
class Summary:
    """The summary that the command line prints."""

    path: str
    records: int
    size: int
    rate: float | None
    stop: tuple[str, ...]
    tie: bool
    quiet: bool
    nothing: None = None


def run(config: ToyConfig) -> Summary | None:
    """Copy records, or end in the way of `act`."""
    out = config.out or "-"
    check_output(out, config.force)
    if config.dry_run:
        return None
    if config.act == "gate":
        raise GateError("accuracy 0.2 is under 0.5")
    if config.act == "bug":
        raise RuntimeError("oops")
    if config.act == "eof":
        raise EOFError("not an interrupt")
    if config.act == "memory":
        raise MemoryError
    if config.act == "fork":
        from multiprocessing import get_context

        with get_context("fork").Pool(2) as pool:  # closing it sends SIGTERM to the workers
            pool.map(time.sleep, [0.1, 0.1])
    count = 0
    if config.act == "folder":
        with atomic_folder(out, config.force) as folder:
            (folder / "manifest.json").write_text("{}")
    else:
        with open_output(out, config.force) as write:
            for row in read_jsonl(config.inputs or ["-"], config.limit):
                write(row.value)
                count += 1
            if config.act == "wait":
                print("ready", file=sys.stderr, flush=True)
                time.sleep(60)
    if out == "-":
        return None
    return Summary(out, count, config.size, config.rate, config.stop, config.tie, config.quiet)


if __name__ == "__main__":
    cli.COMMANDS = {"toy": ("toy", "ToyConfig", "Copy records.")}
    sys.exit(cli.run_command_line(sys.argv[1:]))
