"""The recipe: the steps of a crawl and all their thresholds, from and to TOML.

    recipe = read_recipe("recipe.toml")          # missing keys keep their defaults
    print(recipe_toml(recipe))

Each table of the file is a step; its keys are the fields of the step's dataclass. `"none"` stands for None, which
switches a rule off. Unknown tables and keys are errors.
"""

from __future__ import annotations

import inspect
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, get_type_hints

from llmkit.config import Option, bounded, convert, read_toml, value_type
from llmkit.crawl.filters.contamination import ContaminationRules
from llmkit.crawl.filters.quality import C4, FineWebQuality, GopherQuality, GopherRepetition
from llmkit.crawl.filters.urls import UrlRules
from llmkit.errors import UserError, naming
from llmkit.io.records import kind_of
from llmkit.tools.user_code import check_spelling

QUALITY = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
ALONE = ("url", "extract", "language", *QUALITY, "classifier", "own", "contamination", "pii")
DUPLICATES = ("exact_duplicates", "near_duplicates")  # steps that compare pages
STEPS = (*ALONE, *DUPLICATES)


@dataclass(frozen=True, slots=True)
class Url(UrlRules):
    """URLs to drop."""

    blocklists: tuple[str, ...] = ()  # hosts files, lists of domains or URLs, UT1 folders


@dataclass(frozen=True, slots=True)
class Extract:
    """Main-text extraction from HTML."""

    extractor: str = "model"  # model, fast or trafilatura
    favour: str = "balance"  # balance, precision (extract less) or recall (extract more)
    threshold: float | None = None  # the model keeps blocks of at least this probability; overrides favour


@dataclass(frozen=True, slots=True)
class Language:
    """Languages to keep."""

    languages: tuple[str, ...] = ("en",)  # ISO 639 codes as in lid.176; empty: keep all
    min_score: float | None = 0.65  # lid.176's probability, for the first 4,000 characters


@dataclass(frozen=True, slots=True)
class Classifier:
    """fastText models that score each text."""

    models: tuple[str, ...] = ()  # MODEL.bin:LABEL>=SCORE each; with <, keep texts that score below


@dataclass(frozen=True, slots=True)
class Own:
    """Your own filters (docs/extending.md)."""

    filters: tuple[str, ...] = ()  # py:FILE.py:FUNCTION each: takes a document, returns a reason to drop it or None


@dataclass(frozen=True, slots=True)
class PersonalData:
    """Personal data: e-mail addresses, phone, card and other numbers."""

    mode: str = "redact"  # redact: replace with placeholders; drop: drop the page


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Similarity at which the later of two texts is dropped."""

    min_similarity: float = 0.7  # Jaccard similarity of the sets of word 5-grams, estimated by MinHash
    # 16 bands of 7 find .989 of pairs with 2% of the words replaced, FineWeb's 14 of 8 .957; both use 112 MinHashes
    bands: int = 16  # texts that agree in all MinHashes of a band are compared
    rows: int = 7  # MinHashes per band

    def __post_init__(self) -> None:
        if not (1 <= self.bands < 255 and 1 <= self.rows <= 64):
            raise UserError(f"expected 1 to 254 bands of 1 to 64 rows, found {self.bands} of {self.rows}")


OWN_FILTERS = "[own] filters"  # for error messages
CHOICES = {
    "extractor": ("model", "fast", "trafilatura"),
    "favour": ("balance", "precision", "recall"),
    "mode": ("redact", "drop"),
}
SHARES = ("_fraction", "_score", "_similarity", "threshold")  # ends of the names of values from 0 to 1


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"


def check_steps(names: tuple[str, ...], prefix: str) -> tuple[str, ...]:
    """Return the names. Raises UserError, with the nearest step, for a name that is not a step."""
    for name in names:
        if name not in STEPS:
            raise UserError(f"{prefix}: unknown step '{name}'; {_nearest(name, STEPS)}")
    return names


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the output. Fields are in the order of the steps."""

    steps: tuple[str, ...] = STEPS
    url: Url = field(default_factory=Url)
    extract: Extract = field(default_factory=Extract)
    language: Language = field(default_factory=Language)
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    c4: C4 = field(default_factory=C4)
    fineweb: FineWebQuality = field(default_factory=FineWebQuality)
    classifier: Classifier = field(default_factory=Classifier)
    own: Own = field(default_factory=Own)
    contamination: ContaminationRules = field(default_factory=ContaminationRules)
    pii: PersonalData = field(default_factory=PersonalData)
    near_duplicates: NearDuplicates = field(default_factory=NearDuplicates)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(step for step in STEPS if step in check_steps(self.steps, "steps")))

    @property
    def taken(self) -> tuple[str, ...]:
        """The steps that have something to do."""
        inputs = {
            "classifier": self.classifier.models,
            "own": self.own.filters,
            "contamination": self.contamination.files,
        }
        return tuple(step for step in self.steps if inputs.get(step, True))

    def files(self) -> list[str]:
        """Return the files that the steps read. Raises UserError if a filter's file does not exist."""
        filters = [check_spelling(spec, OWN_FILTERS)[0] for spec in self.own.filters]
        models = [spec.rpartition(":")[0] for spec in self.classifier.models]
        read = {"own": filters, "classifier": models, "contamination": self.contamination.files}
        return [path for step in self.taken for path in read.get(step, ())]

    def changed(self, table: str, **values: Any) -> Recipe:
        """Return a copy with some values of one table replaced."""
        return replace(self, **{table: replace(getattr(self, table), **values)})


NAMED = {
    "fineweb": Recipe(),
    # keeps documentation and threads that FineWeb's recipe drops, and drops lists and menus: numbers, code and quoted
    # lines do not count against a page, lists do (benchmarks/crawl_recipes.py)
    "llmkit": Recipe(
        gopher_quality=GopherQuality(min_alphabetic_word_fraction=0.75),
        c4=C4(drop_curly_bracket=False),
        fineweb=FineWebQuality(
            min_terminal_line_fraction=0.3, max_short_line_fraction=0.5, max_duplicate_line_character_fraction=0.05
        ),
    ),
}


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to plain JSON values, for the manifest and for comparison."""
    return json.loads(json.dumps(asdict(recipe)))


# ---- from TOML


def read_recipe(path: str) -> Recipe:
    """Return a named recipe, or FineWeb's with the values of a TOML file. Raises UserError naming the key."""
    return NAMED.get(path) or _with_values(Recipe(), read_toml(path, "recipe"), path)


def _with_values(target: Any, content: dict[str, Any], prefix: str) -> Any:
    """Return a dataclass with its values replaced by those of a TOML table."""
    names = [item.name for item in fields(target)]
    hints = get_type_hints(type(target))
    values = {}
    for key, value in content.items():
        if key not in names:
            raise UserError(f"{prefix}: unknown key '{key}'; {_nearest(key, names)}")
        where, own = f"{prefix}: {key}", getattr(target, key)
        if is_dataclass(own):
            if not isinstance(value, dict):
                raise UserError(f"{where}: expected a table [{key}], found {kind_of(value)}")
            values[key] = _with_values(own, value, f"{prefix}: [{key}]")
        else:
            most = 1 if key.endswith(SHARES) else None
            details = Option("", metavar="TEXT", choices=CHOICES.get(key), at_least=0, at_most=most)
            values[key] = _value(value, hints[key], details, where)
    with naming(prefix):
        result = replace(target, **values)
    for key in names:
        low, high = getattr(result, key), getattr(result, key.replace("min_", "max_", 1), None)
        if key.startswith("min_") and None not in (low, high) and low > high:
            raise UserError(f"{prefix}: {key}: expected at most max_{key[4:]}, {high}, found {low}")
    return result


def _value(value: Any, hint: Any, details: Option, where: str) -> Any:
    base, optional, many = value_type(hint)
    if optional and value == "none":
        return None
    if many and not isinstance(value, list):
        raise UserError(f"{where}: expected a list of strings, found {value!r}")
    try:  # a number in quotes is an error
        parts = [[part] if isinstance(part, str) and base is not str else part for part in (value if many else [value])]
        values = [bounded(convert(part, base, details), details) for part in parts]
    except ValueError as error:
        raise UserError(f"{where}: {error}{' or none' * optional}, found {value!r}") from None
    return tuple(values) if many else values[0]


# ---- to TOML


def recipe_toml(recipe: Recipe) -> str:
    """Return the recipe as TOML, with the comment of each field."""
    lines = [
        '# a recipe of llmkit crawl-filter: a table for each step; "none" switches a threshold off',
        f"steps = {_toml(recipe.steps)}",
    ]
    for item in fields(recipe):
        table = getattr(recipe, item.name)
        if not is_dataclass(table):
            continue
        lines += ["", f"[{item.name}]  # {(type(table).__doc__ or '').splitlines()[0]}"]
        source = ""
        with suppress(OSError):  # no comments if only byte code is installed
            source = "".join(inspect.getsource(kind) for kind in type(table).__mro__ if is_dataclass(kind))
        comments = dict(re.findall(r"^ {4}(\w+): [^#\n]*# (.+)$", source, re.MULTILINE))
        for name in fields(table):
            comment = f"  # {comments[name.name]}" if name.name in comments else ""
            lines.append(f"{name.name} = {_toml(getattr(table, name.name))}{comment}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # a JSON string is a TOML string, except for U+007F
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
