"""`llmkit evaluate`: score models on standard benchmarks and on your own tasks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import (
    BackendConfig,
    CommonConfig,
    DecodingConfig,
    ServedConfig,
    ToolConfig,
    argument,
    as_options,
    lasting_options,
    option,
)
from llmkit.errors import GateError, UserError
from llmkit.io.jsonl import input_files, open_output, read_documents, read_object, write_json
from llmkit.io.manifest import training_files, write_manifest
from llmkit.io.progress import Progress, counted, say
from llmkit.io.records import CHOICES, first_of
from llmkit.io.remote import is_remote
from llmkit.io.resume import STATE, Kept
from llmkit.io.run_folder import check_files, check_model_folder, uploaded

if TYPE_CHECKING:
    from llmkit.evaluation.tasks import Loaded

SHOWN = ("acc_norm", "perplexity", "bits_per_byte", "word_perplexity")  # besides the score; all are in the JSON
LABELS = ("role", "from", "source", "id")  # fields of records and messages that no model is trained on
Records = dict[tuple[str, str], list[dict[str, Any]]]  # a record per item, by model and task


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommonConfig, DecodingConfig, BackendConfig, ToolConfig, ServedConfig):
    """Options of `llmkit evaluate`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit evaluate base/ --tasks arc_easy,piqa,lambada_openai --data-dir eval/ -o scores.json --force
          llmkit evaluate base/ chat/ --tasks arc_easy=arc_easy.jsonl.gz --limit 500
          llmkit evaluate chat/ --tasks problems.jsonl --chat --tools calc --samples 4 --temperature 0.7
          llmkit evaluate base/ --core eval_bundle/ -o core.json --resume
          llmkit evaluate policy/ --tasks problems.jsonl --chat --fail-under problems=0.2

        A task is a name (--tasks help lists them) with its data in --data-dir, NAME=FILE, a FILE.toml of your own, or
        a FILE of items: {"query", "choices", "gold"}, {"context_options", "continuation", "gold"}, {"context",
        "continuation"}, {"text"}, or problems {"prompt", "answer"}, judged by the verifiers of llmkit rl.

        A table goes to stderr, the scores as JSON to stdout or --out. Prompts and scores match lm-evaluation-harness
        (docs/evaluate.md).
    """
    following: ClassVar[str] = "llmkit report base/ scores.json -o report.html"

    models: tuple[str, ...] = argument("Model folders, from llmkit or Hugging Face.", metavar="MODEL...")
    tasks: tuple[str, ...] = option((), "Tasks, or files of items.", metavar="TASK,...", reads=True)
    data_dir: str | None = option(None, "Folder of the tasks' data.", metavar="DIR", reads=True, free=True)
    core: str | None = option(None, "Folder of the CORE benchmark of DCLM and nanochat.", metavar="BUNDLE", reads=True)
    dtype: str = option(
        "auto", "Precision; auto: bfloat16 on GPUs, else float32.", choices=("auto", "float32", "bfloat16")
    )
    resume: bool = option(False, "Resume a killed run of --out.", free=True)
    report: str | None = option(None, "Output file of prompts, likelihoods and verdicts.", metavar="FILE", free=True)
    gates: tuple[str, ...] = option(
        (), "Minimum score, else exit code 3; repeatable.", flag="--fail-under", metavar="TASK=SCORE", free=True
    )
    trained_on: tuple[str, ...] = option(
        (), "Training documents, or a model's; items found there are scored apart.", metavar="DOCS", reads=True
    )

    few_shot: int | None = option(
        None, "Few-shot examples [the task's].", flag="--shots", group="Items", at_least=0, at_most=1000
    )
    chat: bool = option(False, "Ask items as chat messages.", group="Items")
    system: str | None = option(None, "System message, or text before each prompt.", group="Items")
    samples: int = option(1, "Completions per item, for pass@k.", short="-n", group="Text", at_least=1, at_most=10**4)
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.", group="Text", at_least=0, at_most=100)
    max_tokens: int | None = option(
        None, "Maximum tokens of a completion [the task's].", group="Text", unit="count", at_least=1
    )

    def reads_stdin(self) -> bool:
        """True if help is wanted: without a model there is nothing to do."""
        return not self.models and not self.is_served


@dataclass(frozen=True)
class Summary:
    """Scores of each model, and comparisons of the others with the first; with --out the scores alone."""

    path: str | None
    models: list[dict[str, Any]]
    comparisons: list[dict[str, Any]] | None


@uploaded("out", "report")
def run(config: EvaluateConfig) -> Summary | None:
    """Load, evaluate, summarise, save. Raises UserError, and GateError for a score under its gate."""
    out, gates = config.out or "-", _checked(config)
    if check_files(config, "evaluate", "report") is not None:
        return _summary(config, gates, read_object(Path(out))["models"])

    # load
    loaded = _load(config, gates)
    if config.dry_run:
        from llmkit.model.folder import SavedTensors

        for folder in () if config.is_served else filterfalse(is_remote, config.models):
            SavedTensors(folder).check_kind()
        for one in loaded:
            say(f"{one.task.name}: {one.task.kind}, {counted(len(one.items), 'item')} of {one.task.path}", config.quiet)
            shown = one.items[0].contexts[0] if one.task.kind != "text" else one.items[0].continuations[0][:500]
            say(f"first item:\n{one.items[0].description}{shown}", config.quiet)
        return None
    documents, missing = _training_documents(config)
    contaminated = _contaminated(config, loaded, documents) if config.trained_on else None

    # evaluate
    records, hashes = _records(config, loaded, out)

    # summarise
    models, comparisons = _scores(hashes, loaded, records, contaminated)
    for line in _table(models, comparisons):
        say(line, config.quiet)

    # save
    if config.report is not None:
        with open_output(config.report, config.force) as write:
            for line in _report(loaded, records, contaminated):
                write(line)
    scores: dict[str, Any] = {"models": models, **({"comparisons": comparisons} if comparisons else {})}
    if config.trained_on:
        scores["trained_on"] = {"files": documents, "missing": missing}
    if out != "-":
        write_json(out, scores)
        inputs = list(dict.fromkeys(path for one in loaded for path in (*one.files, *one.shots_files)))
        results = {model["model"]: _task_scores(model) for model in models}
        write_manifest(out, "evaluate", as_options(config), inputs=inputs, parents=config.models, results=results)
        Path(out + STATE).unlink(missing_ok=True)
    summary = _summary(config, gates, models)
    return summary if out != "-" else Summary(None, models, comparisons or None)


def _summary(config: EvaluateConfig, gates: Mapping[str, float], models: Sequence[dict[str, Any]]) -> Summary:
    """Summarise what --out holds. Raises UserError for a gate of no task, and GateError for a score under its gate."""
    _check_gates(gates, [*models[0]["tasks"], *(["core"] if "core" in models[0] else [])])
    failures = [
        f"{model['model']}: {name} {score:.4f} is under --fail-under {least:g}"
        for model in models
        for name, least in gates.items()
        if (score := model["core"] if name == "core" else model["tasks"][name]["score"]) < least
    ]
    if failures:
        raise GateError("; ".join(failures))
    return Summary(config.out, [{**model, "tasks": _task_scores(model)} for model in models], None)


def _task_scores(model: Mapping[str, Any]) -> dict[str, float]:
    return {name: task["score"] for name, task in model["tasks"].items()}


# ---- load


def _checked(config: EvaluateConfig) -> dict[str, float]:
    """Check the options; return the gates of --fail-under by task."""
    for folder in config.models or (() if config.is_served else (None,)):
        check_model_folder(folder, "llmkit evaluate base/ --tasks arc_easy --data-dir eval/")
    if config.is_served and len(config.models) > 1:
        raise UserError(f"--engine: expected at most one MODEL with it, found {len(config.models)}")
    if len(set(config.models)) < len(config.models):
        raise UserError("MODEL...: expected each model once")
    if not config.tasks and config.core is None:
        raise UserError("--tasks: expected a task, such as --tasks arc_easy --data-dir eval/, or --core BUNDLE")
    if config.samples > 1 and config.temperature == 0:
        raise UserError(f"--samples {config.samples}: needs --temperature above 0; greedy samples are all the same")
    if config.tools and not config.chat:
        raise UserError("--tools: needs --chat; tools are called within an answer")
    if config.thinking != "auto" and not config.chat:
        raise UserError("--thinking: needs --chat, whose template it switches")
    gates = {}
    for text in config.gates:
        name, _, least = text.rpartition("=")
        try:
            gates[name] = float(least if name else "")
            if not math.isfinite(gates[name]):
                raise ValueError("no score is under nan")
        except ValueError:
            raise UserError(f"--fail-under {text}: expected TASK=SCORE, such as arc_easy=0.3") from None
    return gates


def _check_gates(gates: Mapping[str, float], names: Sequence[str]) -> None:
    for name in gates:
        if name not in names:
            raise UserError(f"--fail-under {name}: expected a task among {', '.join(names)}")


def _load(config: EvaluateConfig, gates: Mapping[str, float]) -> list[Loaded]:
    from llmkit.evaluation.scores import core_tasks
    from llmkit.evaluation.tasks import load_items, load_tasks

    tasks = load_tasks(config.tasks, config.data_dir)
    tasks += [] if config.core is None else core_tasks(config.core)
    _check_gates(gates, [task.name for task in tasks] + ["core"] * (config.core is not None))
    loaded = [load_items(task, config.limit, config.few_shot, config.seed) for task in tasks]
    for one in loaded:
        if one.task.shots and one.task.shots_file and not one.task.shots_path:
            say(f"{one.task.name}: examples are other items: there is no {one.task.shots_file}.jsonl", config.quiet)
    if generated := [one for one in loaded if one.task.kind == "generation"]:  # checked before any model is loaded
        from llmkit.evaluation.evaluator import check_problems
        from llmkit.rewards.verifiers import VerifierReward

        with closing(VerifierReward(sandbox=config.sandbox != "none")) as verifier:
            for one in generated:
                check_problems(one.task, one.items, verifier)
                if not one.task.form and first_of(dict(one.items[0].record), CHOICES):
                    why = "answered in text; likelihoods score choices named query, choices and gold (docs/evaluate.md)"
                    say(f"{one.task.name}: {why}", config.quiet)
    return loaded


def _training_documents(config: EvaluateConfig) -> tuple[list[str], list[str]]:
    """Return the files of --trained-on, and the sources of a model that cannot be read; see `training_files`."""
    files, missing = [], []
    for path in config.trained_on:
        if not os.path.isfile(f"{path}/config.json"):
            files += input_files([path], text=True)
            continue
        readable, lost = training_files(path)
        files, missing = files + readable, missing + lost
        if not readable:
            raise UserError(f"--trained-on {path}: expected its training files, found none of {', '.join(lost)}")
        if lost:
            say(f"--trained-on {path}: missing, changed or without a manifest: {', '.join(lost)}", config.quiet)
    return list(dict.fromkeys(files)), list(dict.fromkeys(missing))


def _contaminated(config: EvaluateConfig, loaded: Sequence[Loaded], documents: Sequence[str]) -> set[str]:
    """Return FILE:LINE of the items that occur in the documents."""
    from llmkit.crawl.filters.contamination import Contamination, ContaminationRules

    files = tuple(dict.fromkeys(path for one in loaded for path in one.files))
    index = Contamination(ContaminationRules(files), config.quiet, flag="--trained-on")
    with Progress("contamination", unit="documents", quiet=config.quiet) as progress:
        contaminated: set[str] = set()
        for row in read_documents(documents, read=lambda row: row):
            text = row.value.get("text")
            text = text if isinstance(text, str) else "\n".join(_strings(row.value))
            contaminated |= {match.item for match in index.find(text)}
            progress.advance()
    return contaminated


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts of a conversation or a problem, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        each = value if isinstance(value, list) else [item for name, item in value.items() if name not in LABELS]
        for item in each:
            yield from _strings(item)


# ---- evaluation


def _records(config: EvaluateConfig, loaded: Sequence[Loaded], out: str) -> tuple[Records, dict[str, str]]:
    """Evaluate each model on all items; return the records, and each model's hash by its name."""
    import orjson

    from llmkit.evaluation.evaluator import Settings, chunks, open_model

    records: Records = {}
    hashes: dict[str, str] = {}
    identity = {**lasting_options(config), "data": {one.task.name: one.data_sha256 for one in loaded}}
    state = Kept(None if out == "-" else Path(out + STATE), identity, resume=config.resume)
    total = sum(len(one.items) for one in loaded) * max(1, len(config.models))
    with state.resumable(), Progress("evaluate", total=total, unit="items", quiet=config.quiet) as progress:
        for folder in config.models or (None,):
            with open_model(
                folder,
                Settings(
                    chat=config.chat,
                    system=config.system,
                    samples=config.samples,
                    temperature=config.temperature,
                    max_tokens=config.max_tokens,
                    seed=config.seed,
                    tools=config,
                ),
                engine=config.engine,
                device=config.device,
                dtype=config.dtype,
                backend=config.backend,
                slots=config.batch_size,
                concurrency=config.concurrency,
                timeout=config.timeout,
            ) as model:
                hashes[model.name] = model.sha256
                for one in loaded:
                    done = records[model.name, one.task.name] = []
                    for number, chunk in enumerate(chunks(one.items)):
                        key = f"{model.sha256} {model.name} {one.task.name} {number}"
                        if key not in state:
                            state.add(key, {"records": model.evaluate(one.task, chunk)})
                        done += orjson.loads(state[key])["records"]
                        progress.advance(len(chunk), task=one.task.name)
    return records, hashes


# ---- scores


def _scores(
    hashes: Mapping[str, str], loaded: Sequence[Loaded], records: Records, contaminated: set[str] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the scores of each model, and comparisons of the others with the first."""
    from llmkit.evaluation.scores import compare, core_score, summarise, summarise_apart

    models, comparisons = [], []
    (first, *_) = hashes
    for name, sha256 in hashes.items():
        tasks = {one.task.name: summarise(one, records[name, one.task.name]) for one in loaded}
        for one in loaded:
            task, rows = one.task.name, records[name, one.task.name]
            if contaminated is not None:
                tasks[task] |= summarise_apart(one, rows, contaminated)
            if name != first:
                compared = compare(one.task, records[first, task], rows)
                comparisons.append({"task": task, "models": [first, name], **compared})
        core = core_score((one.task, tasks[one.task.name]["score"]) for one in loaded)
        models.append({"model": name, "sha256": sha256, **({} if core is None else {"core": core}), "tasks": tasks})
    return models, comparisons


def _report(loaded: Sequence[Loaded], records: Records, contaminated: set[str] | None) -> Iterator[dict[str, Any]]:
    items = {one.task.name: one.items for one in loaded}
    for (name, task), rows in records.items():
        for item, record in zip(items[task], rows, strict=True):
            line = {"model": name, "task": task, "where": item.where, "gold": item.gold}
            line |= {key: getattr(item, key) for key in ("description", "contexts", "continuations")}
            if contaminated is not None:
                line["in_training"] = item.where in contaminated
            yield {**line, **record}


def _table(models: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table's lines: a row for each task and metric, a column for each model; then notes."""
    first = models[0]["tasks"]
    rows = [
        (task, metric)
        for task in first
        for metric in first[task]["metrics"]
        if metric in (first[task]["metric"], *SHOWN) or (metric.startswith("pass@") and "_" not in metric)
    ]
    wide = max(4, *(len(task) for task, _ in rows)) + 2
    columns = [max(20, len(model["model"]) + 2) for model in models]
    heads = "".join(f"{model['model']:>{width}}" for model, width in zip(models, columns, strict=True))
    yield f"{'task':{wide}}{'metric':14}{'items':>6}{heads}"
    for task, metric in rows:
        cells = ""
        for model, width in zip(models, columns, strict=True):
            metrics = model["tasks"][task]["metrics"]
            value, error = metrics[metric], metrics.get(f"{metric}_stderr")
            shown = f"{value:.4f}" if value < 1e4 else f"{value:.3g}"
            cells += f"{shown + ('' if error is None else f' ± {error:.4f}'):>{width}}"
        yield f"{task:{wide}}{metric:14}{first[task]['items']:>6}{cells}"
    for model in models:
        if "core" in model:
            yield f"{model['model']}: CORE {model['core']:.4f}"
        for task, summary in model["tasks"].items():
            if count := summary["truncated"]:
                yield f"{model['model']}, {task}: {counted(count, 'prompt')} truncated on the left to the context"
            if count := summary.get("unjudged"):
                yield f"{model['model']}, {task}: {counted(count, 'completion')} not judged, which counts as wrong"
            for name in ("in_training", "not_in_training"):
                if one := summary.get(name):
                    score = "" if one["score"] is None else f", {summary['metric']} {one['score']:.4f}"
                    yield f"{model['model']}, {task}: {counted(one['items'], 'item')} {name.replace('_', ' ')}{score}"
    for one in comparisons:
        verdict = "more than chance" if one["beyond_chance"] else "within chance"
        yield (
            f"{one['task']}: {one['models'][1]}, compared with {one['models'][0]}, is {one['difference']:+.4f} ± "
            f"{one['stderr']:.4f} (p = {one['p']:.2g}), {verdict}"
        )
