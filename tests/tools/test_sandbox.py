"""Hostile programs in the Python sandbox: each is denied, reveals nothing, and leaves nothing behind."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import llmkit.tools
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
MARK = b"run by process %d" % os.getpid()  # marks the command lines of these tests' sandboxes
SECRET = "a-secret-that-must-not-be-read"


def ran(code, limits=LIMITS):
    return run_python(code, limits)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Check that no process of ours and no file of these programs is left."""

    places = (tempfile.gettempdir(), Path.home(), Path.cwd(), Path("/"))
    candidates = [Path(place, name) for place in places for name in ("a", "d", "x", "f0", "escaped")]
    before = set(filter(Path.exists, candidates))
    yield
    assert set(filter(Path.exists, candidates)) == before
    assert not left_after(60)


def left_after(seconds):
    """Return the sandboxes that still run after this time."""
    for _ in range(20 * seconds):  # counted, because the clock of a virtual machine may jump
        if not (left := jails()):
            break
        time.sleep(0.05)
    return left


def jails():
    """Return pids and command lines of these tests' sandboxes, including forked ones before exec."""
    ours = os.fsencode(Path(llmkit.tools.__file__).with_name("jail.py"))
    left = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        words = command.split(b"\0")
        if MARK in command or (ours in words and not is_beside(int(words[words.index(ours) + 2]))):
            left[int(folder.name)] = command
    return left


def is_beside(process):
    """Return whether a process is alive and not a descendant of this one."""
    try:
        while process not in (0, os.getpid()):
            process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return False
    return process == 0


def test_ordinary_programs_work():
    code = "import json, math, re, itertools, random, datetime, fractions, decimal, statistics, hashlib, zlib, uuid\n"
    assert ran(code + "print(json.dumps([math.floor(2.5), str(fractions.Fraction(1, 3))]))").output == '[2, "1/3"]\n'
    assert ran("x = 6\nx * 7").output == "42\n"
    assert ran("").output == ""
    assert ran("open('a', 'w').write('hello')\nprint(open('a').read())").output == "hello\n"
    assert ran("import threading as t\nx = t.Thread(target=print, args=(1,)); x.start(); x.join()").output == "1\n"
    assert ran("print('a\\u00e9\\U0001f600')").output == "a\u00e9\U0001f600\n"
    assert ran("import sys; print(1); print(2, file=sys.stderr); sys.exit(3)").ended == "error"


def test_an_error_is_reported_with_its_line():
    result = ran("def f():\n    return 1 / 0\nf()")
    assert result.ended == "error"
    assert result.output.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "line 2, in f" in result.output and "jail" not in result.output
    assert "SyntaxError" in ran("def f(:").output


def calling(function):
    """Return a program that calls a libc function and prints its `errno`, or BROKEN if it succeeds."""
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
DESCRIPTORS = """
import os
def is_open(i):
    try:
        return bool(os.fstat(i))
    except OSError:
        return False
print([i for i in range(3, 64) if is_open(i)])
"""
# name: (program, expected part of its output); a program prints BROKEN if its attack succeeded
DENIED = {
    "read passwd": ("print(open('/etc/passwd').read(), 'BROKEN')", "FileNotFoundError"),
    "what there is": ("import os\nprint({'etc', 'proc', 'dev', 'sys', 'tmp'} & {*os.listdir('/')})", "set()"),
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
    "many files": ("for i in range(10 ** 5): open(f'f{i}', 'w').close()\nprint('BROKEN')", "No space left on device"),
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
    "shared memory": (
        "from multiprocessing import shared_memory as m\nm.SharedMemory('x', True, 9)\nprint('BROKEN')",
        "Error",
    ),
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
        ("9 ** 9 ** 9", None),  # a single step of the interpreter, which does not check for signals
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
    wall_seconds = 3 if ended != "killed" else 30  # on a busy machine its CPU seconds take longer
    result = run_python(code, Limits(wall_seconds=wall_seconds, cpu_seconds=1, memory_bytes=256 << 20))
    assert result.ended == ended or (ended is None and result.ended != "done"), result
    assert len(result.output.encode()) <= LIMITS.output_bytes


def test_long_programs_and_invalid_utf8():
    assert run_python("#" * (1 << 19)).ended == "error"
    assert run_python("import sys\nsys.stdout.buffer.write(bytes(range(256)))").ended == "done"
    assert run_python("\ud800").ended == "error"


def test_without_a_sandbox_it_still_has_a_folder_and_a_clock():
    result = run_python("import os\nprint(os.listdir('.'), sorted(os.environ))\n6 * 7", sandbox=False)
    assert result.output == "[] ['LC_CTYPE']\n42\n"
    assert run_python("while True: pass", Limits(wall_seconds=0.5), sandbox=False).ended == "timeout"


RUN = f"# {MARK.decode()}\nimport sys\nfrom llmkit.tools.python import *\n"


@pytest.mark.parametrize("delay", [0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("sandbox", [True, False])
def test_a_program_dies_with_us(delay, sandbox):
    """kill -9 of llmkit at any moment during a call."""
    code = f"print('go', flush=True)\nrun_python('while True: pass', Limits(wall_seconds=60), sandbox={sandbox})"
    with subprocess.Popen([sys.executable, "-c", RUN + code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
    left = left_after(60)
    for pid in left:
        os.kill(pid, 9)
    assert not left


def test_a_program_has_its_own_time_limit(monkeypatch):
    """It ends even if ours does not stop it, for example while llmkit is suspended."""

    def waits(child, data, seconds, is_enough):
        child.stdin.write(data)
        child.stdin.close()
        child.wait(30)
        return b"", b"", "done"

    monkeypatch.setattr(python, "exchange", waits)
    assert run_python("while True: pass", Limits(wall_seconds=0.5, cpu_seconds=30)).ended == "killed"


def test_process_1_keeps_no_zombies():
    """The child of a killed program is reparented to the first process of a container, or to a subreaper."""
    code = """
import ctypes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
for code in ("import time; time.sleep(50)", "print('x' * 200000)", "print(1)"):
    run_python(code, Limits(wall_seconds=0.5))
print(open(f"/proc/self/task/{os.getpid()}/children").read().split())
"""
    ended = subprocess.run([sys.executable, "-c", RUN + code], capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended


def test_a_limit_that_was_lower_before_stays():
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
check_sandbox()
print(run_python("open('a', 'w').write('x' * (1 << 21))").ended, run_python("print(1)").output)
"""
    ended = subprocess.run([sys.executable, "-c", RUN + code], capture_output=True, text=True)
    assert ended.stdout == "error 1\n\n", ended


@pytest.fixture
def asked_anew():
    python._missing.cache_clear()
    yield
    python._missing.cache_clear()


@pytest.mark.parametrize("script", ["exit 0", 'echo "needs PYTHONHOME" >&2; exit 1', "kill -9 $$"])
def test_a_python_that_cannot_run_programs_is_not_a_sandbox(script, monkeypatch, tmp_path, asked_anew):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError, match=r"expected a program in it to print 'done', found '.*' \((done|error|killed)"):
        check_sandbox()


def test_a_missing_kernel_feature_is_named(monkeypatch, asked_anew):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="needs Linux, found darwin; --sandbox none"):
        check_sandbox()


@pytest.fixture
def other_jail(monkeypatch, tmp_path):
    """Run a jail with a modified source."""

    def put(old, new):
        text = Path(python.__file__).with_name("jail.py").read_text()
        assert old in text
        (tmp_path / "jail.py").write_text(text.replace(old, new))
        monkeypatch.setattr(python, "__file__", str(tmp_path / "python.py"))

    return put


def test_limits_that_are_denied_are_named(other_jail):
    other_jail("resource.setrlimit(kind, (value, hard))", "raise ValueError('not allowed')")
    with pytest.raises(UserError, match="resource limits: not allowed"):
        run_python("1")


def test_python_below_the_working_folder_is_found(other_jail):
    top = "/" + os.path.realpath(os.__file__).split("/")[1]
    other_jail('WORK = "/work"', f'WORK = "{top}"')
    program = "import json, os\nopen('a', 'w').write('x')\nprint(os.getcwd(), os.listdir())"
    assert run_python(program).output == f"{top}- ['a']\n"


@pytest.mark.parametrize("sandbox", [True, False])
def test_a_start_on_a_busy_machine_is_retried(sandbox, monkeypatch):
    started, refusals = subprocess.Popen, [1, 2]

    def popen(*given, **named):
        if refusals:
            refusals.pop()
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return started(*given, **named)

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert run_python("print(1)", sandbox=sandbox).output == "1\n" and not refusals
    refusals += range(9)
    monkeypatch.setattr(python, "PAUSES", (0.01,))
    with pytest.raises(UserError, match="no new process: Resource temporarily unavailable"):
        run_python("print(1)", sandbox=sandbox)


def test_the_sandbox_retries_when_namespaces_run_out(other_jail, tmp_path):
    flag = tmp_path / "tried"
    refuse = f'open("{flag}", "w").close() or checked("namespaces", ctypes.set_errno(errno.EAGAIN) or -1)'
    other_jail("root = enter_namespaces()", f'root = enter_namespaces() if os.path.exists("{flag}") else {refuse}')
    assert run_python("print(1)").output == "1\n" and flag.exists()


def test_out_of_memory_kills_programs_first():
    assert run_python("print(open('/proc/self/oom_score_adj').read())", sandbox=False).output == "1000\n\n"


def test_programs_share_the_memory_that_there_is(monkeypatch):
    monkeypatch.setattr(python, "_memory", lambda: 5 * LIMITS.memory_bytes // 2)
    code = "import time\nprint(time.time()); time.sleep(0.4); print(time.time())"
    spans = []
    threads = [threading.Thread(target=lambda: spans.append(ran(code).output.split())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = [(float(start), float(end)) for start, end in spans]
    assert max(sum(start <= at < end for start, end in times) for at, _ in times) <= 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_works_for_a_user_without_rights():
    """As user nobody, if the kernel allows unprivileged namespaces."""
    program = b"import os\nprint(os.getuid(), os.getppid())\nopen('a', 'w').write('x')\nos.fork()"
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    anybodys = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
    if not shutil.which(nobody[0]) or subprocess.run([*nobody, anybodys, "-c", ""], capture_output=True).returncode:
        pytest.skip("needs setpriv, and a Python that everybody may run")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        jail = shutil.copy(Path(python.__file__).with_name("jail.py"), name)
        numbers = ["3", str(os.getpid()), "10000", str(1 << 28), "2", str(1 << 20)]
        command = ["sh", "-c", 'exec "$@" 3>&2', "sh", *nobody, anybodys, "-I", "-S", "-B", jail, *numbers]
        ended = subprocess.run(command, input=program, capture_output=True, cwd="/")
    assert ended.stdout == b"0 0\n", ended
    assert b"PermissionError" in ended.stderr, ended
