"""`llmkit write-chats`: generate conversations with a model that follows labelling instructions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import (
    CommonConfig,
    DecodingConfig,
    RecordsConfig,
    ToolConfig,
    as_options,
    lasting_options,
    option,
    parse_columns,
)
from llmkit.errors import UserError
from llmkit.formats.conversations import CALL, TOOLS, as_record, find_prompt, read_messages
from llmkit.formats.problems import read_problem
from llmkit.io.jsonl import (
    dump_json,
    input_files,
    names_of,
    open_input,
    open_output,
    read_documents,
    read_jsonl,
    read_text,
)
from llmkit.io.manifest import read_manifest, write_manifest
from llmkit.io.progress import counted, say
from llmkit.io.records import BadRecords, Row
from llmkit.io.resume import STATE, Kept
from llmkit.io.run_folder import check_files, uploaded

if TYPE_CHECKING:
    from llmkit.generation.sampler import Sampler
    from llmkit.writing.judge import Judge
    from llmkit.writing.selection import Selection
    from llmkit.writing.writer import Source, Writer

SOURCES = ("topics", "seeds", "documents", "answer")
DEFAULT = 100  # conversations
MOST_PASSAGES = 20_000  # of --documents
HASHED = 16  # digits of a hash


@dataclass(frozen=True, kw_only=True)
class WriteChatsConfig(RecordsConfig, CommonConfig, DecodingConfig, ToolConfig):
    """Options of `llmkit write-chats`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit write-chats --guide guide.md --topics topics.txt --writer openai:http://localhost:8000/v1#qwen \\
            -n 20000 -o chats.jsonl
          llmkit write-chats --guide guide.md --seeds seed_tasks.jsonl --writer assistant/ --judge judge/ \\
            --not-in eval.jsonl -n 1000 -o chats.jsonl
          llmkit write-chats --guide guide.md --answer prompts.jsonl --writer assistant/ --samples 4 --judge judge/ \\
            --pairs prefs.jsonl -o chats.jsonl

        The writer has the guide in its context. Prompts come from topics (one per line; the writer expands them into
        subtopics, people and tasks), seed tasks (few-shot examples for new ones), documents (questions that they
        answer), or --answer. The run ends when -n conversations are kept; dropped drafts are counted by reason. A
        killed run continues with --resume and ends with the same lines. More: docs/write-chats.md.
    """
    following: ClassVar[str] = "llmkit sft base/ --data chats.jsonl -o chat/"

    guide: str | None = option(None, "Labelling instructions as a text file.", metavar="FILE", reads=True)
    topics: tuple[str, ...] = option((), "Topics to write about, one per line; repeatable.", metavar="FILE", reads=True)
    seeds: tuple[str, ...] = option((), "Seed tasks, examples for new ones; repeatable.", metavar="FILE", reads=True)
    documents: tuple[str, ...] = option((), "Documents to ask questions about; repeatable.", metavar="FILE", reads=True)
    answer: tuple[str, ...] = option((), "Prompts to answer; repeatable.", metavar="FILE", reads=True)
    writer: str | None = option(
        None, "Model that writes both sides.", metavar="MODEL|openai:URL#NAME", reads=True, free=True
    )
    conversations: int | None = option(
        None, "Conversations to keep [100; all prompts of --answer].", short="-n", unit="count", at_least=1, free=True
    )
    budget: str | None = option(
        None,
        "Token limit, or money limit with prices per million input and output tokens.",
        metavar="TOKENS|MONEY@IN,OUT",
        free=True,
    )
    concurrency: int = option(8, "Concurrent server requests.", group="Servers", at_least=1, at_most=999, free=True)
    timeout: float = option(120, "Timeout of a server request.", group="Servers", unit="duration", above=0, free=True)
    resume: bool = option(False, "Resume a killed run.", free=True)

    turns: int = option(1, "Maximum user messages per conversation.", group="Text", at_least=1, at_most=100)
    mix: tuple[str, ...] = option(
        (),
        "Shares of conversations with the guide in the assistant's context [1], a system message [0.2], thinking "
        "before answers [0], tools [1], and a request to be refused [0].",
        group="Text",
        metavar="guide|system|thinking|tools|refusals=SHARE,...",
    )
    language: tuple[str, ...] = option(
        (), "Languages of the conversations [the writer's choice].", group="Text", metavar="en[,de]"
    )
    samples: int = option(1, "Answers sampled for the last message; the best is kept.", group="Text", at_least=1)
    max_tokens: int | None = option(1024, "Maximum tokens of a message.", group="Text", unit="count", at_least=1)
    temperature: float = option(1.0, "Sampling temperature.", group="Text", at_least=0, at_most=100)

    judge: str | None = option(
        None,
        "Judge of drafts: a reward model or an assistant.",
        group="Keep",
        metavar="MODEL|openai:URL#NAME",
        reads=True,
        free=True,
    )
    fail_below: float | None = option(None, "Minimum score from the judge.", group="Keep")
    not_in: tuple[str, ...] = option(
        (), "Evaluation items that no conversation may contain; repeatable.", group="Keep", metavar="FILE", reads=True
    )
    pairs: str | None = option(
        None, "Output file for preferences: the best and the worst answer.", group="Keep", metavar="FILE", free=True
    )

    def reads_stdin(self) -> bool:
        """True if help is wanted: without a guide there is nothing to do."""
        return self.guide is None


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints. `dropped` counts drafts by reason."""

    path: str
    conversations: int | None = None
    drafts: int | None = None
    dropped: dict[str, int] | None = None
    pairs: int | None = None
    diversity: dict[str, Any] | None = None
    tokens: dict[str, int] | None = None
    bad_records: int | None = None
    not_used: dict[str, int] | None = None
    seconds: float | None = None


@uploaded("out", "pairs")
def run(config: WriteChatsConfig) -> Summary | None:
    """Load, write, save, summarise. Raises UserError for the user's mistakes."""
    started, out = time.monotonic(), config.out or "-"
    guide, shares, languages = _checked(config)
    results = check_files(config, "write-chats", "pairs", also=("--conversations",))
    if results is not None:
        _check_models(config, out)
        return Summary(out, **{name: results.get(name) for name in ("conversations", "drafts", "pairs")})

    # load
    from llmkit.writing.keep import Keeper
    from llmkit.writing.selection import Budget, Selection
    from llmkit.writing.writer import Writer

    budget = None if config.budget is None else Budget(config.budget)
    bad = BadRecords(config.max_bad, config.quiet)
    source, inputs_hash = _source(config, bad)
    with ExitStack() as stack:
        sampler = _sampler(config, stack, "--writer", config.writer, config.temperature)
        _ = sampler.chat  # refuses base models
        writer = Writer(
            sampler,
            source,
            guide.strip(),
            seed=config.seed,
            shares=shares,
            languages=languages,
            turns=config.turns,
            samples=config.samples,
            max_tokens=config.max_tokens,
        )
        _check_context(writer, shares)
        judge = _judge(config, guide, stack)
        keeper = Keeper(config.not_in, config.fail_below, sandbox=config.sandbox != "none", quiet=config.quiet)
        stack.callback(keeper.close)
        if config.dry_run:
            prompt = writer.first_request(0).prompt
            for line in [*sampler.plan(), *(f"{message.role}: {message.text}" for message in prompt)]:
                say(line, config.quiet)
            return None

        # write
        names = {"guide": _hash(guide), "writer": sampler.name, **({"judge": judge.name} if judge else {})}
        identity = {"the guide": names["guide"], "the inputs": inputs_hash, **sampler.identity}
        identity |= {} if judge is None else {f"the judge: {name}": value for name, value in judge.identity.items()}
        state = Kept(
            Path(out + STATE) if out != "-" else None, {**lasting_options(config), **identity}, resume=config.resume
        )
        stack.enter_context(state.resumable())
        wanted = config.conversations or (None if config.answer else DEFAULT)
        selection = Selection(writer, keeper, judge, state, wanted=wanted, budget=budget, quiet=config.quiet)
        selection.write()

        # save and summarise
        summary = _save(config, selection, names, {**keeper.figures(), **bad.results}, started)
        for line in [*sampler.describe(), *selection.describe()]:
            say(line, config.quiet)
        state.remove()
    return None if out == "-" else summary


def _save(
    config: WriteChatsConfig, selection: Selection, names: Mapping[str, Any], figures: Mapping[str, Any], started: float
) -> Summary:
    """Write the pairs and the conversations, each with a manifest."""
    functions, out, total = selection.writer.sampler.tools, config.out or "-", len(selection.indices)
    schemas = [] if functions is None else [tool for tool in functions.schemas if tool["function"]["name"] not in TOOLS]
    pairs, replaces = None if config.pairs is None else 0, config.force or config.resume
    with ExitStack() as outputs:  # both files appear together
        write = outputs.enter_context(open_output(out, replaces))
        write_pair = None if config.pairs is None else outputs.enter_context(open_output(config.pairs, replaces))
        for best, worst, end in selection.kept():
            fields = {**names, **{name: end[name] for name in ("scores", "why") if end.get(name)}}
            if any(part.kind == CALL for turn in best.messages for part in turn.parts):
                fields["tools"] = schemas
            write(best.as_line(**fields))
            if write_pair is not None and pairs is not None and worst is not None:
                chosen, rejected = (as_record(side.messages[-1:]) for side in (best, worst))
                write_pair({"prompt": as_record(best.messages[:-1]), "chosen": chosen, "rejected": rejected})
                pairs += 1
    if pairs is not None and (alike := total - pairs):
        reason = "the answers are equally good, or only one is kept"
        say(f"{alike:,} of {counted(total, 'conversation')} gave no pair: {reason}", config.quiet)
    results = {"conversations": total, "drafts": selection.decided, "pairs": pairs}
    inputs = input_files([str(config.guide), *config.topics, *config.documents], text=True)
    inputs += input_files([*config.seeds, *config.answer, *config.not_in])
    parents = [path for path in (config.writer, config.judge) if path and Path(path).is_dir()]
    for path in [path for path in (config.pairs, out) if path and Path(path).is_file()]:
        write_manifest(
            path,
            "write-chats",
            as_options(config),
            inputs=inputs,
            parents=parents,
            results={**results, **figures},
            not_in=config.not_in,
        )
    return Summary(
        out,
        **results,
        dropped=dict(selection.dropped.most_common()),
        diversity={**figures["diversity"], "by_topic": len(figures["diversity"]["by_topic"])},
        tokens={"in": selection.spent[1], "out": selection.spent[2]},
        bad_records=figures.get("bad_records"),
        not_used=figures.get("not_used"),
        seconds=round(time.monotonic() - started, 3),
    )


# ---- options


def _checked(config: WriteChatsConfig) -> tuple[str, dict[str, float], tuple[str, ...]]:
    """Check the options before any work; return the guide, the shares of --mix, and the languages."""
    if config.guide is None:
        raise UserError("--guide: expected a file of labelling instructions, found none; see --help")
    given = [f"--{name}" for name in SOURCES if getattr(config, name)]
    if len(given) != 1:
        names = " and ".join(given) or "none"
        raise UserError(f"expected one of --topics, --seeds, --documents and --answer, found {names}")
    if config.writer is None:
        raise UserError("--writer: expected a model's folder or openai:URL#NAME, found none")
    if config.answer and (config.turns > 1 or config.language):
        flag = "--turns" if config.turns > 1 else "--language"
        raise UserError(f"{flag}: has no effect with --answer, which gives the prompts")
    if config.documents and config.language:
        raise UserError("--language: has no effect with --documents, whose language the questions have")
    if config.topics and config.columns:
        raise UserError("--columns: has no effect with --topics, whose lines have no fields")
    languages = tuple(name.strip() for text in config.language for name in text.split(",") if name.strip())
    if languages:
        from llmkit.text.language import check_languages

        check_languages(languages, "without --language the writer chooses")
    if config.fail_below is not None and config.judge is None:
        raise UserError("--fail-below: needs --judge, for its scores")
    if config.pairs is not None and config.samples < 2:
        raise UserError("--pairs: needs --samples 2 or more, for a best and a worst answer")
    if config.samples > 1 and config.judge is None and not config.answer:
        raise UserError("--samples: needs --judge, or --answer with reference answers, to find the best")
    shares = _parse_mix(config)
    input_files([*config.seeds, *config.answer, *config.not_in])
    input_files([*config.topics, *config.documents], text=True)
    with open_input(config.guide) as handle:
        guide = read_text(handle, config.guide)
    if not guide.strip():
        raise UserError(f"{config.guide}: expected labelling instructions, found an empty file")
    return guide, shares, languages


def _check_models(config: WriteChatsConfig, out: str) -> None:
    """Raise UserError if a finished run had another writer or judge."""
    former = (read_manifest(out) or {}).get("options") or {}
    for name in ("writer", "judge"):  # a server's address may change, its model may not
        before, now = former.get(name), getattr(config, name)
        if (before or "").rpartition("#")[2].rstrip("/") != (now or "").rpartition("#")[2].rstrip("/"):
            raise UserError(f"{out}: finished with --{name} {before or 'none'}; another starts over with --force")


def _parse_mix(config: WriteChatsConfig) -> dict[str, float]:
    from llmkit.writing.writer import SHARES

    useless: dict[str, str] = {}
    if config.answer:
        useless = dict.fromkeys(("system", "refusals"), "--answer, which gives the prompts")
    elif config.documents:
        useless = {"refusals": "--documents, which answer their questions"}
    shares = {}
    for pair in (pair.strip() for text in config.mix for pair in text.split(",")):
        name, _, share = pair.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = -1.0
        if name not in SHARES or not 0 <= shares[name] <= 1:
            raise UserError(f"--mix: expected NAME=SHARE, such as thinking=0.3, of {', '.join(SHARES)}, found {pair!r}")
        if name == "tools" and not config.tools:
            raise UserError("--mix tools: needs --tools")
        if name in useless:
            raise UserError(f"--mix {name}: has no effect with {useless[name]}")
    return shares


def _source(config: WriteChatsConfig, bad: BadRecords) -> tuple[Source, str]:
    """Return the source of prompts, and a hash of its content. Raises UserError if it is empty."""
    from llmkit.writing.selection import WINDOW
    from llmkit.writing.sources import Documents, Prompts, Seeds, Topics

    columns = parse_columns(config.columns)
    if config.topics:
        lines: list[str] = []
        for file in input_files(config.topics, text=True):
            with open_input(file) as handle:
                lines += read_text(handle, file).splitlines()
        topics = list(dict.fromkeys(topic for line in lines if (topic := " ".join(line.split()))))[: config.limit]
        if not topics:
            raise UserError(f"{names_of(config.topics)}: expected topics, one per line, found none")
        return Topics(topics), _hash(topics)
    if config.seeds:
        tasks = list(dict.fromkeys(read_jsonl(input_files(config.seeds), config.limit, _first_message, bad, columns)))
        if not tasks:
            raise UserError(f"{names_of(config.seeds)}: expected tasks, found none")
        return Seeds(tasks, WINDOW), _hash(tasks)
    if config.documents:
        from llmkit.probing.question_rules import sample_passages

        documents = read_documents(input_files(config.documents, text=True), config.limit, bad, columns)
        passages = sample_passages(documents, MOST_PASSAGES, config.seed)
        if not passages:
            raise UserError(f"{names_of(config.documents)}: expected documents with text to ask about, found none")
        return Documents(passages), _hash([passage.text for passage in passages])
    from llmkit.rewards.verifiers import check_name

    problems = list(read_jsonl(input_files(config.answer), config.limit, read_problem, bad, columns))
    if not problems:
        raise UserError(f"{names_of(config.answer)}: expected prompts, found none")
    for problem in problems:
        if problem.verifier is not None:  # else chosen by the answer, after the first draft
            check_name(problem.verifier, f"{problem.where}, 'verifier'")
    return Prompts(problems), _hash([problem.record for problem in problems])


def _first_message(row: Row) -> str:
    """Return the task of a record: the first user message."""
    prompt = find_prompt(row)
    messages = () if prompt is None else read_messages(row, prompt.entries)
    text = next((message.text.strip() for message in messages if message.role == "user"), "")
    if not text:
        raise UserError(f"{row.where}: expected a task, such as 'instruction', found {sorted(row.value)}")
    return text


def _sampler(config: WriteChatsConfig, stack: ExitStack, flag: str, source: str | None, temperature: float) -> Sampler:
    """Open the writer, with the tools, or the judge, and see that it answers unless the run is dry."""
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.sampler import open_sampler

    opened = open_sampler(
        str(source),
        Sampling(temperature),
        flag=flag,
        device=config.device,
        dtype=config.dtype,
        slots=config.batch_size,
        tools=config if flag == "--writer" and not config.dry_run else None,
        end_at_others=flag == "--writer",  # the text after a call of an unknown tool is not an answer
        concurrency=config.concurrency,
        timeout=config.timeout,
        skip_refused=flag == "--writer",
    )
    sampler = stack.enter_context(opened)
    if not config.dry_run:
        sampler.check()
    return sampler


def _judge(config: WriteChatsConfig, guide: str, stack: ExitStack) -> Judge | None:
    """Open the judge: a reward model, or an assistant that reads the guide."""
    if config.judge is None:
        return None
    from llmkit.probing.judges import TEMPERATURE, ChatModel
    from llmkit.writing.judge import Judge, RewardJudge

    described = Path(config.judge, "config.json")
    if described.is_file() and "ForSequenceClassification" in described.read_text(errors="replace"):
        return RewardJudge(config.judge, config.device, config.dtype)
    return Judge(ChatModel(_sampler(config, stack, "--judge", config.judge, TEMPERATURE), config.seed), guide)


def _check_context(writer: Writer, shares: Mapping[str, float]) -> None:
    """Raise UserError if no first request fits the writer's context: every draft would be dropped."""
    from llmkit.writing.selection import USELESS

    sampler, lengths = writer.sampler, list[int]()
    if sampler.context is None:
        return
    for index in range(min(writer.source.count or USELESS, USELESS)):
        request = writer.first_request(index)
        lengths.append(len(sampler.encode(request.prompt, request.tools)))
        if lengths[-1] < sampler.context:
            return
    without = ", or leave it out with --mix guide=0" if writer.source.is_given and shares.get("guide", 1) else ""
    raise UserError(
        f"--writer {sampler.name}: expected room for the guide and a prompt, at least "
        f"{counted(min(lengths), 'token')}, found a context of {sampler.context:,}; use a "
        f"writer with a longer context, or a shorter guide{without}"
    )


def _hash(value: Any) -> str:
    return blake2b(dump_json({"of": value}), digest_size=HASHED // 2).hexdigest()
