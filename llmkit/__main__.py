"""`python -m llmkit` and the console script `llmkit`."""

import os
import sys

# Threads that wait for others soon sleep: on cores that others use too, torch's spin through the time of those they
# wait for (5 times the CPU seconds). Read when torch is loaded, by GNU's, LLVM's and Intel's OpenMP. 2,000 turns are
# less than .1 ms; with none, two threads on two idle cores take a third more time.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


def main() -> None:
    # Put nothing in the place of closed standard streams. Else the next file that is opened gets the number of stderr,
    # and with it what libraries print; and print(), whose stderr is missing, writes messages among the data on stdout.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)
    from llmkit.cli import run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
