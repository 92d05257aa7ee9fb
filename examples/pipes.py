"""Run the commands of pipes.md in the folder of a Tiny World, and compare their output with the page.

    python examples/pipes.py WORLD              # stops at the first command that fails or whose output differs
    python examples/pipes.py WORLD --write      # write the output into the page
    python examples/pipes.py WORLD --only rl

On the page a block `sh` has a command, and the next block, `text`, its output. The word after `text` says what must
match in another world on another machine: `same` every byte, `lines` the number of lines, `some` only that it is not
empty.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("pipes.md")
BLOCK = re.compile(r"```sh\n([^`]*)```\n\n```text (same|lines|some)\n((?:.*\n)*?)```\n")


@dataclass(frozen=True)
class Pipe:
    """A command of the page, its output there, and how closely a new output must match."""

    heading: str
    command: str
    printed: str
    alike: str

    def block(self, output: str) -> str:
        """Return the Markdown of the command with this output."""
        return f"```sh\n{self.command}```\n\n```text {self.alike}\n{output}```\n"

    def differs(self, output: str) -> str | None:
        """Return what is wrong with an output, or None."""
        if output == "\n":
            return "printed nothing"
        if self.alike == "same" and output != self.printed:
            return f"printed\n{output}instead of\n{self.printed}"
        found, expected = len(output.splitlines()), len(self.printed.splitlines())
        if self.alike == "lines" and found != expected:
            return f"printed {found} lines instead of {expected}:\n{output}"
        return None


def pipes_of(page: str) -> list[Pipe]:
    """Return the commands of a page, in order."""
    headings = [(match.start(), match[1]) for match in re.finditer(r"^## (.*)$", page, re.MULTILINE)]
    above = [(match, [text for start, text in headings if start < match.start()]) for match in BLOCK.finditer(page)]
    return [Pipe(names[-1] if names else "", match[1], match[3], match[2]) for match, names in above]


def run(command: str, folder: Path, programs: Path) -> str:
    """Run a command in bash and return its stdout. Raises SystemExit if it fails."""
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    bash = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(bash, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 141):  # 141: SIGPIPE, head closed the pipe
        raise SystemExit(f"{command}exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout if done.stdout.endswith("\n") else f"{done.stdout}\n"


def write_programs(folder: Path) -> Path:
    """Write a folder for PATH whose `llmkit` and `python` are those of this process."""
    folder.mkdir()
    for name, options in (("llmkit", "-m llmkit"), ("python", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
        program.chmod(0o755)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="output folder of examples/tinyworld/Makefile")
    parser.add_argument("--write", action="store_true", help="write the output into the page")
    parser.add_argument("--only", metavar="WORD", default="", help="only under headings with this word")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    with tempfile.TemporaryDirectory(prefix="llmkit-") as temporary:
        programs, folder = write_programs(Path(temporary) / "bin"), Path(temporary) / "world"
        folder.mkdir()
        for path in arguments.world.absolute().iterdir():  # links keep outputs out of the world
            (folder / path.name).symlink_to(path)
        chosen = [pipe for pipe in pipes_of(page) if arguments.only in pipe.heading]
        for pipe in chosen:
            output = run(pipe.command, folder, programs)
            if arguments.write:
                page = page.replace(pipe.block(pipe.printed), pipe.block(output))
            elif wrong := pipe.differs(output):
                raise SystemExit(f"{pipe.command}{wrong}")
    if arguments.write:
        PAGE.write_text(page)
    print(f"{len(chosen)} commands", file=sys.stderr)


if __name__ == "__main__":
    main()
