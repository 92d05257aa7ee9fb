"""Rewards of completions: verifiers, reward models, commands and functions (docs/rewards.md).

`--reward SPEC[:WEIGHT]` names them; nothing heavy is loaded before every SPEC is known to be well spelt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from llmkit.errors import UserError
from llmkit.rewards.reward import LARGEST, Attempt, Reward, Weighted, total
from llmkit.tools.user_code import check_spelling

__all__ = ["Attempt", "Reward", "Weighted", "parse_rewards", "total"]

EXPECTED = "verifier, verifier=NAME, rm:FOLDER, spread:FOLDER, cmd:COMMAND, py:FILE.py:FUNCTION, format:REGEX or length"
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
    """The rewards of `--reward verifier --reward length:-0.1`; a number after the last colon is the weight.

    flag              that they come from, for errors
    sandbox, timeout  of unit tests: "auto" or "none", and seconds for those of one completion
    batch_timeout     seconds that a command has for a batch
    device, dtype     of reward models
    Raises UserError for a SPEC that there is not, one given twice, and a weight that is zero, too large or not
    finite: before anything is loaded.
    """
    builders: list[tuple[Callable[[], Reward], float]] = []
    names: set[str] = set()
    for text in specs:
        spec, weight = _weighted(text, flag)
        if spec.startswith(("rm:", "spread:")):
            spec = spec.rstrip("/")  # one judge has one name
        if spec in names:
            raise UserError(f"{flag}: expected each reward once, found {spec} twice")
        names.add(spec)
        kind = re.split("[:=]", spec, maxsplit=1)[0]
        rest, where = spec[len(kind) + 1 :], f"{flag} {text}"
        if kind == "verifier" and not spec.startswith("verifier:"):
            build = _verifier(rest if spec != kind else None, where, sandbox != "none", timeout)
        elif kind in ("rm", "spread") and rest and ":" in spec:
            build = _model(kind, rest, where, device, dtype)
        elif kind == "cmd" and rest and ":" in spec:
            build = _command(rest, batch_timeout)
        elif kind == "py" and rest and ":" in spec:
            build = _function(spec, where)
        elif kind == "format" and rest and ":" in spec:
            build = _format(rest)
        elif spec == "length":
            build = _length
        else:
            raise UserError(f"{flag} {text or repr(text)}: expected {EXPECTED}")
        builders.append((build, weight))
    return [Weighted(build(), weight) for build, weight in builders]


def _weighted(text: str, flag: str) -> tuple[str, float]:
    found = WEIGHT.fullmatch(text)
    if not found or re.fullmatch(r"py:[^:]+:(nan|inf)", text):  # a function of that name
        return text, 1.0
    weight = float(found[2])
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"{flag} {text}: expected a weight that is finite and not 0, found {found[2]}")
    if abs(weight) > LARGEST:
        raise UserError(f"{flag} {text}: expected a weight from {-LARGEST:g} to {LARGEST:g}, found {found[2]}")
    return found[1], weight


# ---- each checks its spelling, and gives what builds it


def _verifier(name: str | None, where: str, sandbox: bool, seconds: float) -> Callable[[], Reward]:
    from llmkit.rewards.verifiers import VerifierReward, check_name

    forced = None if name is None else check_name(name, where)
    return lambda: VerifierReward(forced, sandbox=sandbox, seconds=seconds)


def _model(kind: str, folder: str, where: str, device: str, dtype: str) -> Callable[[], Reward]:
    if not Path(folder).is_dir():
        found = "a file" if Path(folder).exists() else "nothing"
        raise UserError(f"{where}: expected a reward model's folder, found {found}")

    def build() -> Reward:
        from llmkit.rewards.reward_models import ModelReward, SpreadReward

        return (SpreadReward if kind == "spread" else ModelReward)(folder, device, dtype)

    return build


def _command(command: str, seconds: float) -> Callable[[], Reward]:
    from llmkit.rewards.user_rewards import CommandReward

    reward = CommandReward(command, seconds)
    return lambda: reward


def _function(spec: str, where: str) -> Callable[[], Reward]:
    check_spelling(spec, where)

    def build() -> Reward:
        from llmkit.rewards.user_rewards import FunctionReward

        return FunctionReward(spec)

    return build


def _format(pattern: str) -> Callable[[], Reward]:
    from llmkit.rewards.constraints import FormatReward

    reward = FormatReward(pattern)
    return lambda: reward


def _length() -> Reward:
    from llmkit.rewards.constraints import LengthReward

    return LengthReward()
