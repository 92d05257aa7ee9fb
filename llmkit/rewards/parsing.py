"""`--reward SPEC[:WEIGHT]`: rewards by name; nothing heavy is loaded before every SPEC is known to be well spelt."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from llmkit.errors import UserError
from llmkit.rewards.reward import Reward, Weighted

EXPECTED = "verifier, verifier=NAME, rm:FOLDER, cmd:COMMAND, py:FILE.py:FUNCTION, format:REGEX or length"
WEIGHT = re.compile(
    r"(.*):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?(?:nan|inf|infinity))", re.IGNORECASE | re.DOTALL
)


def parse_rewards(
    specs: Sequence[str],
    *,
    sandbox: str = "auto",
    timeout: float = 10.0,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Weighted]:
    """The rewards of `--reward verifier --reward length:-0.1`; a number after the last colon is the weight.

    sandbox, timeout  of unit tests: "auto" or "none", and seconds for each completion; a command and a function
                      have `timeout` x 6 for a batch
    device, dtype     of reward models
    Raises UserError for a SPEC that there is not, one given twice, and a weight that is zero or not finite.
    """
    del sandbox, timeout, device, dtype
    openers: list[tuple[Callable[[], Reward], float]] = []
    names: set[str] = set()
    for text in specs:
        spec, weight = _weighted(text)
        if spec in names:
            raise UserError(f"--reward: expected each reward once, found {spec} twice")
        names.add(spec)
        openers.append((_opener(spec, text), weight))
    return [Weighted(build(), weight) for build, weight in openers]


def _weighted(text: str) -> tuple[str, float]:
    found = WEIGHT.fullmatch(text)
    if not found:
        return text, 1.0
    weight = float(found[2])
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"--reward {text}: expected a weight that is finite and not 0, found {found[2]}")
    return found[1], weight


def _opener(spec: str, text: str) -> Callable[[], Reward]:
    """A function that builds the reward; what is wrong with its spelling is told of at once."""
    kind = re.split("[:=]", spec, maxsplit=1)[0]
    rest = spec[len(kind) + 1 :]
    if kind == "verifier" and (spec == kind or spec.startswith("verifier=")):
        from llmkit.rewards.verifying import VerifierReward, check_name

        forced = check_name(rest, f"--reward {text}") if spec != kind else None
        return lambda: VerifierReward(forced)
    raise UserError(f"--reward {text or repr(text)}: expected {EXPECTED}")
