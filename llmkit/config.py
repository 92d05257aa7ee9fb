"""Options declared once: a frozen dataclass feeds the flags, the TOML file, the manifest and the checks.

    @dataclass(frozen=True, kw_only=True)
    class PretrainConfig(CommonConfig):
        inputs: tuple[str, ...] = argument("Documents.", metavar="INPUT...")
        depth: int | None = option(None, "Transformer layers; sets the rest.", group="Model", at_least=1)

    config = resolve(PretrainConfig, {"depth": "4"}, config_file=None)

Values come from a flag, else the TOML file, else the default; `None` means off or automatic. This module knows
neither typer nor any stage.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from llmkit.errors import UserError

Unit = Literal["count", "bytes", "duration"]

_COUNT = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {
    "": 1,
    "b": 1,
    "k": 1e3,
    "kb": 1e3,
    "m": 1e6,
    "mb": 1e6,
    "g": 1e9,
    "gb": 1e9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_DURATION = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SCALES: dict[str, dict[str, float]] = {"count": _COUNT, "bytes": _BYTES, "duration": _DURATION}
_EXAMPLES = {"count": "20000, 20k or 1.5M", "bytes": "1000000, 100MB or 2GiB", "duration": "90s, 10m or 2h"}


@dataclass(frozen=True)
class Option:
    """What is known of one option beside its name, type and default."""

    help: str
    group: str = "Options"
    flag: str | None = None
    short: str | None = None
    metavar: str | None = None
    unit: Unit | None = None
    choices: tuple[str, ...] | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    positional: bool = False


def option(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field that is an option; `details` are those of `Option`."""
    return field(default=default, metadata={"option": Option(help=help, **details)})


def argument(help: str, *, metavar: str, default: Any = ()) -> Any:
    """A dataclass field that is given without a flag: one string, or a tuple of them."""
    return field(default=default, metadata={"option": Option(help=help, metavar=metavar, positional=True)})


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Options that are spelled the same in every subcommand that has them."""

    examples: ClassVar[str] = ""
    following: ClassVar[str] = ""

    out: str | None = option(None, "Where the result goes.", flag="--out", short="-o", metavar="PATH")
    seed: int = option(0, "Seed of everything random.", at_least=0)
    limit: int | None = option(None, "Read at most this many input records.", unit="count", at_least=1)
    force: bool = option(False, "Replace an existing output.")
    dry_run: bool = option(False, "Say what would be done, and stop.")
    quiet: bool = option(False, "No progress on stderr.")


def option_of(item: Field) -> Option:
    """The `Option` of a dataclass field."""
    return item.metadata["option"]


def option_fields(config_class: type) -> list[Field]:
    """The fields of a config class that are options, in the order of their declaration."""
    return [item for item in fields(config_class) if "option" in item.metadata]


def flag_of(item: Field) -> str:
    """The spelling of an option on the command line, such as `--batch-size`."""
    details = option_of(item)
    if details.positional:
        return details.metavar or item.name.upper()
    return details.flag or "--" + item.name.replace("_", "-")


def parse_quantity(text: str | int | float, unit: Unit) -> float:
    """Read a number with a unit: `parse_quantity("10m", "duration") == 600`.

    Raises ValueError with what was expected.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    found = re.fullmatch(
        r"\s*([0-9][0-9_]*\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([a-z]*)\s*", str(text).lower()
    )
    if not found or found[2] not in _SCALES[unit]:
        raise ValueError(f"expected a {unit} such as {_EXAMPLES[unit]}")
    return float(found[1].replace("_", "")) * _SCALES[unit][found[2]]


def value_type(annotation: Any) -> tuple[type, bool, bool]:
    """Split an annotation into (base type, may be None, is a tuple of many)."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        base, _, many = value_type(parts[0])
        return base, True, many
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], False, True
    return annotation, False, False


def _convert(value: Any, base: type, details: Option) -> Any:
    """One value, from a flag or from TOML, as `base`; raises ValueError with what was expected."""
    if details.unit is not None:
        quantity = parse_quantity(value, details.unit)
        if base is int and quantity != int(quantity):
            raise ValueError("expected a whole number")
        return base(quantity)
    if base is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("expected true or false")
    if base is int or base is float:
        if isinstance(value, bool):
            raise ValueError("expected a number")
        try:
            number = float(value)
            if base is float:
                return number
            if number != int(number):
                raise ValueError
            return int(value) if isinstance(value, (int, str)) else int(number)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("expected a whole number" if base is int else "expected a number") from None
    if not isinstance(value, (str, Path)):
        raise ValueError("expected text")
    return str(value)


def _check_range(value: Any, details: Option) -> None:
    if details.choices is not None and value not in details.choices:
        raise ValueError(f"expected one of {', '.join(details.choices)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value:
            raise ValueError("expected a number")
        if details.at_least is not None and value < details.at_least:
            raise ValueError(f"expected at least {details.at_least:g}")
        if details.at_most is not None and value > details.at_most:
            raise ValueError(f"expected at most {details.at_most:g}")
        if details.above is not None and value <= details.above:
            raise ValueError(f"expected more than {details.above:g}")


def _read_toml(path: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        with open(path, "rb") as handle:
            return tomllib.load(handle)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from error


def resolve(config_class: type, flags: Mapping[str, Any], config_file: str | None = None) -> Any:
    """Build a config from flags (field name to text or None), a TOML file and the defaults, in that order.

    Raises UserError that names the flag, or the file and key, with what was expected and found.
    """
    known = {item.name: item for item in option_fields(config_class)}
    from_file: dict[str, Any] = {}
    if config_file is not None:
        for key, value in _read_toml(config_file).items():
            name = key.replace("-", "_")
            if name not in known:
                raise UserError(f"{config_file}: unknown key '{key}'; known are {', '.join(sorted(known))}")
            from_file[name] = value
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, item in known.items():
        given, place = flags.get(name), flag_of(item)
        if given is None or given == [] or given == ():
            if name not in from_file:
                continue
            given, place = from_file[name], f"{config_file}: {name}"
        base, _, many = value_type(hints[name])
        details = option_of(item)
        parts = list(given) if many and isinstance(given, (list, tuple)) else [given]
        converted = []
        for part in parts:
            try:
                value = _convert(part, base, details)
                _check_range(value, details)
            except ValueError as error:
                raise UserError(f"{place}: {error}, found {part!r}") from None
            converted.append(value)
        values[name] = tuple(converted) if many else converted[0]
    for name, item in known.items():
        if name not in values and item.default is MISSING:
            raise UserError(f"{flag_of(item)} is required")
    return config_class(**values)


def as_options(config: Any) -> dict[str, Any]:
    """The resolved options as plain JSON values, for the manifest and `--dry-run`."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()
    }
