"""`llmkit sample`: text from a model, from one prompt or from a stream of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import (
    CommonConfig,
    RecordsConfig,
    ServedConfig,
    ToolConfig,
    argument,
    as_options,
    lasting_options,
    option,
)
from llmkit.errors import UserError
from llmkit.formats.conversations import Message
from llmkit.io.files import PARTIAL, check_output, check_unfinished
from llmkit.io.jsonl import names_of, open_bytes, open_input, open_output, read_jsonl, read_text
from llmkit.io.progress import Progress, counted, quantity, say
from llmkit.io.records import BadRecords, Row
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from llmkit.generation.generator import Generator
    from llmkit.generation.prompts import Prompts
    from llmkit.generation.served_sampler import ServedSampler
    from llmkit.model.config import ModelConfig
    from llmkit.model.devices import Precision

STARTED = time.monotonic()
KNOWN_OTHERWISE = ("MODEL", "INPUT...", "--limit")  # a resumed run compares the model's content, and its prompts
OURS, THEIRS = ("device", "dtype", "batch_size", "tools"), ("concurrency", "timeout", "retries")  # here, on a server


@dataclass(frozen=True, kw_only=True)
class SampleConfig(RecordsConfig, CommonConfig, ToolConfig, ServedConfig):
    """Options of `llmkit sample`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit sample base/ -p "It was a dark and" -n 3 --max-tokens 60 --seed 7
          echo "Once upon a time" | llmkit sample base/ --temperature 0
          llmkit sample base/ --jsonl < prompts.jsonl > completions.jsonl
          llmkit sample base/ prompts.jsonl.gz --jsonl --stop "Question:" -o completions.jsonl
          llmkit sample --engine openai:http://localhost:8000/v1#qwen --jsonl prompts.jsonl -o completions.jsonl

        The prompt is -p, or all of stdin as plain text without its final newline; an empty prompt starts from the
        model's beginning token. The continuation goes to stdout; several have headings such as ==> 1/3 <==.
        --jsonl reads {"prompt", ...}, or {"messages"}, {"question"} ... for the assistant to answer, adds completion,
        token_ids, finish_reason and seed, in the order of the input; -n 3 writes three lines per record, with
        `sample` 0 to 2. A record may have its own seed. --resume keeps the whole records of OUT.partial and makes the
        rest. --tools runs the tool calls that the model writes, and shows it the results.
        The same prompt and seed give the same text, whatever else is in the batch (exactly so in float32 and int8 on
        a CPU); a repeated prompt gets another seed, which the output names.
        --engine openai:URL#NAME: an OpenAI-compatible server generates. With MODEL, prompts are made here, as token
        ids, by its tokenizer and chat format; without, the server gets text and messages (docs/serving.md).
    """
    following: ClassVar[str] = "llmkit sample base/ --jsonl < prompts.jsonl | jq -r .completion"

    model: str | None = argument("Model folder: from llmkit, or a Hugging Face one.", metavar="MODEL", default=None)
    inputs: tuple[str, ...] = argument("With --jsonl: files of prompts, or - for stdin.", metavar="INPUT...")
    prompt: str | None = option(None, "Text to continue.", short="-p")
    jsonl: bool = option(False, "JSONL records as prompts and completions.")
    chat: bool = option(False, "Conversation on the terminal, or with a turn on each line of stdin.")
    system: str | None = option(None, "With --chat: the system message.")
    shots: str | None = option(
        None,
        "For base models: few-shot examples (prompt and completion).",
        metavar="FILE",
        free=True,
        reads=True,
    )
    as_assistant: bool = option(False, "For base models: built-in few-shot examples of an assistant.")
    device: str = option("auto", "Compute device.", choices=("auto", "cpu", "cuda", "mps"), free=True)
    dtype: str = option(
        "auto",
        "Precision; auto: bfloat16 on GPUs, else float32; int8: on CPUs.",
        choices=("auto", "float32", "bfloat16", "int8"),
        free=True,
    )
    batch_size: int = option(16, "Sequences decoded at a time.", at_least=1, at_most=4096, free=True)

    unordered: bool = option(False, "With --jsonl: records in the order of completion.", free=True)
    resume: bool = option(False, "With --jsonl: resume a killed run.", free=True)
    logprobs: bool = option(False, "With --jsonl: log-probabilities of the tokens, before and after truncation.")

    samples: int = option(1, "Completions per prompt.", short="-n", group="Text", at_least=1, at_most=10**6)
    max_tokens: int | None = option(
        256, "Tokens of a continuation; none: up to the model's context.", group="Text", unit="count", at_least=1
    )
    stop: tuple[str, ...] = option((), "Stop string; repeatable.", group="Text", metavar="TEXT")
    temperature: float = option(0.8, "Sampling temperature; 0 is greedy.", group="Text", at_least=0, at_most=100)
    top_k: int | None = option(None, "Top-k sampling: number of likeliest tokens.", group="Text", at_least=1)
    top_p: float | None = option(None, "Nucleus sampling: cumulative probability.", group="Text", above=0, at_most=1)
    min_p: float | None = option(
        None, "Least probability of a token, as a fraction of the likeliest one's.", group="Text", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        """Take a first argument that is no folder for an input where a server generates: MODEL may be left out then."""
        super().__post_init__()
        if self.is_served and self.model is not None and not Path(self.model).is_dir():
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


def run(config: SampleConfig) -> Summary | None:
    """Load, build, generate, summarise. Raises UserError for the user's mistakes."""
    out = config.out or "-"
    _check_options(config, out)
    if config.resume and Path(out).exists() and not Path(out + PARTIAL).exists():
        say(f"{out}: finished, so there is nothing to do; without --resume, --force makes it again", config.quiet)
        sizes = [len(row.value.get("token_ids", ())) for row in read_jsonl([out])]
        return Summary(out, len(sizes) // config.samples, len(sizes), sum(sizes), 0.0)
    return _run_served(config, out) if config.is_served else _run_here(config, str(config.model), out)


def _run_here(config: SampleConfig, model: str, out: str) -> Summary | None:
    # load
    from llmkit.generation.chat import Chat
    from llmkit.generation.generator import describe_throughput, prompt_ids
    from llmkit.generation.loaded_model import open_model
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.prompts import STOP, Prompts, fitting_shots, load_shots, with_shots
    from llmkit.generation.terminal import converse
    from llmkit.generation.tool_calls import open_tools, told_unavailable
    from llmkit.io.resume import fingerprint

    opened = open_model(model, config.device, config.dtype)
    tokenizer = opened.tokenizer
    if config.dry_run:
        for line in _plan(config, model, opened.config, opened.precision, str(opened.device)):
            say(line, config.quiet)
        return None
    shots = load_shots(config.shots, config.as_assistant)
    with opened.computing(), ExitStack() as stack:
        # build
        tools = open_tools(config, tokenizer, stack, opened.end_ids, end_at_others=config.chat)
        sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
        stop = (*config.stop, *([STOP] if shots else []))
        generator = opened.generator(sampling, _slots(config), stop=stop, tools=tools)

        def encode_messages(messages: Sequence[Message]) -> list[int]:
            return opened.chat.encode(messages, prompt=True).token_ids.tolist()

        if config.chat:
            chat = Chat(
                generator,
                opened.chat,
                context=opened.config.max_position_embeddings,
                system=config.system,
                max_tokens=config.max_tokens,
                seed=config.seed,
                tools=tools,
                greedy=config.temperature == 0,
            )
            converse(chat, config.prompt, config.quiet)
            return None

        def encode(text: str) -> list[int]:
            return prompt_ids(tokenizer, with_shots(shots, text) if shots else text)

        context = opened.config.max_position_embeddings
        if config.as_assistant:
            shots = fitting_shots(partial(prompt_ids, tokenizer), context, config.quiet)
        bad = BadRecords(config.max_bad if config.jsonl else "0", config.quiet)
        details = {"context": context, "shots": len(shots), "unknown": tokenizer.unk_id, "bad": bad, **_asked(config)}
        details["is_assistant"] = lambda: not shots and opened.is_assistant
        prompts = Prompts(_rows(config, bad), encode, encode_messages, **details)
        loaded = time.monotonic()

        # generate
        identity = {"the model": fingerprint(model), "the precision": opened.precision.name}
        _write(generator, prompts, config, out, identity | _identity(config, shots))

    # summarise
    seconds = time.monotonic() - loaded
    for line in told_unavailable([tools.unavailable_calls] if tools else []):
        say(line, config.quiet)
    if not config.quiet:
        say(f"{describe_throughput(generator, seconds)}, after {loaded - STARTED:.1f} s of loading")
    return _summary(config, prompts, out, generator.tokens, seconds)


def _run_served(config: SampleConfig, out: str) -> Summary | None:
    # load
    from llmkit.generation.chat import Chat
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.prompts import STOP, Prompts, load_shots, with_shots
    from llmkit.generation.served_sampler import open_served
    from llmkit.generation.terminal import converse

    served = open_served(config.engine, config.model, timeout=config.timeout, retries=config.retries)
    served.server.check()
    shots = load_shots(config.shots, config.as_assistant)
    if config.dry_run:
        prompts_as = "text and messages" if config.model is None else f"token ids of {config.model}"
        say(
            f"{config.engine}: it answers; prompts go to it as {prompts_as}, {config.concurrency} at a time",
            config.quiet,
        )
        say(_wanted(config), config.quiet)
        return None

    # build
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
    stop = (*config.stop, *([STOP] if shots else []))
    sampler = served.sampler(sampling, concurrency=config.concurrency, stop=stop, logprobs=config.logprobs)
    if config.chat:
        chat = Chat(
            sampler,
            served.chat,
            context=None,
            system=config.system,
            max_tokens=config.max_tokens,
            seed=config.seed,
            greedy=config.temperature == 0,
        )
        converse(chat, config.prompt, config.quiet)
        return None

    def encode(text: str) -> Sequence[Any]:
        return served.encode(with_shots(shots, text) if shots else text)

    bad = BadRecords(config.max_bad if config.jsonl else "0", config.quiet)
    details = {"is_assistant": lambda: not shots and served.is_assistant, "bad": bad, **_asked(config)}
    prompts = Prompts(_rows(config, bad), encode, served.encode_messages, **details)
    started = time.monotonic()

    # generate
    _write(sampler, prompts, config, out, served.identity | _identity(config, shots))

    # summarise
    seconds = time.monotonic() - started
    say(f"{served.server.address.name}: {served.server.usage}, in {seconds:.1f} s", config.quiet)
    return _summary(config, prompts, out, served.server.usage.completion_tokens, seconds)


def _asked(config: SampleConfig) -> dict[str, Any]:
    """Collect the options that all requests share, for `Prompts`."""
    return {"samples": config.samples, "max_tokens": config.max_tokens, "seed": config.seed, "own_seeds": config.jsonl}


def _summary(config: SampleConfig, prompts: Prompts, out: str, tokens: int, seconds: float) -> Summary | None:
    if prompts.passed:
        say(f"{out}: kept the completions of {counted(prompts.passed, 'prompt')}", config.quiet)
    elif not prompts.count:
        say(f"{names_of(config.inputs or ['-'])}: no prompts, so no completions", config.quiet)
    if out == "-":
        return None
    done = prompts.passed + prompts.count
    tokens += prompts.kept_tokens
    return Summary(out, done, done * config.samples, tokens, round(seconds, 3), **prompts.left_out)


def _check_options(config: SampleConfig, out: str) -> None:
    if not config.is_served:
        check_model_folder(config.model, "llmkit sample base/ -p 'Once upon a time'")
    elif config.inputs and config.inputs[0] != "-" and not Path(config.inputs[0]).exists():
        raise UserError(f"{config.inputs[0]}: expected a model folder or an input file, found nothing")
    defaults = {item.name: item.default for item in fields(config)}
    for name in OURS if config.is_served else THEIRS:
        if getattr(config, name) != defaults[name]:
            where = "beside --engine: it is the server's" if config.is_served else "without --engine openai:URL#NAME"
            raise UserError(f"--{name.replace('_', '-')}: has no effect {where}")
    if config.is_served and config.max_tokens is None:
        raise UserError("--max-tokens none: expected a number beside --engine, as servers do")
    if config.inputs and not config.jsonl:
        raise UserError(f"{config.inputs[0]}: an input file needs --jsonl; give one prompt by -p or on stdin")
    if config.inputs and config.prompt is not None:
        raise UserError(f"-p and {config.inputs[0]}: expected one or the other, found both")
    if config.resume and (not config.jsonl or out == "-"):
        raise UserError("--resume: expected --jsonl and --out, whose unfinished file is gone on with")
    if config.shots is not None and config.as_assistant:
        raise UserError("--shots and --as-assistant: expected one or the other, found both")
    if config.logprobs and not config.jsonl:
        raise UserError("--logprobs: expected --jsonl beside it")
    if config.chat and (config.jsonl or config.inputs or config.out or config.shots or config.as_assistant):
        raise UserError(
            "--chat: expected neither files, --jsonl, --out nor examples beside it; -p is its first message"
        )
    if config.system is not None and not config.chat:
        raise UserError("--system: expected --chat; in JSONL, put a system message into the record's messages")
    if config.unordered and not config.jsonl:
        raise UserError("--unordered: expected --jsonl beside it")
    check_output(out, config.force, config.resume)
    if config.jsonl and not config.dry_run:
        check_unfinished(config.force, config.resume, out + PARTIAL)


def _slots(config: SampleConfig) -> int:
    one_prompt = config.chat or config.prompt is not None or not config.jsonl
    return min(config.batch_size, config.samples) if one_prompt else config.batch_size


def _plan(config: SampleConfig, folder: str, model: ModelConfig, precision: Precision, device: str) -> Iterator[str]:
    """Yield the lines of `--dry-run`."""
    size = precision.dtype.itemsize
    packed = {"dense": size, "half": 2, "int8": 1}[precision.weights]
    slots = _slots(config)
    a_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * size
    context, count = model.max_position_embeddings, model.parameter_count
    yield (
        f"{folder}: {model.model_type}, {quantity(count)} parameters, context {context}, {precision.name} on {device}"
    )
    loading = f", {quantity(count * size)}B more while loading" if device == "cpu" else ""
    yield (
        f"memory: {quantity(count * packed)}B of weights{loading}, and up to "
        f"{quantity(slots * context * a_token)}B of keys and values for {counted(slots, 'sequence')}"
    )
    yield _wanted(config)


def _wanted(config: SampleConfig) -> str:
    """Describe the requests in one line."""
    source = "--prompt" if config.prompt is not None else " ".join(config.inputs) or "stdin"
    kept = ("samples", "max_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "seed", "limit")
    options = ", ".join(f"{name} {value}" for name, value in as_options(config).items() if name in kept)
    return f"{'JSONL' if config.jsonl else 'one prompt'} from {source} to {config.out or 'stdout'}: {options}"


def _rows(config: SampleConfig, bad: BadRecords) -> Iterator[Row]:
    """The records of the input; one without a line where it is --prompt or plain text."""
    if config.prompt is not None:
        yield Row({"prompt": config.prompt}, "--prompt", 0)
    elif config.jsonl:
        yield from read_jsonl(config.inputs or ["-"], config.limit, bad=bad)
    else:
        with open_input("-") as handle:
            text = read_text(handle, "-")
        yield Row({"prompt": text.removesuffix("\n").removesuffix("\r")}, "stdin", 0)


def _identity(config: SampleConfig, shots: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Collect the options that decide the text, for the check on resuming; model and prompts are compared elsewhere."""
    shown = sha256(repr(list(shots)).encode()).hexdigest()[:16] if shots else None
    kept = {name: value for name, value in lasting_options(config).items() if name not in KNOWN_OTHERWISE}
    return {"what is in --shots": shown} | kept


def _write(
    generator: Generator | ServedSampler, prompts: Prompts, config: SampleConfig, out: str, identity: Mapping[str, Any]
) -> None:
    if config.jsonl:
        _write_records(generator, prompts, config, out, identity)
    else:
        _write_text(generator, prompts, config, out)


def _write_records(
    generator: Generator | ServedSampler, prompts: Prompts, config: SampleConfig, out: str, identity: Mapping[str, Any]
) -> None:
    from llmkit.generation.prompts import completion_record, lasting_output

    ordered, several, details = not config.unordered, config.samples > 1, (config.logprobs, bool(config.tools))
    lasting = out != "-" and (Path(out).is_file() or not Path(out).exists())  # not a pipe or device
    with (
        lasting_output(out, prompts, config.samples, ordered, config.resume, identity)
        if lasting
        else open_output(out, config.force) as write,
        Progress("sample", unit="tok", quiet=config.quiet) as progress,
    ):
        for done, (index, samples) in enumerate(generator.complete_each(prompts, ordered), 1):
            row, seed = prompts.take(index)
            for number, completion in enumerate(samples):
                write(completion_record(row, completion, seed, number if several else None, *details))
                progress.advance(len(completion.token_ids), prompts=done)


def _write_text(generator: Generator | ServedSampler, prompts: Prompts, config: SampleConfig, out: str) -> None:
    with open_bytes(out) as handle:

        def write(text: str) -> None:
            handle.write(text.encode())
            handle.flush()

        streams = out == "-" and config.samples == 1 and sys.stdout.isatty()
        if streams:
            generator.on_text = lambda request, sample, text: write(text)
        (samples,) = generator.complete(prompts)
        if streams:
            write("\n")
            return
        for number, completion in enumerate(samples, 1):
            heading = f"==> {number}/{len(samples)} <==\n" if len(samples) > 1 else ""
            write(f"{'' if number == 1 or not heading else chr(10)}{heading}{completion.text}\n")
