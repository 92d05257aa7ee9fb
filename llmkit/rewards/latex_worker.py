"""Compares LaTeX in a process of its own: "ready", then {"answer", "said"} a line in; true, false or null a line out.

Started by `LatexComparer`, which ends it when an expression takes too long. math-verify parses with the grammar of
latex2sympy; its other parser, which lets sympy evaluate Python, is not used.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress

SECONDS = 3  # for parsing and for comparing, each; math-verify stops itself by SIGALRM
MEMORY = 4 << 30  # bytes of address space


def same(answer: str, said: str) -> bool | None:
    """True if math-verify holds two expressions for equal; None where it cannot read the answer."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> list:
        return parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", "first_match", parsing_timeout=SECONDS)

    gold = parsed(answer)
    if not gold:
        return None
    found = parsed(said)
    return bool(found) and bool(verify(gold, found, timeout_seconds=SECONDS))


def main() -> None:
    """Answer until stdin ends."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    import math_verify  # noqa: F401  the first comparison would pay for it

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            right = same(**json.loads(line))
        except (Exception, RecursionError):
            right = False
        print(json.dumps(right), flush=True)


if __name__ == "__main__":
    main()
