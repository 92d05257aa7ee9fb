"""The command line without start-up: a process that has already imported torch forks for each command.

with WarmPrograms(folder) as programs:     # folder/llmkit, for PATH
    subprocess.run(["bash", "-c", "llmkit sample base/ | head -1"], env={**os.environ, "PATH": programs.path})

A start takes a tenth of a second instead of two or three, and `documented.made_small` reduces models and runs, so that
a test can run all commands of the documentation. Everything else is unchanged.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENT = """#!{python} -ISE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
server.sendall(asked)
for number in (0, 1, 2):
    os.close(number)
code = server.recv(1)
os._exit(code[0] if code else 70)
"""


class WarmPrograms:
    """A context with a folder for an `llmkit` that starts at once; `path` is PATH with the folder prepended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._address = folder, str(folder / "socket")
        self.path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def __enter__(self) -> WarmPrograms:
        client = self.folder / "llmkit"
        client.write_text(CLIENT.format(python=sys.executable, address=self._address))
        client.chmod(0o755)
        command = [sys.executable, __file__, self._address]
        # one thread, because thread pools do not survive a fork
        self._server = subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert self._server.stdout is not None and self._server.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.terminate()
        self._server.wait()


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 64


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.socket.close()
        answer(self.request)


def answer(caller: socket.socket) -> None:
    """Run the requested command in this process; never returns."""
    code = 70
    try:
        size, files, _, _ = socket.recv_fds(caller, 8, 3)
        for number, given in enumerate(files):
            os.dup2(given, number)
            os.close(given)
        asked = b""
        while len(asked) < int.from_bytes(size, "big"):
            asked += caller.recv(2**16)
        arguments, folder, environment = json.loads(asked)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["llmkit", *arguments]

        from documented import made_small

        from llmkit.cli import run_command_line

        code = run_command_line(made_small(arguments))
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        caller.sendall(bytes([code & 255]))
        os._exit(code)


def warm_up() -> None:
    """Import what commands import lazily, and benchmark this machine once instead of in every training."""
    import torch

    from llmkit.training import speed

    torch.set_num_threads(1)
    speed.peak_flops = cache(speed.peak_flops)
    for dtype in (torch.float32, torch.bfloat16):
        speed.peak_flops(torch.device("cpu"), dtype)
    for place in sorted((ROOT / "llmkit").rglob("[!_]*.py")):
        with suppress(ImportError):  # optional packages
            import_module(".".join(place.relative_to(ROOT).with_suffix("").parts))
    for name in ("fasttext", "gigatoken", "openai", "pycld2", "tokenizers"):
        with suppress(ImportError):
            import_module(name)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    warm_up()
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    with Server(sys.argv[1], Handler) as server:
        print("ready", flush=True)
        server.serve_forever()
