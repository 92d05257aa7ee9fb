"""Options, declared once as fields of a frozen dataclass, which defines the flags, TOML keys, manifest and checks.

    @dataclass(frozen=True, kw_only=True)
    class PretrainConfig(CommonConfig):
        depth: int | None = option(None, "Transformer layers; sets the rest.", group="Model", at_least=1)

A flag takes precedence over the TOML file, and the file over the default; `None` means off or automatic.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from decimal import Decimal
from difflib import get_close_matches
from importlib.util import find_spec
from inspect import get_annotations
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from llmkit.display import redacted
from llmkit.errors import UserError

Unit = Literal["count", "bytes", "duration"]

_SCALES: dict[str, dict[str, int]] = {
    "count": {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12},
    "bytes": {
        **{letter + end: 1000**power for power, letter in enumerate(("", "k", "m", "g", "t")) for end in ("", "b")},
        **{letter + "ib": 1024**power for power, letter in enumerate(("k", "m", "g", "t"), 1)},
    },
    "duration": {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400},
}
LARGEST_INTEGER = 2**63 - 1  # signed 64-bit; torch's seeds and orjson's integers end at 2**64 - 1
_EXAMPLES = {"count": "20000, 20k or 1.5M", "bytes": "1000000, 100MB or 2GiB", "duration": "90s, 10m or 2h"}
PATHS = ("PATH", "FILE", "FOLDER")
_NAMES = {"count": "count", "bytes": "number of bytes", "duration": "duration"}

# Options removed in this version, by field name: the configs that had them, and advice
DROPPED = {
    "gpu_kind gpu_price": ("PretrainConfig", "--dry-run prints FLOPs and memory; docs/scale.md shows the estimate"),
    "gpus nodes": ("PretrainConfig", "start several processes with torchrun (docs/scale.md)"),
    "tensor_parallel": ("TrainingConfig", "FSDP2 shards a model over the processes of torchrun (docs/scale.md)"),
    "scores write_scores": ("CrawlFilterConfig", "try recipes on the documents of `crawl-filter --only url,extract`"),
    "judge_check": ("ProbeKnowledgeConfig", "compare the judgements of --report with your own labels"),
    "calibration": ("ProbeKnowledgeConfig", "--report has the log-probability of each answer and its judgement"),
    "retries": ("ServedConfig", "fixed at 6, after 0.5 to 8 seconds or as long as the server asks for"),
    "as_assistant": ("SampleConfig", "--shots assistant"),
    "unordered": ("SampleConfig", "records keep the order of the input; --resume continues an interrupted run"),
    "consistent": ("ProbeKnowledgeConfig", "two thirds of the answers must agree"),
    "prefix_tokens": ("ProbeKnowledgeConfig", "fixed at 32"),
    "reply_tokens": ("ProbeKnowledgeConfig", "fixed at 2,048"),
    "match_f1": ("ProbeKnowledgeConfig", "fixed at 0.7; use --judge MODEL to judge by a model"),
    "top_p": ("ProbeKnowledgeConfig", "answers are sampled by --temperature only"),
    "center": ("TrainRewardConfig", "the weight is fixed at 0.01"),
    "baseline": ("TrainRewardConfig", "evaluation.json always has the length baseline"),
    "probe_biases": ("TrainRewardConfig", "evaluation.json always has the biases"),
    "print_recipe": ("CrawlFilterConfig", "--dry-run prints the recipe to stdout"),
    "precision recall": ("CrawlFilterConfig", "set [extract] favour in a recipe: --recipe FILE.toml"),
    "pii": ("CrawlFilterConfig", "set [pii] mode in a recipe, or skip the step: --skip pii"),
    "min_language_score": ("CrawlFilterConfig", "set [language] min_score in a recipe: --recipe FILE.toml"),
    "clip_low clip_high": ("RlConfig", "--algo decides (docs/rl.md has the bounds of each)"),
    "overlong": ("RlConfig", "--algo decides: dapo reduces the reward of attempts near --max-tokens"),
    "refill": ("RlConfig", "a step samples at most twice its groups; --group and --batch-size set their number"),
    "max_difference": ("RlConfig", "fixed at 0.001 in float32, 0.05 in bfloat16 and with a server"),
    "concurrency": ("RlConfig", "fixed at 64 concurrent requests"),
    "slots": ("RlConfig", "fixed at 256 sequences at a time for a small model on a CPU, else 64"),
    "embedding_learning_rate": ("PretrainConfig", "it follows from the plan; --learning-rate can be set"),
    "head_learning_rate": ("PretrainConfig", "fixed at a quarter of --learning-rate"),
    "intermediate_size": ("PretrainConfig", "fixed at 8/3 of the width"),
    "token_cache": ("PretrainConfig", "token shards are stored next to --out; a folder of them is also an INPUT"),
    "workers": ("TrainingConfig", "one thread prepares the batches"),
    "process_timeout": ("TrainingConfig", "set LLMKIT_PROCESS_TIMEOUT, in seconds"),
    "max_grad_norm": ("TrainingConfig", "fixed at 1"),
    "lora_alpha": ("TuningConfig", "fixed at twice the rank; --learning-rate sets the size of the steps"),
    "identity_weight": ("SftConfig", 'append it to --identity "name=...;maker=...:WEIGHT"'),
    "inspect": ("SftConfig", "--dry-run shows examples token by token"),
    "lora_targets": ("TuningConfig", "every projection gets an adapter"),
    "decay_fraction": ("PretrainConfig TuningConfig", "the rate decays over the last 0.6 of pretrain, 0.9 of others"),
    "max_reward": ("RlConfig", "--max-steps, --time-budget and --max-kl end a run"),
    "epochs": ("RlConfig", "--max-steps or --time-budget; without them a run is one pass over the problems"),
    "max_tool_calls": ("RlConfig", "fixed at 8 calls per attempt"),
    "micro_batch_size": ("RlConfig", "fixed at 8,192 tokens, fewer if memory runs out"),
    "sample_every": ("RlConfig", "rollouts.jsonl has every attempt"),
    "warmup_steps": ("RlConfig", "fixed at a twentieth of the run, at least 10 steps, in short runs a quarter"),
    "weight_decay": ("RlConfig", "rl uses no weight decay"),
    "seed": ("CrawlFilterConfig TrainBpeConfig ExportConfig ReportConfig", "the command uses no random numbers"),
    "tensorboard wandb": ("TrainingConfig", "--log-to tensorboard or wandb"),
}


@dataclass(frozen=True)
class Option:
    """Details of one option, other than its name, type and default."""

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
    reads: bool = False  # names input files or folders, with or without a kind or weight; no output may replace them
    free: bool = False  # may change when a run is resumed, because it does not affect the result


def option(default: Any, help: str, **details: Any) -> Any:
    """Declare an option as a dataclass field; `details` are those of `Option`."""
    return field(default=default, metadata={"option": Option(help=help, **details)})


def argument(help: str, *, metavar: str, default: Any = ()) -> Any:
    """Declare a positional argument as a dataclass field: a string or a tuple of strings."""
    return field(default=default, metadata={"option": Option(help=help, metavar=metavar, positional=True, reads=True)})


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Options of every command."""

    examples: ClassVar[str] = ""
    following: ClassVar[str] = ""

    out: str | None = option(None, "Output file or folder.", short="-o", group="Common", metavar="PATH", free=True)
    seed: int = option(0, "Random seed.", group="Common", at_least=0, at_most=LARGEST_INTEGER)
    limit: int | None = option(None, "Maximum records to read [all].", group="Common", unit="count", at_least=1)
    force: bool = option(False, "Replace an existing output.", group="Common", free=True)
    dry_run: bool = option(False, "Show the plan of the run and exit.", group="Common", free=True)
    quiet: bool = option(False, "No progress on stderr.", group="Common", free=True)
    cache: str | None = option(
        None, "Cache folder for files read from URLs.", group="Common", metavar="FOLDER", free=True
    )


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Options of every stage that reads the user's data."""

    columns: tuple[str, ...] = option(
        (),
        "Input columns to read as fields, such as text=content; 'text=content|text' takes the first found; repeatable.",
        group="Common",
        metavar="FIELD=COLUMN,...",
    )

    def __post_init__(self) -> None:
        parse_columns(self.columns)


@dataclass(frozen=True, kw_only=True)
class RecordsConfig(ColumnsConfig):
    """Options of every stage that reads the user's records."""

    max_bad: str = option(
        "1%", "Bad records allowed per file, as a share or a count.", group="Common", metavar="SHARE|COUNT", free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_max_bad(self.max_bad)


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Options of stages that run models of any origin."""

    backend: str = option(
        "auto",
        "Model implementation; auto: transformers for architectures that llmkit does not implement.",
        choices=("auto", "llmkit", "transformers"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RecordsConfig, CommonConfig):
    """Options of every stage that trains."""

    device: str = option("auto", "Compute device.", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option(
        "auto", "Working precision; master weights are float32.", choices=("auto", "float32", "bfloat16")
    )
    resume: bool = option(False, "Resume from the last checkpoint of --out.", free=True)
    activation_checkpointing: bool = option(False, "Less memory for a third more time.", group="Training")
    compile: str = option("auto", "torch.compile; auto: on GPUs.", group="Training", choices=("auto", "on", "off"))

    eval_every: int | None = option(None, "Steps between validations [at the end].", group="Log", at_least=1, free=True)
    save_every: int | None = option(None, "Steps between checkpoints [10 minutes].", group="Log", at_least=1, free=True)
    sample_every: int | None = option(None, "Steps between samples [never].", group="Log", at_least=1, free=True)
    log_to: tuple[str, ...] = option(
        (), "Tracker to send the metrics to; repeatable.", group="Log", choices=("tensorboard", "wandb"), free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = [item for item in option_fields(type(self)) if option_of(item).group == "Horizon"]
        given = [flag_of(item) for item in lengths if getattr(self, item.name) is not None and item.name != "patience"]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: expected one limit of the training length, found {len(given)}")
        if self.sample_every is None and getattr(self, "prompt", None) != getattr(type(self), "prompt", None):
            raise UserError("--prompt: needs --sample-every, the steps between samples")
        for name in self.log_to:
            if find_spec(name) is None:
                raise UserError(f"--log-to {name}: needs the package {name}; pip install 'llmkit[{name}]'")


MOST_RATE, MOST_DECAY = 1, 10  # AdamW's limits: at rate 1 a step changes each weight by about 1
DECAY_FRACTION = 0.9  # tuning: the learning rate decays over this last fraction of the run
MICRO_BATCH_TOKENS = 8192  # tuning: default without --micro-batch-size


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Options of every stage that trains a generative model."""

    evaluate: tuple[str, ...] = option(
        (), "Tasks scored at each validation.", group="Log", metavar="TASK,...", reads=True, free=True
    )


@dataclass(frozen=True, kw_only=True)
class TuningConfig(TrainingConfig, BackendConfig):
    """Options of every stage that tunes a model on records."""

    lora_rank: int | None = option(None, "Rank of LoRA adapters, merged at the end.", group="LoRA", at_least=1)
    quantize: str | None = option(
        None, "Quantization of the frozen weights under LoRA.", group="LoRA", choices=("nf4", "int8")
    )

    max_steps: int | None = option(None, "Optimizer steps.", group="Horizon", unit="count", at_least=1)
    micro_batch_size: int | None = option(None, "Rows per forward pass [by length].", group="Training", at_least=1)
    learning_rate: float | None = option(
        None, "AdamW learning rate [by the width].", group="Training", above=0, at_most=MOST_RATE
    )
    weight_decay: float = option(0.0, "Weight decay of the matrices.", group="Training", at_least=0, at_most=MOST_DECAY)
    warmup_steps: int | None = option(
        None, "Learning-rate warm-up steps [5% of the run].", group="Training", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize is not None and self.lora_rank is None:
            raise UserError(f"--quantize {self.quantize}: needs --lora-rank; only frozen weights can be quantized")
        if self.quantize is not None and self.compile == "on":
            raise UserError(f"--quantize {self.quantize}: cannot be combined with --compile on")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Options of stages that generate with a local model."""

    device: str = option("auto", "Compute device.", choices=("auto", "cpu", "cuda", "mps"), free=True)
    dtype: str = option(
        "auto",
        "Precision; auto: bfloat16 on GPUs, else float32; int8: on CPUs.",
        choices=("auto", "float32", "bfloat16", "int8"),
        free=True,
    )
    batch_size: int = option(16, "Sequences decoded in parallel.", at_least=1, at_most=4096, free=True)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Options of a stage that learns from preferences without a reward model."""

    beta: float | None = option(
        None, "Beta of the preference loss [0.1; 2 with simpo].", group="Preferences", above=0, at_most=1000
    )
    label_smoothing: float | None = option(
        None, "Assumed probability that a preference label is wrong [0].", group="Preferences", at_least=0, at_most=0.5
    )
    sft_weight: float | None = option(
        None,
        "Weight of the cross-entropy of the best answers [0; 1 with orpo].",
        group="Preferences",
        at_least=0,
        at_most=1000,
    )
    margin: float | None = option(
        None, "Target reward margin, gamma of simpo [half of beta].", group="Preferences", at_least=0, at_most=1000
    )


@dataclass(frozen=True, kw_only=True)
class GoldConfig:
    """Options of every stage whose policy may hack its reward."""

    gold: str | None = option(None, "Reward to monitor but never train on.", group="Watch", metavar="KIND", reads=True)
    stop_on_hack: bool = option(False, "Stop once the reward rises while --gold falls.", group="Watch", free=True)


@dataclass(frozen=True, kw_only=True)
class ToolConfig:
    """Options of every stage in which a model may call tools."""

    tools: tuple[str, ...] = option(
        (),
        "Tools the model may call: calc, python, search:DOCS.jsonl|URL|py:FILE.py:FUNCTION, py:FILE.py:FUNCTION.",
        group="Tools",
        metavar="TOOL,...",
        reads=True,
    )
    max_tool_calls: int = option(8, "Maximum tool calls per completion.", group="Tools", at_least=0)
    tool_timeout: float = option(10.0, "Timeout of a tool call, in seconds.", group="Tools", above=0, at_most=86400)
    sandbox: str = option("auto", "Sandbox of python; none: no isolation.", group="Tools", choices=("auto", "none"))
    thinking: str = option(
        "auto", "Thinking before answers, if the template has a switch.", group="Tools", choices=("on", "off", "auto")
    )


@dataclass(frozen=True, kw_only=True)
class ServedConfig:
    """Options of every stage that may generate through a server."""

    engine: str = option(
        "local",
        "Text generation in this process (local) or on an OpenAI-compatible server.",
        group="Servers",
        metavar="local|openai:URL#NAME",
        free=True,
    )
    concurrency: int = option(8, "Concurrent server requests.", group="Servers", at_least=1, at_most=999, free=True)
    timeout: float = option(120, "Timeout of a server request.", group="Servers", unit="duration", above=0, free=True)

    @property
    def is_served(self) -> bool:
        """True if a server generates."""
        return self.engine != "local"


def option_of(item: Field) -> Option:
    """Return the `Option` of a dataclass field."""
    return item.metadata["option"]


def option_fields(config_class: type) -> list[Field]:
    """Return the option fields of a config class: its own as declared, then those of its bases in MRO order."""
    depth = {name: index for index, cls in enumerate(config_class.__mro__) for name in get_annotations(cls)}
    options = [item for item in fields(config_class) if "option" in item.metadata]
    return sorted(options, key=lambda item: depth[item.name])


def flag_of(item: Field) -> str:
    """Return the spelling of an option on the command line, such as `--batch-size`."""
    details = option_of(item)
    if details.positional:
        return details.metavar or item.name.upper()
    return details.flag or "--" + item.name.replace("_", "-")


def parse_quantity(text: str | int | float, unit: Unit) -> int | float:
    """Parse a number with a unit exactly; integral results are int.

    >>> parse_quantity("10m", "duration"), parse_quantity("1.15M", "count"), parse_quantity("2GiB", "bytes")
    (600, 1150000, 2147483648)

    Raise ValueError with what was expected.
    """
    pattern = r"([0-9][0-9_]*(?:\.[0-9]*)?(?:e[+-]?[0-9]{1,2})?|\.[0-9]+)\s*([a-z]*)"
    match = re.fullmatch(pattern, str(text).lower().strip())
    if not match or match[2] not in _SCALES[unit]:
        raise ValueError(f"expected a {_NAMES[unit]} such as {_EXAMPLES[unit]}")
    exact = Decimal(match[1].replace("_", "")) * _SCALES[unit][match[2]]
    return int(exact) if exact == exact.to_integral_value() else float(exact)


def parse_max_bad(text: str) -> tuple[float | None, int]:
    """Parse `--max-bad` to (share or None, count); with a share the count is 1.

    >>> parse_max_bad("1%"), parse_max_bad("10"), parse_max_bad("0%")
    ((0.01, 1), (None, 10), (None, 0))

    Raise UserError for other values.
    """
    try:
        if not text.endswith("%"):
            return None, int(convert(text, int, Option("", unit="count")))
        share = convert(text[:-1], float, Option("")) / 100
        if 0 <= share <= 1:
            return (share, 1) if share else (None, 0)
    except ValueError:
        pass
    raise UserError(f"--max-bad: expected a share such as 1% or a count such as 10, found {text!r}")


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """Parse `--columns` to field name: column.

    >>> parse_columns(["text=content,id=doc", "messages=chat.turns"])
    {'text': 'content', 'id': 'doc', 'messages': 'chat.turns'}

    Raise UserError for malformed pairs and repeated fields.
    """
    columns: dict[str, str] = {}
    for pair in (pair.strip() for text in texts for pair in text.split(",")):
        field_name, _, column = (word.strip() for word in pair.partition("="))
        if not field_name or not column:
            raise UserError(f"--columns: expected FIELD=COLUMN, such as text=content, found {pair!r}")
        if field_name in columns:
            raise UserError(f"--columns: expected one column for {field_name!r}, found two")
        columns[field_name] = column
    return columns


def value_type(annotation: Any) -> tuple[type, bool, bool]:
    """Split an annotation into (base type, may be None, is a tuple)."""
    if get_origin(annotation) in (Union, types.UnionType):
        base, _, many = value_type(next(kind for kind in get_args(annotation) if kind is not type(None)))
        return base, True, many
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], False, True
    return annotation, False, False


def convert(value: Any, base: type, details: Option) -> Any:
    """Convert one value, of a flag or from TOML, to the type `base`. Raise ValueError with what was expected."""
    if base is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("expected true or false")
    if base is str:
        shape = details.metavar or ""  # options that may be empty, such as prompts and titles, have no metavar
        if "," in shape and isinstance(value, str) and not value.strip(", "):
            raise ValueError("expected at least one name")  # an unset shell variable
        if value == "" and (details.reads or shape):
            raise ValueError("expected a path" if details.reads or shape in PATHS else "expected text")
        if details.metavar == "SHARE|COUNT" and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value) if isinstance(value, int) else f"{value:%}"
        if not isinstance(value, (str, Path)):
            raise ValueError("expected a string")
        with suppress(UnicodeEncodeError):  # Python decodes invalid UTF-8 to surrogates, which JSON cannot contain
            str(value).encode()
            return str(value)
        is_name = details.reads or shape in PATHS
        raise ValueError("expected a file whose name is in UTF-8" if is_name else "expected text in UTF-8")
    expected = "expected a whole number" if base is int else "expected a number"
    number = parse_quantity(value, details.unit) if details.unit else value
    if isinstance(number, bool) or not isinstance(number, (int, float, str)):
        raise ValueError(expected)
    if base is int and not isinstance(number, float):
        with suppress(ValueError):
            return int(number)  # exact for any size
    try:
        number = float(number)
    except (ValueError, OverflowError):
        raise ValueError(expected) from None
    if not math.isfinite(number) or (base is int and not number.is_integer()):
        raise ValueError(expected)
    return base(number)


def bounded(value: Any, details: Option) -> Any:
    """Return the value if it is within the option's choices and bounds. Raise ValueError with what was expected."""
    if details.choices is not None and value not in details.choices:
        raise ValueError(f"expected one of {', '.join(details.choices)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if details.at_least is not None and value < details.at_least:
        raise ValueError(f"expected at least {details.at_least}")
    most = LARGEST_INTEGER if details.at_most is None and isinstance(value, int) else details.at_most
    if most is not None and value > most:
        raise ValueError(f"expected at most {most:,}")
    if details.above is not None and value <= details.above:
        raise ValueError(f"expected more than {details.above}")
    return value


def resolve(config_class: type, flags: Mapping[str, Any], config_file: str | None = None) -> Any:
    """Build a config from flags (field name to text or None), a TOML file and the defaults, in that order.

    A flag that is None or empty was not given. `"none"`, in a flag or in the file, stands for None if the option may
    be None. Raise UserError naming the flag, or the file and key, with the expected and the found value; TypeError
    for a flag that the config class does not have.
    """
    known = {item.name: item for item in option_fields(config_class)}
    if strange := set(flags) - set(known):
        raise TypeError(f"{config_class.__name__} has no option {', '.join(sorted(strange))}")
    from_file = _values_of_file(config_file, config_class) if config_file is not None else {}
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, item in known.items():
        given, source = flags.get(name), flag_of(item)
        if given is None or given == [] or given == ():
            if name not in from_file:
                continue
            given, source = from_file[name], f"{config_file}: {name}"
        base, optional, many = value_type(hints[name])
        if optional and given in ("none", ["none"], ("none",)):
            values[name] = None
            continue
        converted = []
        for part in given if many and isinstance(given, (list, tuple)) else [given]:
            try:
                converted.append(bounded(convert(part, base, option_of(item)), option_of(item)))
            except ValueError as error:
                raise UserError(f"{source}: {error}, found {part!r}") from None
        values[name] = tuple(converted) if many else converted[0]
    for name, item in known.items():
        if name not in values and item.default is MISSING:
            raise UserError(f"{flag_of(item)} is required; see --help")
    return config_class(**values)


def dropped(name: str, config_class: type) -> str | None:
    """Return advice for an option that was removed from this config class; None for other names."""
    classes = {cls.__name__ for cls in config_class.__mro__}
    entries = [entry for names, entry in DROPPED.items() if name in names.split()]
    return next((advice for owners, advice in entries if classes & set(owners.split())), None)


def read_toml(path: str, name: str) -> dict[str, Any]:
    """Read a TOML file, such as a recipe. Raise UserError if it cannot be read or is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    try:
        with open(path, "rb") as handle:
            return tomllib.loads(handle.read().decode("utf-8-sig"))  # Windows editors write a byte order mark
    except OSError as error:
        reason = "an address; download it first" if "://" in path else str(error.strerror).lower()
        raise UserError(f"{path}: cannot read the {name}: {reason}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from error


def _values_of_file(config_file: str, config_class: type) -> dict[str, Any]:
    """Return the values of a TOML file by field name; dashes and underscores are equivalent."""
    known = {item.name: item for item in option_fields(config_class)}
    by_flag = {flag.removeprefix("--"): name for name, item in known.items() if (flag := option_of(item).flag)}
    values: dict[str, Any] = {}
    for key, value in read_toml(config_file, "config file").items():
        name = key.replace("-", "_")
        name = by_flag.get(name, name)
        if name not in known:
            if advice := dropped(name, config_class):
                raise UserError(f"{config_file}: '{key}': was removed; {advice}")
            near = get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
            raise UserError(f"{config_file}: unknown key '{key}'; {hint}")
        if name in values:
            raise UserError(f"{config_file}: '{key}' is given twice")
        values[name] = value
    return values


def lasting_options(config: Any) -> dict[str, Any]:
    """Return the options by flag that a resumed run must not change, because they affect the result."""
    return options_by_flag(config, free=False)


def options_by_flag(config: Any, free: bool = True) -> dict[str, Any]:
    """Return the resolved options by flag, to compare; with `free=False`, without the `free` ones."""
    values = comparable(type(config), as_options(config))
    return {
        flag_of(item): values[item.name] for item in option_fields(type(config)) if free or not option_of(item).free
    }


def comparable(config_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by name, of a config or a manifest, without the trailing slashes of input paths."""
    bare = lambda value: (value.rstrip("/") or value) if isinstance(value, str) else value  # noqa: E731
    reads = {item.name for item in option_fields(config_class) if option_of(item).reads}
    return {
        name: value if name not in reads else list(map(bare, value)) if isinstance(value, list) else bare(value)
        for name, value in options.items()
    }


def as_options(config: Any) -> dict[str, Any]:
    """Return the resolved options as plain JSON values without credentials, for the manifest and `--dry-run`."""
    plain = lambda value: redacted(value) if isinstance(value, str) else value  # noqa: E731
    values = asdict(config).items()
    return {name: list(map(plain, value)) if isinstance(value, tuple) else plain(value) for name, value in values}
