"""`python -m llmkit` and the console script `llmkit`."""

import os
import sys

# Make waiting OpenMP threads sleep soon: on busy cores, spinning threads delay those they wait for (5 times the CPU
# seconds). The GNU, LLVM and Intel runtimes read these when torch is loaded. 2,000 spins take less than .1 ms; with
# none, two threads on two idle cores take a third more time.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


def main() -> None:
    # Replace closed standard streams by /dev/null. Otherwise the next opened file gets descriptor 2, and with it the
    # messages of libraries; and print() without sys.stderr would write messages into the data on stdout.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)
    # A second signal, in a generator or an exit handler that cleans up, is no news
    sys.unraisablehook = lambda event: event.exc_type is KeyboardInterrupt or sys.__unraisablehook__(event)
    try:
        from llmkit.cli import run_command_line

        code = run_command_line(sys.argv[1:])
    except KeyboardInterrupt:  # while llmkit loads, or a second one while the first is handled
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
