"""Tasks, each a TOML file in tasks/ next to this module or the user's own, and their items, made from records.

    source = "lm-evaluation-harness 0.4.13, arc_easy"     the origin of prompts and metric
    version = "1.0"                                       of the task there
    kind = "multiple_choice"
    metric = "acc"                                        the score; other metrics of the kind are reported too
    baseline = 0.25                                       score of a random guess
    hub = "hf://datasets/allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet"    used without --data-dir

    [[form]]                                              the first form whose fields a record has is used
    prompt = "Question: {{question}}\\nAnswer:"
    choices = "choices.text"
    gold = "choices.label.index(answerKey)"

`prompt`, `continuation`, `text` and `answer` are Jinja templates over a record's fields; `choices`, `contexts`, `gold`
and `answers` are Jinja expressions, or values. `regex_replace(pattern, by)` is available in addition to Jinja's
filters. The kinds, the fields of their forms, and what is scored:

    multiple_choice    prompt, choices, gold           the likeliest choice after the prompt
    schema             contexts, continuation, gold    the context after which the continuation is likeliest
    language_modeling  prompt, continuation            the continuation, token by token
    text               text                            bits per byte of complete texts
    generation         prompt, answer? or answers?     completions, by the verifiers of rl or by exact_match;
                                                       few-shot examples show `continuation`, or else the answer

A JSONL file needs no TOML if its records have the field names of llm-foundry (FILE_FORMS), or are problems for `rl`
(formats/problems.py).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random
from textwrap import shorten
from typing import Any

from llmkit.config import read_toml
from llmkit.errors import UserError, naming
from llmkit.formats.problems import Problem, read_problem
from llmkit.io.jsonl import RECORDS, dump_json, expanded, read_jsonl
from llmkit.io.progress import counted
from llmkit.io.records import Row, fields_of
from llmkit.io.remote import is_remote
from llmkit.rewards.verifiers import NAMES as VERIFIERS

TASKS = Path(__file__).with_name("tasks")
KINDS = {  # kind: required fields of its forms, then metrics, the default score first
    "multiple_choice": (("prompt", "choices", "gold"), "acc", "acc_norm", "acc_bytes", "acc_tokens"),
    "schema": (("contexts", "continuation", "gold"), "acc"),
    "language_modeling": (("prompt", "continuation"), "acc", "bits_per_byte"),
    "text": (("text",), "bits_per_byte"),
    "generation": (("prompt",), "pass@1"),
}
TEMPLATES = ("prompt", "continuation", "text", "answer")  # template fields of a form; the others are expressions
SHOTS_ORDERS = ("random", "spare", "first", "core")
ENDINGS = ("", *(kind + packed for kind in RECORDS for packed in ("", ".gz", ".zst")))
SHOT_SEED = 1234  # as in lm-evaluation-harness and nanochat
CORE_SEED = 1337  # nanochat's seed for the order of items
EXACT_MATCH = "exact_match"  # a verifier that compares answers like lm-evaluation-harness


@dataclass(frozen=True)
class Form:
    """Templates and expressions for records of one form; None if the kind does not use a field."""

    prompt: str | None = None
    choices: Any = None
    contexts: Any = None
    continuation: str | None = None
    text: str | None = None
    answer: str | None = None
    answers: Any = None
    gold: Any = None


FORM_FIELDS = [item.name for item in fields(Form)]
FILE_FORMS = (
    ("schema", Form(contexts="context_options", continuation="{{continuation}}", gold="gold")),
    ("multiple_choice", Form(prompt="{{query}}", choices="choices", gold="gold")),
    ("language_modeling", Form(prompt="{{context}}", continuation="{{continuation}}")),
    ("text", Form(text="{{text}}")),
)


@dataclass(frozen=True)
class Task:
    """A task; `path` is the file of its items.

    delimiter    between prompt and continuation; not used in chats
    description  template before the examples; in chats, the system message
    separator    after each example
    shots        few-shot examples per item
    shots_file   stem of the file of examples; else they come from `example` (records in the TOML) or from the other
                 items, also if the file is missing and `shots = 0`
    shots_order  "random": drawn per item; "spare": one more is drawn than shown, as lm-evaluation-harness does for
                 tasks without a test split; "first": the first ones; "core": drawn as in nanochat
    group        an expression: groups are also scored separately, and examples come from the item's group
    tokens       scored tokens: "harness": the continuation; "core": those that the options do not share
    stop, max_tokens, verifier  for generation
    extract, ignore, ignore_case  for the verifier exact_match: a regular expression that finds the answer in a
                 completion, and others whose matches are removed from both answers
    """

    name: str
    kind: str = "generation"
    form: tuple[Form, ...] = ()
    source: str = ""
    version: str = ""
    metric: str = ""
    baseline: float = 0.0
    file: str = ""
    hub: str = ""
    delimiter: str = " "
    description: str = ""
    separator: str = "\n\n"
    shots: int = 0
    shots_file: str = ""
    shots_hub: str = ""
    shots_order: str = "random"
    group: str = ""
    tokens: str = "harness"
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    verifier: str = ""
    extract: str = ""
    ignore: tuple[str, ...] = ()
    ignore_case: bool = False
    example: tuple[dict[str, Any], ...] = ()
    path: str = ""
    shots_path: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its examples.

    contexts, continuations  one for all options, or one per option
    gold     index of the right option; None without options
    problem  for judging a completion
    """

    where: str
    record: Mapping[str, Any]
    description: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...] = ()
    gold: int | None = None
    group: str = ""
    problem: Problem | None = None

    def pairs(self, delimiter: str) -> list[tuple[str, str]]:
        """Return the context and continuation of each option."""
        return [(context, delimiter + rest) for context in self.contexts for rest in self.continuations]

    @property
    def options(self) -> tuple[str, ...]:
        """The texts to choose from."""
        return self.contexts if len(self.contexts) > 1 else self.continuations


# ---- tasks


def load_tasks(specs: Sequence[str], data_dir: str | None = None, flag: str = "--tasks") -> list[Task]:
    """Load tasks, each NAME, NAME=FILE, FILE.toml, or FILE of items. Does not read the items.

    Raises UserError for an unknown task, with the nearest names, and for missing data.
    """
    tasks = [_task(spec, data_dir, flag) for several in specs for spec in several.split(",") if spec]
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise UserError(f"{flag}: expected each task once, found {task.name} twice")
    return tasks


def _task(spec: str, data_dir: str | None, flag: str) -> Task:
    name, _, path = spec.partition("=")
    known = sorted(path.stem for path in TASKS.glob("*.toml"))
    if name in known:
        task = read_task(TASKS / f"{name}.toml")
    elif not path and spec.endswith(".toml"):
        task, data_dir = read_task(Path(spec)), data_dir or str(Path(spec).parent)
    elif not path and (is_remote(spec) or Path(spec).is_file()):
        stem = re.sub(r"(\.(jsonl|json|ndjson|gz|zst|parquet|csv|tsv))+$", "", spec.rpartition("/")[2])
        return Task(stem, path=spec)  # the first record will tell its kind
    else:
        near = get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"tasks: {', '.join(known)}"
        raise UserError(f"{flag} {spec}: expected a task or a file of items, found neither; {hint}")
    path = path or _find(task.name, task.file or task.name, task.hub, data_dir, flag)
    if task.shots_file:
        beside = data_dir or (None if path == task.hub else str(Path(path).parent))
        with suppress(UserError):  # the examples may not be needed
            task = replace(task, shots_path=_find(task.name, task.shots_file, task.shots_hub, beside, flag))
    return replace(task, path=path)


def _find(name: str, stem: str, hub: str, data_dir: str | None, flag: str) -> str:
    if data_dir is None:
        if hub:
            return hub
        raise UserError(
            f"{flag} {name}: its data is not on the Hub; give --data-dir DIR with {stem}.jsonl, or {name}=FILE"
        )
    for ending in ENDINGS:
        if (path := Path(data_dir) / f"{stem}{ending}").is_file():
            return str(path)
    raise UserError(f"{flag} {name}: expected {stem}.jsonl (or .jsonl.gz, .parquet ...) in {data_dir}, found none")


def read_task(path: Path) -> Task:
    """Read a task's TOML. Raises UserError naming file and key."""
    from jinja2 import TemplateError

    values = read_toml(str(path), "task")
    forms = values.get("form")
    if not isinstance(forms, list) or not forms:
        raise UserError(f"{path}: expected at least one table [[form]], found none")
    types = {item.name: type(item.default) for item in fields(Task) if item.name not in ("name", "path", "shots_path")}
    for table, known, prefix in [(values, types, ""), *((form, FORM_FIELDS, "[[form]]: ") for form in forms)]:
        if unknown := [key for key in table if key not in known]:
            near = get_close_matches(unknown[0], known, 1) or sorted(known)
            raise UserError(f"{path}: {prefix}expected {' or '.join(near)}, found {unknown[0]!r}")
    values["form"] = tuple(Form(**form) for form in forms)
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    for key, value in values.items():
        if not isinstance(value, (int, float) if types[key] is float else types[key]):
            expected = "list" if types[key] is tuple else types[key].__name__
            raise UserError(f"{path}: {key}: expected {expected}, found {value!r}")
    for pattern in filter(None, (values.get("extract"), *values.get("ignore", ()))):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{path}: expected a regular expression, found {pattern!r}: {error}") from None
    metrics = KINDS.get(values.get("kind", ""), ())[1:]
    choices = {"metric": metrics, "shots_order": SHOTS_ORDERS, "verifier": (*VERIFIERS, EXACT_MATCH)}
    for key, names in {"kind": KINDS, **choices}.items():
        if (key in values or key == "kind") and values.get(key, "") not in names:
            raise UserError(f"{path}: {key}: expected {', '.join(names)}, found {values.get(key)!r}")
    task = Task(path.stem, **values)
    if task.shots < 0 or not 0 <= task.baseline < 1:
        raise UserError(f"{path}: expected shots >= 0 and 0 <= baseline < 1")
    sources = [("description", task.description), ("group", task.group)]
    for form in forms:
        if missing := [key for key in KINDS[task.kind][0] if key not in form]:
            raise UserError(f"{path}: [[form]]: expected {missing[0]!r}, required for kind {task.kind}")
        sources += form.items()
    for key, source in sources:
        is_template = key in ("description", *TEMPLATES)
        if is_template and not isinstance(source, str):
            raise UserError(f"{path}: [[form]]: {key}: expected a template, found {source!r}")
        try:
            if isinstance(source, str) and source:
                _compiled(source, not is_template)
        except TemplateError as error:
            kind = "template" if is_template else "expression"
            raise UserError(f"{path}: {key}: expected a Jinja {kind}: {error}") from None
    return task


# ---- items


@dataclass(frozen=True)
class Loaded:
    """A task with its items, the SHA-256 of their records, and the files of items and examples."""

    task: Task
    items: list[Item]
    data_sha256: str
    files: tuple[str, ...]
    shots_files: tuple[str, ...] = ()


def load_items(task: Task, limit: int | None = None, shots: int | None = None, seed: int = 0) -> Loaded:
    """Read at most `limit` items of a task, each with its examples.

    shots  number of examples; overrides the task's
    seed   added to the seed for drawing examples
    Raises UserError for records that match no form of the task, empty options, and a gold that is not an option.
    """
    try:
        files = expanded(task.path)
        rows = list(read_jsonl(files))
    except UserError as error:
        if task.path != task.hub:
            raise
        raise UserError(f"{error}; or give --data-dir DIR with {task.file or task.name}.jsonl") from None
    if not rows:
        raise UserError(f"{task.path}: expected items, found none")
    if not task.form:
        task = _by_form(task, rows[0])
    digest = sha256()
    for row in rows:
        digest.update(dump_json(row.value) + b"\n")
    if task.shots_order == "core":
        Random(CORE_SEED).shuffle(rows)
        rows = rows[:limit]
    count = task.shots if shots is None else shots
    if count and task.shots and task.shots_file and not task.shots_path:
        raise UserError(f"{task.path}: expected {task.shots_file}.jsonl next to it, for the examples, found none")
    elsewhere = bool(task.shots_path or task.example)
    pool = [_parse(task, row) for row in (rows if task.group or (count and not elsewhere) else rows[:limit])]
    items = pool
    if limit is not None and len(items) > limit:  # spread evenly over groups
        seen, ranks = Counter[str](), []
        for number, item in enumerate(items):
            ranks.append((seen[item.group], number))
            seen[item.group] += 1
        items = [items[number] for number in sorted(number for _, number in sorted(ranks)[:limit])]
    shots_files = expanded(task.shots_path) if count and task.shots_path else []
    if count and elsewhere:
        shown = [Row(record, f"{task.name}.toml, [[example]]", n) for n, record in enumerate(task.example, 1)]
        pool = [_parse(task, row) for row in (read_jsonl(shots_files) if shots_files else shown)]
        for item in pool:
            digest.update(dump_json(item.record) + b"\n")
    if count:
        items = _with_examples(task, items, pool, count, seed, elsewhere)
    return Loaded(replace(task, shots=count), items, digest.hexdigest(), tuple(files), tuple(shots_files))


def _by_form(task: Task, row: Row) -> Task:
    """Return the task for a file without TOML, judging by its first record."""
    for kind, form in FILE_FORMS:
        task = replace(task, kind=kind, form=(form,))
        with suppress(_OtherForm):
            _item(task, form, row)
            return task
    try:
        read_problem(row)
    except UserError as error:
        known = "query, choices, gold; context_options, continuation, gold; context, continuation; text; prompt, answer"
        is_problem = any(name in row.value for name in ("prompt", "question", "messages"))
        remedy = str(error).removeprefix(f"{row.where}: ") if is_problem else "name its task, as in arc_easy=FILE"
        raise UserError(f"{row.where}: expected an item ({known}), found {fields_of(row.value)}; {remedy}") from None
    return replace(task, kind="generation", form=())


class _OtherForm(Exception):
    """A record lacks a field of the form."""


@lru_cache(maxsize=256)
def _compiled(source: str, is_expression: bool) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, by: re.sub(pattern, by, text)
    if is_expression:
        return environment.compile_expression(source, undefined_to_none=False)
    return environment.from_string(source).render


def _render(source: Any, record: Mapping[str, Any], is_expression: bool = False) -> Any:
    """Evaluate a template or an expression over a record. Raises _OtherForm for a missing field."""
    from jinja2 import TemplateError, Undefined

    if not isinstance(source, str):
        return source
    name = source if is_expression else source[2:-2] if source.startswith("{{") and source.endswith("}}") else ""
    if name in record and record[name] is None:
        raise _OtherForm(f"{source!r}: null")
    if name in record:  # a plain field: saves Jinja's 0.1 ms
        return record[name] if is_expression else str(record[name])
    try:
        value = _compiled(source, is_expression)(record)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise _OtherForm(f"{shorten(source, 60)!r}: {error}") from None
    if isinstance(value, Undefined):
        raise _OtherForm(f"{source!r}: missing field")
    return value


def _parse(task: Task, row: Row) -> Item:
    """Return the item of a record, without examples."""
    if not task.form:
        problem = read_problem(row)
        return Item(row.where, row.value, "", (problem.prompt,), (problem.answer or "",), problem=problem)
    reasons = []
    for form in task.form:
        try:
            return _item(task, form, row)
        except _OtherForm as error:
            reasons.append(str(error))
    otherwise = f"; --tasks {task.path} scores the file by its own form" if task.source else ""
    actual = f"{fields_of(row.value)}: {'; '.join(reasons)}"
    raise UserError(f"{row.where}: expected an item of {task.name}, found {actual}{otherwise}")


def _item(task: Task, form: Form, row: Row) -> Item:
    record = row.value
    group = str(_render(task.group, record, True)) if task.group else ""
    description = _render(task.description, record) if task.description else ""
    prompt, continuation = (_render(text, record) for text in (form.prompt, form.continuation))
    common = {"where": row.where, "record": record, "description": description, "group": group}
    if task.kind == "text":
        return Item(contexts=("",), continuations=(_text(row, "text", _render(form.text, record)),), **common)
    if task.kind == "language_modeling":
        return Item(contexts=(prompt,), continuations=(_text(row, "continuation", continuation),), **common)
    if task.kind == "generation":
        answer = _render(form.answer, record) if form.answers is None else _render(form.answers, record, True)
        values = {**record, "prompt": prompt, **({} if answer is None else {"answer": answer})}
        values |= {"verifier": task.verifier} if task.verifier else {}
        with naming(row.where):
            problem = read_problem(Row(values, row.path, row.line))
        if task.verifier == EXACT_MATCH and not problem.answer:
            raise UserError(f"{row.where}: expected an answer for {EXACT_MATCH}, found {fields_of(record)}")
        shown = str(continuation or (problem.answer if form.answers else answer or problem.answer) or "")
        return Item(contexts=(prompt,), continuations=(shown,), problem=problem, **common)
    options = _render(form.contexts if task.kind == "schema" else form.choices, record, True)
    gold = _render(form.gold, record, True)
    if not isinstance(options, (list, tuple)) or len(options) < 2:
        raise UserError(f"{row.where}: expected at least two choices, found {options!r}")
    options = tuple(_text(row, "choice", option) for option in options)
    if isinstance(gold, str) and gold in options:
        gold = options.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(options):
        raise UserError(f"{row.where}: expected the right choice, from 0 to {len(options) - 1}, found {gold!r}")
    if task.kind == "schema":
        rest = _text(row, "continuation", continuation)
        return Item(contexts=options, continuations=(rest,), gold=int(gold), **common)
    return Item(contexts=(prompt,), continuations=options, gold=int(gold), **common)


def _text(row: Row, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{row.where}: expected {'an' if name[0] in 'aeiou' else 'a'} {name} with text, found {value!r}"
        )
    return value


# ---- answers


def is_exact_match(task: Task, completion: str, problem: Problem) -> bool:
    """Return whether a completion equals one of a problem's answers, like exact_match of lm-evaluation-harness.

    Compares the first match of `extract`; if that has groups, the first non-empty one.
    """
    if task.extract:
        match = re.search(task.extract, completion)
        if match is None:
            return False
        completion = next(filter(None, match.groups()), "") if match.groups() else match[0]
    compared = []
    for text in (completion.strip(), problem.answer or "", *problem.alternatives):
        for pattern in task.ignore:
            text = re.sub(pattern, "", text)
        compared.append(text.lower() if task.ignore_case else text)
    return compared[0] in compared[1:]


# ---- examples


def _with_examples(
    task: Task, items: Sequence[Item], pool: Sequence[Item], count: int, seed: int, elsewhere: bool
) -> list[Item]:
    """Put `count` examples from a pool before each item. An item is never its own example.

    elsewhere  whether the pool is separate from the items
    Raises UserError if the pool is too small.
    """
    draw, drawn = Random(SHOT_SEED + seed), []
    groups: dict[str, list[Item]] = defaultdict(list)
    for example in pool:
        groups[example.group].append(example)
    for number, item in enumerate(items):
        if task.group and not task.example:
            pool = groups[item.group]
        others = (other for other in pool if elsewhere or other.record != item.record)
        examples = []
        if task.shots_order == "first":
            examples = list(islice(others, count))
        elif task.shots_order == "core":
            draw = Random(SHOT_SEED + number)
        elif not elsewhere or task.shots_order == "spare":
            # like lm-evaluation-harness: draw one more than needed, in case the item itself is drawn
            more = draw.sample(pool, min(count + 1, len(pool)))
            examples = [other for other in more if other.record != item.record][:count]
        if len(examples) < count and task.shots_order != "first":
            rest = list(others)
            examples = draw.sample(rest, min(count, len(rest)))
        if len(examples) < count:
            raise UserError(f"{item.where}: expected {counted(count, 'example')} (--shots), found {len(examples)}")
        prefix = ""
        for example in examples:
            context, rest = example.pairs(task.delimiter)[example.gold or 0]
            if task.tokens == "core" and task.kind == "language_modeling":
                context = context.strip()
            prefix += context + rest + task.separator
        drawn.append(replace(item, contexts=tuple(prefix + context for context in item.contexts)))
    return drawn
