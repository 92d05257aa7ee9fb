"""`python -m llmkit` and the console script `llmkit`."""

import os
import sys


def main() -> None:
    _hold_standard_streams()
    from llmkit.cli import run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


def _hold_standard_streams() -> None:
    """Put nothing in the place of closed standard streams.

    Else the next file that is opened gets the number of stderr, and with it what libraries print; and print(), whose
    stderr is missing, writes messages among the data on stdout.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


if __name__ == "__main__":
    main()
