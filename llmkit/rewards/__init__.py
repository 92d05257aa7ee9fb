"""Rewards of completions: verifiers, reward models, commands and functions (docs/rewards.md).

`--reward SPEC[:WEIGHT]` names them; every SPEC is checked before anything heavy is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llmkit.errors import UserError
from llmkit.io.remote import is_remote
from llmkit.rewards.reward import LARGEST, Attempt, ModelReward, Reward, Weighted, judge
from llmkit.tools.user_code import check_spelling

__all__ = ["Attempt", "Reward", "Weighted", "judge", "parse_rewards"]

EXPECTED = (
    "verifier, verifier=NAME, rm:FOLDER, spread:FOLDER, cmd:COMMAND, py:FILE.py:FUNCTION, format:REGEX, length or "
    "length=answer"
)
WEIGHT = re.compile(
    r"(.*):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?(?:nan|inf|infinity))", re.IGNORECASE | re.DOTALL
)


def parse_rewards(
    specs: Sequence[str],
    *,
    flag: str = "--reward",
    sandbox: str = "auto",
    timeout: float = 10.0,
    batch_timeout: float = 600.0,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Weighted]:
    """Build the rewards of `--reward verifier --reward length:-0.1`; a number after the last colon is the weight.

    flag              option name for errors
    sandbox, timeout  of unit tests: "auto" or "none", and seconds for all tests of a completion
    batch_timeout     seconds for a command to score a batch
    device, dtype     of reward models
    Raises UserError, before anything is loaded, for an unknown SPEC, one given twice, and a weight that is zero, too
    large or not finite.
    """
    builders: dict[str, tuple[Callable[[], Reward], float]] = {}
    for text in specs:
        spec, weight = _weighted(text, flag)
        if spec.startswith(("rm:", "spread:")):
            spec = spec.rstrip("/")  # one name per folder
        if spec in builders:
            raise UserError(f"{flag}: expected each reward once, found {spec} twice")
        kind = re.split("[:=]", spec, maxsplit=1)[0]
        mark, rest = spec[len(kind) :][:1], spec[len(kind) + 1 :]
        build: Callable[[], Reward]
        if kind == "verifier" and mark != ":":
            from llmkit.rewards.verifiers import VerifierReward, check_name

            forced = check_name(rest, f"{flag} {text}") if mark else None
            build = partial(VerifierReward, forced, flag, sandbox=sandbox != "none", seconds=timeout)
        elif spec in ("length", "length=answer"):
            from llmkit.rewards.constraints import LengthReward

            build = partial(LengthReward, spec, flag)
        elif mark != ":" or not rest:
            raise UserError(f"{flag} {text or repr(text)}: expected {EXPECTED}")
        elif kind in ("rm", "spread"):
            if not is_remote(rest) and not Path(rest).is_dir():
                actual = "a file" if Path(rest).exists() else "nothing"
                raise UserError(f"{flag} {text}: expected a reward model's folder, found {actual}")
            build = partial(ModelReward, rest, device, dtype, kind == "spread", flag)
        elif kind == "cmd":
            from llmkit.rewards.user_rewards import CommandReward, split_command

            build = partial(CommandReward, rest, split_command(rest, flag), batch_timeout, flag)
        elif kind == "py":
            from llmkit.rewards.user_rewards import FunctionReward

            check_spelling(spec, f"{flag} {text}")
            build = partial(FunctionReward, spec, flag)
        elif kind == "format":
            from llmkit.rewards.constraints import FormatReward, compiled

            compiled(rest, f"{flag} {spec}")
            build = partial(FormatReward, rest, flag)
        else:
            raise UserError(f"{flag} {text}: expected {EXPECTED}")
        builders[spec] = build, weight
    return [Weighted(build(), weight) for build, weight in builders.values()]


def _weighted(text: str, flag: str) -> tuple[str, float]:
    match = WEIGHT.fullmatch(text)
    if not match or re.fullmatch(r"py:[^:]+:(nan|inf)", text):  # a function named nan or inf
        return text, 1.0
    weight = float(match[2])
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"{flag} {text}: expected a finite weight other than 0, found {match[2]}")
    if abs(weight) > LARGEST:
        raise UserError(f"{flag} {text}: expected a weight from {-LARGEST:g} to {LARGEST:g}, found {match[2]}")
    return match[1], weight
