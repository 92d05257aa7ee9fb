"""`llmkit report`: show what every stage did on one page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import orjson

from llmkit.config import CommonConfig, argument, option
from llmkit.errors import UserError
from llmkit.io.files import check_output
from llmkit.io.jsonl import JSON_LINE, open_bytes
from llmkit.io.progress import counted, say


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommonConfig):
    """Options of `llmkit report`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit report docs.jsonl tok/ base/ chat/ judge/ policy/ -o report.html
          llmkit report runs/ probe-before.jsonl probe-after.jsonl -o report.html
          llmkit report base.partial/ -o now.html --force
          llmkit report seed1/chat seed2/chat --json | jq '.trainings[].charts[].lines[] | [.name, .label, .last]'

        RUN is the folder of a tokenizer, model or judge, finished or not; a folder of such folders; a file of
        documents, conversations or completions, or a probe's report, next to its manifest; evaluation.json;
        report.json.
    """
    following: ClassVar[str] = "llmkit report base/ --json | jq .runs"

    runs: tuple[str, ...] = argument("Run folders, and output files of stages.", metavar="RUN...")
    title: str = option("What every stage did", "Heading of the page.")
    records: int = option(40, "Records to show from each file.", at_least=2, at_most=100_000)
    json: bool = option(False, "Figures as one JSON object instead of the page.")
    seed: None = None  # no --seed: nothing is random

    def reads_stdin(self) -> bool:
        """True if help is wanted: without a run there is nothing to do."""
        return not self.runs


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints: the number of `runs` given, and `notes` on what was left out."""

    path: str
    bytes: int
    runs: int
    notes: list[str]


def run(config: ReportConfig) -> Summary | None:
    """Load, build, save, summarise. Raises UserError for the user's mistakes."""
    from llmkit.report.figures import given_runs, report_figures
    from llmkit.report.runs import gather

    # load
    out = _checked(config)
    gathered = gather(config.runs)
    if config.dry_run:
        runs = counted(sum(run.state != "foreign" for run in gathered.runs), "run")
        for note in (f"{runs} and {counted(len(gathered.files), 'file')} of records to {out}", *gathered.notes):
            say(note, config.quiet)
        return None

    # build
    figures = report_figures(gathered, samples=config.records, limit=config.limit)
    if config.json:
        page = orjson.dumps(figures, option=JSON_LINE)
    else:
        from llmkit.report.page import render_page

        page, figures = render_page(figures, config.title)

    # save
    with open_bytes(out) as handle:
        handle.write(page)

    # summarise
    notes = figures["notes"]
    for note in notes[:5]:
        say(note, config.quiet)
    if len(notes) > 5:
        say(f"on the page: {counted(len(notes) - 5, 'more note')}", config.quiet)
    return None if out == "-" else Summary(out, len(page), len(given_runs(figures)), notes)


def _checked(config: ReportConfig) -> str:
    """Check the options before any work; return the output path."""
    if not config.runs:
        raise UserError("RUN is missing: run folders and files, such as llmkit report tok/ base/ chat/ -o report.html")
    if config.out is None and not config.json:
        raise UserError("--out is required: the page, such as -o report.html")
    if config.json and config.title != ReportConfig.title:
        raise UserError("--title: has no effect with --json; it is the heading of the page")
    out = config.out or "-"
    if out.lower().endswith(".parquet") or os.path.realpath(out) in map(os.path.realpath, config.runs):
        raise UserError(f"{out}: expected a new file for the page, such as report.html")
    check_output(out, config.force, is_file=True)
    return out
