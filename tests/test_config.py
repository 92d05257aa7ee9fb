"""Options from flags, TOML and defaults to checked values, and back to TOML."""

from __future__ import annotations

import importlib
import json
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.cli import COMMANDS
from llmkit.config import (
    CommonConfig,
    argument,
    as_options,
    flag_of,
    option,
    option_fields,
    option_of,
    parse_quantity,
    resolve,
    value_type,
)
from llmkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    inputs: tuple[str, ...] = argument("Documents.", metavar="INPUT...")
    vocab_size: int = option(1000, "Size.", unit="count", at_least=256, at_most=10**7)
    budget: float | None = option(None, "Time.", unit="duration", above=0)
    memory: int = option(10**9, "Memory.", unit="bytes")
    rate: float = option(0.1, "Rate.", above=0, at_most=1)
    clip: float | None = option(1.0, "Clip.", above=0)
    layers: int | None = option(None, "Layers.", at_least=1)
    stop: tuple[str, ...] = option((), "Stop strings.")
    sizes: tuple[int, ...] = option((), "Sizes.", at_least=1)
    dtype: str = option("auto", "Precision.", choices=("auto", "float32"))
    name: str | None = option(None, "Name.", flag="--called", short="-c")
    tie: bool = option(True, "Tie.")


def fails(flags: dict[str, object], toml: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        resolve(Config, flags, str(toml) if toml else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text)
    return path


# ---- units


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("2k", "count", 2000),
        ("1.15M", "count", 1_150_000),  # 1.15 * 1e6 is 1149999.9999999998
        ("1_000", "count", 1000),
        ("3B", "count", 3 * 10**9),
        (1e22, "count", 10**22),
        ("9007199254740993", "count", 2**53 + 1),
        ("100MB", "bytes", 10**8),
        ("2GiB", "bytes", 2**31),
        ("64 kib", "bytes", 65536),
        ("90s", "duration", 90),
        ("1.5h", "duration", 5400),
        ("2d", "duration", 172800),
        ("0.25s", "duration", 0.25),
    ],
)
def test_a_quantity_is_exact(text: str | float, unit, value: float) -> None:
    assert parse_quantity(text, unit) == value
    assert isinstance(parse_quantity(text, unit), type(value))


@pytest.mark.parametrize(
    ("text", "unit"),
    [("10x", "count"), ("", "count"), ("k", "count"), ("-5", "count"), ("1h", "bytes"), ("10MB", "duration"),
     ("1 0", "count"), ("1e999", "count"), (float("nan"), "count"), (float("inf"), "count"), (True, "count"),
     ("0x10", "bytes"), ("1,000", "count")],
)  # fmt: skip
def test_an_invalid_quantity_is_refused_with_an_example(text: str | float, unit) -> None:
    with pytest.raises(ValueError, match=rf"expected a {'number of bytes' if unit == 'bytes' else unit} such as"):
        parse_quantity(text, unit)


# ---- sources of values


def test_none_can_be_said_where_it_has_a_meaning(tmp_path: Path) -> None:
    assert resolve(Config, {}).clip == 1.0
    assert resolve(Config, {"clip": "none"}).clip is None
    assert resolve(Config, {}, str(write(tmp_path, 'clip = "none"'))).clip is None
    assert resolve(Config, {"layers": "none"}, str(write(tmp_path, "layers = 3"))).layers is None
    assert "--rate: expected a number, found 'none'" in fails({"rate": "none"})


def test_flags_are_text_and_become_typed_values() -> None:
    flags = {"inputs": ["a", "-"], "rate": "5e-1", "sizes": ["1", "20"], "seed": "3", "budget": "2m", "name": "x"}
    config = resolve(Config, {**flags, "dtype": None})
    assert (config.inputs, config.rate, config.sizes) == (("a", "-"), 0.5, (1, 20))
    assert (config.seed, config.budget, config.name, config.dtype) == (3, 120.0, "x", "auto")
    assert isinstance(config.budget, float)
    with pytest.raises(FrozenInstanceError):
        config.seed = 4


def test_an_option_without_default_is_required() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needs(CommonConfig):
        size: int = field(metadata=option(0, "Size.").metadata)

    Needs.__annotations__["size"] = int
    with pytest.raises(UserError, match="--size is required; see --help"):
        resolve(Needs, {})


def _options_of_text() -> list[tuple[type, str]]:
    """Return the options of all commands that take text, such as names or paths."""
    found = []
    for module, config_name, _ in COMMANDS.values():
        config_class = getattr(importlib.import_module(module), config_name)
        hints = get_type_hints(config_class)
        for item in option_fields(config_class):
            if value_type(hints[item.name])[0] is str and (option_of(item).metavar or option_of(item).choices):
                found.append((config_class, item.name))
    return found


@pytest.mark.parametrize(("config_class", "name"), _options_of_text())
def test_an_empty_option_as_from_an_unset_variable_is_an_error(config_class: type, name: str) -> None:
    many = value_type(get_type_hints(config_class)[name])[2]
    (item,) = [item for item in option_fields(config_class) if item.name == name]
    is_list = many and "," in (option_of(item).metavar or "")
    for text in ("", ",", " , ") if is_list else ("",):
        with pytest.raises(UserError, match="expected") as caught:
            resolve(config_class, {name: [text] if many else text})
        assert str(caught.value).startswith(flag_of(item)) and "\n" not in str(caught.value)


def test_a_file_of_options_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfvocab_size = 300\r\nseed = 5\r\n")
    config = resolve(Config, {"inputs": ["a"]}, str(tmp_path / "c.toml"))
    assert (config.vocab_size, config.seed) == (300, 5)


def test_a_flag_that_the_class_does_not_have_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="no option dpeth"):
        resolve(Config, {"dpeth": "4"})


# ---- user errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vocab_size": "255"}, "--vocab-size: expected at least 256, found '255'"),
        ({"vocab_size": "1T"}, "--vocab-size: expected at most 10,000,000, found '1T'"),
        ({"vocab_size": "300.5"}, "--vocab-size: expected a whole number, found '300.5'"),
        ({"vocab_size": "big"}, "--vocab-size: expected a count such as 20000, 20k or 1.5M, found 'big'"),
        ({"rate": "0"}, "--rate: expected more than 0, found '0'"),
        ({"rate": "inf"}, "--rate: expected a number, found 'inf'"),
        ({"seed": ""}, "--seed: expected a whole number, found ''"),
        ({"seed": str(2**63)}, f"--seed: expected at most {2**63 - 1:,}, found '{2**63}'"),
        ({"sizes": "1e30"}, "--sizes: expected at most 9,223,372,036,854,775,807, found '1e30'"),
        ({"seed": "1e400"}, "--seed: expected a whole number, found '1e400'"),
        ({"dtype": "float16"}, "--dtype: expected one of auto, float32, found 'float16'"),
        ({"sizes": ["3", "0"]}, "--sizes: expected at least 1, found '0'"),
        ({"budget": "soon"}, "--budget: expected a duration such as 90s, 10m or 2h, found 'soon'"),
        ({"name": "\udcff"}, "--called: expected text in UTF-8, found '\\udcff'"),
        ({"inputs": ["a\udcff"]}, "INPUT...: expected a file whose name is in UTF-8, found 'a\\udcff'"),
        ({"inputs": ["a"], "out": ""}, "--out: expected a path, found ''"),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_expected(flags: dict[str, object], message: str) -> None:
    assert fails(flags) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("vocab_sise = 3", "unknown key 'vocab_sise'; did you mean 'vocab_size'?"),
        ("zzz = 3", "unknown key 'zzz'; known are budget"),
        ("[model]\nlayers = 3", "unknown key 'model'"),
        ("vocab-size = 300\nvocab_size = 300", "'vocab_size' is given twice"),
        ('seed = "x"', "seed: expected a whole number, found 'x'"),
        ("seed = [1]", "seed: expected a whole number, found [1]"),
        ("rate = inf", "rate: expected a number, found inf"),
        ("vocab_size = inf", "vocab_size: expected a count such as"),
        ('force = "yes"', "force: expected true or false, found 'yes'"),
        ("out = 5", "out: expected a string, found 5"),
        ("name = 2026-01-01", "name: expected a string, found datetime.date"),
        ("a = ", "not TOML"),
    ],
)
def test_a_wrong_line_in_the_file_is_named(tmp_path: Path, line: str, message: str) -> None:
    toml = write(tmp_path, line)
    error = fails({}, toml)
    assert error.startswith(f"{toml}: ") and message in error
    toml.write_bytes(b'out = "\xe9"')
    assert "not TOML" in fails({}, toml)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.lists(st.text()), st.dates()))
def test_no_value_makes_anything_but_a_config_or_a_one_line_error(value: object) -> None:
    for name in ("vocab_size", "rate", "seed", "layers", "stop", "sizes", "dtype", "name", "tie", "budget"):
        try:
            assert isinstance(resolve(Config, {name: value}), Config)
        except UserError as error:
            assert "expected" in str(error)


# ---- back to TOML


@given(
    st.builds(
        Config,
        seed=st.integers(0, 2**63 - 1),
        vocab_size=st.integers(256, 10**7),
        budget=st.none() | st.floats(1e-3, 1e9),
        rate=st.floats(0, 1, exclude_min=True),
        clip=st.none() | st.floats(1e-9, 1e9),
        layers=st.none() | st.integers(1, 10**6),
        stop=st.lists(st.text(st.characters(blacklist_categories=("Cs",)))).map(tuple),
        sizes=st.lists(st.integers(1, 2**63 - 1)).map(tuple),
        tie=st.booleans(),
        force=st.booleans(),
    )
)
def test_the_options_of_a_manifest_make_the_same_config_again(tmp_path_factory, config: Config) -> None:
    options = json.loads(json.dumps(as_options(config)))
    toml = tmp_path_factory.mktemp("toml") / "again.toml"
    # TOML strings have the escapes of JSON, except for \x7f
    lines = [
        f"{name} = {json.dumps('none' if value is None else value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for name, value in options.items()
    ]
    toml.write_text("\n".join(lines))
    assert resolve(Config, {}, str(toml)) == config


@pytest.mark.parametrize("stage", ["pretrain", "sft", "train-reward"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rate": "1e30"}, "--learning-rate: expected at most 10?, found"),
        ({"weight_decay": "1000"}, "--weight-decay: expected at most 10, found"),
        ({"epochs": "1", "max_steps": "3"}, "--epochs.*: expected one limit of the training length, found 2"),
    ],
)
def test_values_that_make_training_impossible_are_refused_before_any_work(
    stage: str, flags: dict[str, str], message: str
) -> None:
    module, config, _ = COMMANDS[stage]
    with pytest.raises(UserError, match=message):
        resolve(getattr(importlib.import_module(module), config), flags)
