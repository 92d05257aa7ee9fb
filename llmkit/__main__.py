"""`python -m llmkit` and the console script `llmkit`."""

import sys


def main() -> None:
    from llmkit.cli import run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
