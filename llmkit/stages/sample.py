"""`llmkit sample`: generate text from one prompt or a stream of prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import (
    BackendConfig,
    CommonConfig,
    DecodingConfig,
    RecordsConfig,
    ServedConfig,
    ToolConfig,
    argument,
    as_options,
    lasting_options,
    option,
    parse_columns,
)
from llmkit.errors import UserError
from llmkit.io.files import check_output, check_unfinished
from llmkit.io.hub import is_model
from llmkit.io.jsonl import input_files, names_of, open_bytes, open_input, open_output, read_jsonl, read_text
from llmkit.io.progress import Progress, counted, say
from llmkit.io.records import BadRecords, Row
from llmkit.io.resume import STATE
from llmkit.io.run_folder import check_model_folder, uploaded

if TYPE_CHECKING:
    from llmkit.generation.prompts import Prompts
    from llmkit.generation.sampler import Sampler

KNOWN_OTHERWISE = ("MODEL", "INPUT...", "--limit")  # a resumed run compares the content of model and prompts instead
OURS, THEIRS = ("device", "dtype", "backend", "batch_size"), ("concurrency", "timeout")  # used here, used with a server


@dataclass(frozen=True, kw_only=True)
class SampleConfig(RecordsConfig, CommonConfig, DecodingConfig, BackendConfig, ToolConfig, ServedConfig):
    """Options of `llmkit sample`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit sample base/ -p "It was a dark and" -n 3 --max-tokens 60 --seed 7
          echo "Once upon a time" | llmkit sample base/ --temperature 0
          llmkit sample base/ --jsonl < prompts.jsonl > completions.jsonl
          llmkit sample base/ prompts.jsonl.gz --jsonl --stop "Question:" -o completions.jsonl
          llmkit sample --engine openai:http://localhost:8000/v1#qwen --jsonl prompts.jsonl -o completions.jsonl

        The prompt is -p, or all of stdin as plain text without its final newline; an empty prompt starts from the
        model's beginning-of-text token. The continuation goes to stdout; several get headings such as ==> 1/3 <==.

        --jsonl reads {"prompt", ...}, or {"messages"}, {"question"} ... for an assistant to answer, and adds
        completion, token_ids, finish_reason and seed, in input order; -n 3 writes three lines per record, with
        `sample` 0 to 2. A record may have its own seed. --resume keeps the records in OUT.state and generates the
        rest. --tools runs the model's tool calls and shows it the results.

        The same prompt and seed give the same text, whatever else is in the batch (exactly in float32 and int8 on
        a CPU); a repeated prompt gets another seed, which the output records.

        --engine openai:URL#NAME generates on an OpenAI-compatible server. With MODEL, its tokenizer and chat format
        make the prompts, sent as token ids; without, the server gets text and messages (docs/serving.md).
    """
    following: ClassVar[str] = "llmkit sample base/ --jsonl < prompts.jsonl | jq -r .completion"

    model: str | None = argument("Model folder, from llmkit or Hugging Face.", metavar="MODEL", default=None)
    inputs: tuple[str, ...] = argument("With --jsonl: prompt files, or - for stdin.", metavar="INPUT...")
    prompt: str | None = option(None, "Text to continue; with --chat: the first message.", short="-p")
    jsonl: bool = option(False, "Read prompts and write completions as JSONL.")
    chat: bool = option(False, "Chat on the terminal, or with one message per line of stdin.")
    system: str | None = option(None, "With --chat: the system message.")
    shots: str | None = option(
        None,
        "For base models: few-shot examples (prompt and completion), or built-in assistant ones.",
        metavar="FILE|assistant",
        free=True,
        reads=True,
    )

    resume: bool = option(False, "With --jsonl: resume a killed run.", free=True)
    logprobs: bool = option(
        False, "With --jsonl: log-probabilities of the tokens, before and after top-k, top-p and min-p."
    )

    samples: int = option(1, "Completions per prompt.", short="-n", group="Text", at_least=1, at_most=10**6)
    max_tokens: int | None = option(
        256, "Maximum tokens of a completion; none: up to the model's context.", group="Text", unit="count", at_least=1
    )
    stop: tuple[str, ...] = option((), "Stop sequence; repeatable.", group="Text", metavar="TEXT")
    temperature: float = option(0.8, "Sampling temperature; 0 is greedy.", group="Text", at_least=0, at_most=100)
    top_k: int | None = option(None, "Top-k sampling: number of most probable tokens.", group="Text", at_least=1)
    top_p: float | None = option(None, "Nucleus sampling: cumulative probability.", group="Text", above=0, at_most=1)
    min_p: float | None = option(
        None, "Min-p sampling: minimum probability, as a fraction of the highest.", group="Text", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        """With --engine, where MODEL is optional, treat a first argument that is not a model as an input."""
        super().__post_init__()
        if self.is_served and self.model is not None and not is_model(self.model):
            object.__setattr__(self, "inputs", (self.model, *self.inputs))
            object.__setattr__(self, "model", None)

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.chat and self.prompt is None and (not self.inputs or "-" in self.inputs)


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints when the text went to a file."""

    path: str
    prompts: int
    completions: int
    tokens: int
    seconds: float
    bad_records: int = 0
    not_used: dict[str, int] | None = None


@uploaded("out")
def run(config: SampleConfig) -> Summary | None:
    """Load, build, generate, summarise. Raises UserError for the user's mistakes."""
    out = config.out or "-"
    _check_options(config, out)
    if config.resume and Path(out).exists() and not Path(out + STATE).exists():
        say(f"{out}: already finished; to make it again, use --force without --resume", config.quiet)
        sizes = [len(row.value.get("token_ids", ())) for row in read_jsonl([out])]
        return Summary(out, len(sizes) // config.samples, len(sizes), sum(sizes), 0.0)

    # load
    from llmkit.generation.chat import Chat
    from llmkit.generation.prompts import Prompts, load_shots
    from llmkit.generation.terminal import converse

    with _sampler(config) as sampler:
        sampler.check()
        if config.dry_run:
            for line in [*sampler.plan(), _wanted(config)]:
                say(line, config.quiet)
            return None
        if config.chat:
            greedy = config.temperature == 0
            chat = Chat(sampler, system=config.system, max_tokens=config.max_tokens, seed=config.seed, greedy=greedy)
            converse(chat, config.prompt, config.quiet)
            return None

        # build
        bad = BadRecords(config.max_bad if config.jsonl else "0", config.quiet)
        shots = load_shots(config.shots, sampler, config.quiet)
        prompts = Prompts(
            _rows(config, bad),
            sampler,
            samples=config.samples,
            max_tokens=config.max_tokens,
            seed=config.seed,
            own_seeds=config.jsonl,
            shots=shots,
            bad=bad,
        )
        started = time.monotonic()

        # generate
        if config.jsonl:
            _write_records(prompts, config, out, {**sampler.identity, **_identity(config, shots)})
        else:
            _write_text(prompts, config, out)

        # summarise
        seconds = round(time.monotonic() - started, 3)
        for line in sampler.describe():
            say(line, config.quiet)
        if prompts.passed:
            say(f"{out}: kept the completions of {counted(prompts.passed, 'prompt')}", config.quiet)
        elif not prompts.count:
            say(f"{names_of(config.inputs or ['-'])}: no prompts, so no completions", config.quiet)
        if out == "-":
            return None
        done, tokens = prompts.passed + prompts.count, sampler.usage.completion_tokens + prompts.kept_tokens
        return Summary(out, done, done * config.samples, tokens, seconds, **prompts.left_out)


def _sampler(config: SampleConfig) -> AbstractContextManager[Sampler]:
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.prompts import STOP
    from llmkit.generation.sampler import open_sampler

    one_prompt = config.chat or config.prompt is not None or not config.jsonl
    return open_sampler(
        config.engine if config.is_served else str(config.model),
        Sampling(config.temperature, config.top_k, config.top_p, config.min_p),
        flag="--engine" if config.is_served else "MODEL",
        folder=config.model,
        device=config.device,
        dtype=config.dtype,
        backend=config.backend,
        slots=min(config.batch_size, config.samples) if one_prompt else config.batch_size,
        stop=(*config.stop, *([STOP] if config.shots else [])),
        tools=None if config.dry_run else config,
        end_at_others=config.chat,
        concurrency=config.concurrency,
        timeout=config.timeout,
        logprobs=config.logprobs,
    )


def _check_options(config: SampleConfig, out: str) -> None:
    if not config.is_served:
        check_model_folder(config.model, "llmkit sample base/ -p 'Once upon a time'")
    elif config.inputs and config.inputs[0] != "-" and not Path(config.inputs[0]).exists():
        raise UserError(f"{config.inputs[0]}: expected a model folder or an input file, found nothing")
    defaults = {item.name: item.default for item in fields(config)}
    for name in OURS if config.is_served else THEIRS:
        if getattr(config, name) != defaults[name]:
            where = "with --engine: the server decides" if config.is_served else "without --engine openai:URL#NAME"
            raise UserError(f"--{name.replace('_', '-')}: has no effect {where}")
    if config.is_served and config.max_tokens is None:
        raise UserError("--max-tokens none: expected a number with --engine")
    if config.inputs and not config.jsonl:
        raise UserError(f"{config.inputs[0]}: an input file needs --jsonl; give one prompt by -p or on stdin")
    if config.inputs and config.prompt is not None:
        raise UserError(f"-p and {config.inputs[0]}: expected one or the other, found both")
    if config.resume and (not config.jsonl or out == "-"):
        raise UserError("--resume: needs --jsonl and --out")
    if config.logprobs and not config.jsonl:
        raise UserError("--logprobs: needs --jsonl")
    if config.chat and (config.jsonl or config.inputs or config.out or config.shots):
        raise UserError("--chat: cannot be combined with files, --jsonl, --out or --shots; -p is its first message")
    if config.system is not None and not config.chat:
        raise UserError("--system: needs --chat; in JSONL, put a system message into the record's messages")
    input_files(config.inputs)
    if config.jsonl:
        check_unfinished(config.force, config.resume, out + STATE)
    check_output(out, config.force, config.resume, is_file=True)


def _wanted(config: SampleConfig) -> str:
    """Describe the requests in one line."""
    source = "--prompt" if config.prompt is not None else " ".join(config.inputs) or "stdin"
    shown = ("samples", "max_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "seed", "limit")
    options = ", ".join(f"{name} {value}" for name, value in as_options(config).items() if name in shown)
    return f"{'JSONL' if config.jsonl else 'one prompt'} from {source} to {config.out or 'stdout'}: {options}"


def _rows(config: SampleConfig, bad: BadRecords) -> Iterator[Row]:
    """Yield the records of the input; --prompt or plain text is one record, without a line number."""
    if config.prompt is not None:
        yield Row({"prompt": config.prompt}, "--prompt", 0)
    elif config.jsonl:
        yield from read_jsonl(
            input_files(config.inputs or ["-"]), config.limit, bad=bad, columns=parse_columns(config.columns)
        )
    else:
        with open_input("-") as handle:
            text = read_text(handle, "-")
        yield Row({"prompt": text.removesuffix("\n").removesuffix("\r")}, "stdin", 0)


def _identity(config: SampleConfig, shots: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the options that determine the text, for --resume; model and prompts are compared elsewhere."""
    shown = sha256(repr(list(shots)).encode()).hexdigest()[:16] if shots else None
    options = {name: value for name, value in lasting_options(config).items() if name not in KNOWN_OTHERWISE}
    return {"what is in --shots": shown} | options


def _write_records(prompts: Prompts, config: SampleConfig, out: str, identity: Mapping[str, Any]) -> None:
    from llmkit.generation.prompts import lasting_output

    lasting = out != "-" and (Path(out).is_file() or not Path(out).exists())  # not a pipe or device
    with ExitStack() as stack:
        if lasting:
            write_all = stack.enter_context(lasting_output(out, Path(out + STATE), prompts, config.resume, identity))
        else:
            write = stack.enter_context(open_output(out, config.force))
            write_all = lambda records: [write(record) for record in records]  # noqa: E731
        progress = stack.enter_context(Progress("sample", unit="tok", quiet=config.quiet))
        for done, records in enumerate(prompts.completed(logprobs=config.logprobs, tools=bool(config.tools)), 1):
            write_all(records)
            progress.advance(sum(len(record.get("token_ids", ())) for record in records), prompts=done)


def _write_text(prompts: Prompts, config: SampleConfig, out: str) -> None:
    with open_bytes(out) as handle:

        def write(text: str) -> None:
            handle.write(text.encode())
            handle.flush()

        streams = out == "-" and config.samples == 1 and sys.stdout.isatty()
        on_text = (lambda request, sample, text: write(text)) if streams else None
        (records,) = prompts.completed(on_text=on_text)
        if streams:
            write("\n")
            return
        for number, record in enumerate(records, 1):
            heading = f"==> {number}/{len(records)} <==\n" if len(records) > 1 else ""
            write(f"{'' if number == 1 or not heading else chr(10)}{heading}{record['completion']}\n")
