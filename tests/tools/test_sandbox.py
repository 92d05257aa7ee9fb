"""Hostile programs in the Python sandbox: each is denied, tells nothing, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.tools import python
from llmkit.tools.python import Limits, check_sandbox, run_python

try:
    check_sandbox()
    MISSING = None
except UserError as error:
    MISSING = str(error)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

LIMITS = Limits(wall_seconds=8, cpu_seconds=1, memory_bytes=256 << 20, file_bytes=4 << 20)
CALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
SECRET = "a-secret-that-must-not-be-read"


def ran(code, limits=LIMITS):
    return run_python(code, limits)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """No process of ours, and none of the files that these programs make, where they would like to."""

    def found():
        places = (tempfile.gettempdir(), Path.home(), Path.cwd(), "/")
        return {
            (str(place), name) for place in places for name in {"a", "d", "x", "f0", "escaped"} & set(os.listdir(place))
        }

    before = found()
    yield
    assert found() <= before
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        assert b"jail.py" not in command, f"{folder}: {command!r} is still there"


def test_ordinary_programs_work():
    code = "import json, math, re, itertools, random, datetime, fractions, decimal, statistics, hashlib, zlib, uuid\n"
    assert ran(code + "print(json.dumps([math.floor(2.5), str(fractions.Fraction(1, 3))]))").output == '[2, "1/3"]\n'
    assert ran("x = 6\nx * 7").output == "42\n"
    assert ran("").output == ""
    assert ran("open('a', 'w').write('hello')\nprint(open('a').read())").output == "hello\n"
    assert ran("import threading as t\nx = t.Thread(target=print, args=(1,)); x.start(); x.join()").output == "1\n"
    assert ran("print('a\\u00e9\\U0001f600')").output == "a\u00e9\U0001f600\n"
    assert ran("import sys; print(1); print(2, file=sys.stderr); sys.exit(3)").ended == "error"


def test_a_mistake_is_told_with_its_line():
    result = ran("def f():\n    return 1 / 0\nf()")
    assert result.ended == "error"
    assert result.output.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "line 2, in f" in result.output and "jail" not in result.output
    assert "SyntaxError" in ran("def f(:").output


def calling(function):
    """A program that calls a function of libc and prints what `errno` it gives, or BROKEN."""
    load = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)"
    return f"{load}\nprint('BROKEN' if libc.{function} >= 0 else ctypes.get_errno())"


THREADS = """
import threading, time
for i in range(1000):
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
print('BROKEN')
"""
LARGE_FILE = """
with open('a', 'wb') as f:
    for i in range(100):
        f.write(bytes(10 ** 6))
        f.flush()
print('BROKEN')
"""
SHARED_MEMORY = """
from multiprocessing import shared_memory
shared_memory.SharedMemory('x', True, 9)
print('BROKEN')
"""
DESCRIPTORS = """
import os
def is_open(i):
    try:
        return bool(os.fstat(i))
    except OSError:
        return False
print([i for i in range(3, 64) if is_open(i)])
"""
# name: (program, what its output must hold); a program prints BROKEN where it got what it wanted
DENIED = {
    "read passwd": ("print(open('/etc/passwd').read(), 'BROKEN')", "FileNotFoundError"),
    "what there is": (
        "import os\nprint([f for f in ('etc', 'proc', 'dev', 'sys', 'tmp') if f in os.listdir('/')])",
        "[]",
    ),
    "write outside": ("open('/escaped', 'w')\nprint('BROKEN')", "Error"),
    "write to a library": ("import json\nopen(json.__file__, 'a')\nprint('BROKEN')", "Error"),
    "make a folder in the root": ("import os\nos.mkdir('/tmp')\nprint('BROKEN')", "PermissionError"),
    "climb out by dots": ("print(open('../../../../../../etc/passwd').read(), 'BROKEN')", "FileNotFoundError"),
    "socket": ("import socket\nsocket.socket()\nprint('BROKEN')", "PermissionError"),
    "unix socket": ("import socket\nsocket.socket(socket.AF_UNIX)\nprint('BROKEN')", "PermissionError"),
    "socket pair": ("import socket\nsocket.socketpair()\nprint('BROKEN')", "PermissionError"),
    "url": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')\nprint('BROKEN')", "Error"),
    "fork": ("import os\nos.fork()\nprint('BROKEN')", "PermissionError"),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "PermissionError"),
    "shell": ("import os\nprint(os.system('echo BROKEN'))", "32512"),
    "subprocess": ("import subprocess\nsubprocess.run(['/bin/echo', 'BROKEN'])", "Error"),
    "exec": ("import os, sys\nos.execv('/bin/sh', ['sh', '-c', 'echo BROKEN'])", "Error"),
    "multiprocessing": ("import multiprocessing as m\nm.Process(target=print, args=('BROKEN',)).start()", "Error"),
    "thread bomb": (THREADS, "can't start new thread"),
    "ten gigabytes": ("x = bytearray(10 ** 10)\nprint('BROKEN')", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True:\n    x.append('y' * 10 ** 6)", "MemoryError"),
    "large file": (LARGE_FILE, "OSError"),
    "many files": (
        "for i in range(10 ** 5):\n    open(f'f{i}', 'w').close()\nprint('BROKEN')",
        "No space left on device",
    ),
    "many open files": ("x = [open(f'f{i}', 'w') for i in range(1000)]\nprint('BROKEN')", "Too many open files"),
    "kill the parent": ("import os\nos.kill(os.getppid() or 1, 9)\nprint('BROKEN')", "PermissionError"),
    "kill everyone": ("import os\nos.kill(-1, 9)\nprint('BROKEN')", "PermissionError"),
    "signal a group": ("import os\nos.killpg(0, 9)\nprint('BROKEN')", "PermissionError"),
    "ptrace": (calling("ptrace(16, 1, 0, 0)"), "1"),
    "read a process's memory": (calling("process_vm_readv(1, 0, 0, 0, 0, 0)"), "1"),
    "symlink": ("import os\nos.symlink('/etc/passwd', 'x')\nprint(open('x').read(), 'BROKEN')", "PermissionError"),
    "hard link": ("import os, json\nos.link(json.__file__, 'x')\nprint('BROKEN')", "PermissionError"),
    "proc": ("print(open('/proc/1/environ').read(), 'BROKEN')", "FileNotFoundError"),
    "mount": (calling("mount(b'none', b'/work', b'tmpfs', 0, None)"), "1"),
    "mount proc": (calling("mount(b'proc', b'/work', b'proc', 0, None)"), "1"),
    "another namespace": (calling("unshare(0x10000000)"), "1"),
    "chroot": ("import os\nos.chroot('.')\nprint('BROKEN')", "PermissionError"),
    "become root": ("import os\nos.setuid(0)\nprint('BROKEN')", "PermissionError"),
    "chmod": ("import os\nopen('a', 'w').close()\nos.chmod('a', 0o4777)\nprint('BROKEN')", "PermissionError"),
    "device": ("import os\nos.mknod('d', 0o20666, os.makedev(1, 1))\nprint('BROKEN')", "PermissionError"),
    "raise a limit": ("import resource as r\nr.setrlimit(r.RLIMIT_CPU, (99, 99))\nprint('BROKEN')", "Error"),
    "a program in memory": ("import os\nos.memfd_create('x')\nprint('BROKEN')", "PermissionError"),
    "keys": (calling("syscall(250, 0, 0, 0, 0, 0)"), "1"),
    "io_uring": (calling("syscall(425, 8, 0)"), "1"),
    "bpf": (calling("syscall(321, 0, 0, 0)"), "1"),
    "type into the terminal": ("import fcntl\nfcntl.ioctl(1, 0x5412, b'x')\nprint('BROKEN')", "PermissionError"),
    "shared memory": (SHARED_MEMORY, "Error"),
    "inotify": (calling("inotify_init()"), "1"),
    "environment": ("import os\nprint('BROKEN' if 'SECRET' in os.environ else list(os.environ))", "['LC_CTYPE']"),
    "the caller's folder": ("import conftest\nprint('BROKEN')", "ModuleNotFoundError"),
    "the caller's packages": ("import torch\nprint('BROKEN')", "ModuleNotFoundError"),
    "descriptors": (DESCRIPTORS, "[]"),
    "host name": ("import os\nprint(os.uname().nodename)", "sandbox"),
    "undo the filter": (calling("prctl(22, 0, 0, 0, 0)"), "1"),
}


@pytest.mark.parametrize("name", DENIED)
def test_denied(name, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    code, expected = DENIED[name]
    result = ran(code)
    assert expected in result.output, result
    assert not any(line.startswith("BROKEN") or line.endswith(" BROKEN") for line in result.output.splitlines()), result
    assert SECRET not in result.output and "root:x" not in result.output


def test_a_file_of_the_user_is_not_there(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    result = ran(f"print(open({str(secret)!r}).read())")
    assert "FileNotFoundError" in result.output and SECRET not in result.output


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("while True:\n    pass", "timeout"),
        ("9 ** 9 ** 9", None),  # one step of the interpreter, which heeds no signal
        ("import time\ntime.sleep(99)", "timeout"),
        ("import os, time\nos.close(1); os.close(2)\ntime.sleep(99)", "timeout"),
        ("while True:\n    try:\n        while 1: pass\n    except BaseException:\n        pass", "timeout"),
        ("import signal\nsignal.signal(24, lambda *x: None)\nwhile True:\n    pass", "killed"),
        ("print('x' * 10 ** 8)", "output"),
        ("import sys\nwhile True:\n    sys.stderr.write('y' * 1000)", "output"),
        ("import os\nwhile True:\n    os.write(1, b'z' * 65536)", "output"),
        ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", None),
        ("import ctypes\nctypes.string_at(0)", "killed"),
        ("import os\nos.abort()", None),
    ],
)  # fmt: skip
def test_it_ends(code, ended):
    wall_seconds = 3 if ended != "killed" else 30  # a busy machine gives it its seconds of CPU late
    result = run_python(code, Limits(wall_seconds=wall_seconds, cpu_seconds=1, memory_bytes=256 << 20))
    assert result.ended == ended or (ended is None and result.ended != "done"), result
    assert len(result.output.encode()) <= LIMITS.output_bytes


def test_long_programs_and_bytes_that_are_no_text():
    assert run_python("#" * (1 << 19)).ended == "error"
    assert run_python("import sys\nsys.stdout.buffer.write(bytes(range(256)))").ended == "done"
    assert run_python("\ud800").ended == "error"


def test_without_a_sandbox_it_still_has_a_folder_and_a_clock():
    result = run_python("import os\nprint(os.listdir('.'), sorted(os.environ))\n6 * 7", sandbox=False)
    assert result.output == "[] ['LC_CTYPE']\n42\n"
    assert run_python("while True: pass", Limits(wall_seconds=0.5), sandbox=False).ended == "timeout"


def test_what_the_kernel_lacks_is_named(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    python._missing.cache_clear()
    with pytest.raises(UserError, match="needs Linux, found darwin; --sandbox none"):
        check_sandbox()
    python._missing.cache_clear()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_works_for_a_user_without_rights(tmp_path):
    """As nobody, where the kernel lets users have namespaces."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        jail = folder / "jail.py"
        jail.write_text(Path(python.__file__).with_name("jail.py").read_text())
        program = b"import os\nprint(os.getuid(), os.getppid())\nopen('a', 'w').write('x')\nos.fork()"
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        python_of_all = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
        limits = [str(1 << 28), "2", str(1 << 20)]
        if (
            not shutil.which(nobody[0])
            or subprocess.run([*nobody, python_of_all, "-c", ""], capture_output=True).returncode
        ):
            pytest.skip("needs setpriv, and a Python that everybody may run")
        command = [
            "sh",
            "-c",
            'exec "$@" 3>&2',
            "sh",
            *nobody,
            python_of_all,
            "-I",
            "-S",
            "-B",
            str(jail),
            "3",
            *limits,
        ]
        ended = subprocess.run(command, input=program, capture_output=True, cwd="/")
    assert ended.stdout == b"0 0\n", ended
    assert b"PermissionError" in ended.stderr, ended
