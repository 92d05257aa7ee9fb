"""`llmkit export`: convert a model folder to GGUF, to another precision, or to its adapter alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import CommonConfig, argument, as_options, option
from llmkit.errors import UserError
from llmkit.io.files import atomic_folder, check_output, output_folder, remove
from llmkit.io.manifest import write_manifest, write_model_card
from llmkit.io.progress import Progress, quantity, say
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from llmkit.export.writers import Source

FORMATS = ("gguf", "hf", "adapter")
MAX_SHARD_SIZE = 5 * 10**9
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "q8_0": 34 / 32}  # a number; q8_0: 32 and their scale
EXAMPLE = {"gguf": "chat.gguf", "hf": "chat-bf16/", "adapter": "adapter/"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CommonConfig):
    """Options of `llmkit export`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit export chat/ --format gguf -o chat.gguf
          llmkit export chat/ --format gguf --dtype q8_0 -o chat-q8_0.gguf && llama-cli -m chat-q8_0.gguf
          llmkit export chat/ --format hf --dtype bfloat16 --max-shard-size 2GB -o chat-bf16/
          llmkit export chat/ --format adapter -o adapter/

        gguf: one file for llama.cpp and programs built on it, with tokenizer and chat template. hf: a folder for
        transformers and vLLM, in another precision or in shards. adapter: the LoRA adapter of `llmkit sft --lora-rank R
        --keep-adapter`, for PEFT. --dtype auto keeps the folder's precision.
    """
    following: ClassVar[str] = 'llmkit sample chat-bf16/ -p "Hello, who are you?" --chat'

    model: str = argument("Model folder, from llmkit or Hugging Face.", metavar="MODEL", default=None)
    format: str | None = option(None, "Output format [required].", choices=FORMATS)
    dtype: str = option(
        "auto",
        "Precision of the matrices; q8_0: gguf only.",
        choices=("auto", "float32", "bfloat16", "float16", "q8_0"),
    )
    max_shard_size: int | None = option(
        None, "Maximum size of a weight file [5GB]; hf only.", unit="bytes", at_least=1, metavar="BYTES"
    )
    limit: None = None  # no --limit and --seed: there are no records
    seed: None = None

    def reads_stdin(self) -> bool:
        """True if help is wanted: without a model there is nothing to do."""
        return self.model is None


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints."""

    path: str
    format: str
    dtype: str
    parameters: int
    bytes: int
    files: int
    seconds: float


def run(config: ExportConfig) -> Summary | None:
    """Load, plan, write, summarise. Raises UserError for the user's mistakes, before anything is written."""
    started = time.monotonic()
    out = _checked(config)
    if config.format == "adapter":
        written = _export_adapter(config, out)
    else:
        from llmkit.export.writers import open_source

        source = open_source(str(config.model))
        dtype = source.stored if config.dtype == "auto" else config.dtype
        say(
            f"{config.model}: {quantity(source.parameters)} parameters of {source.config.model_type}, {source.stored}; "
            f"to {out} in {dtype}, about {quantity(source.parameters * BYTES[dtype])}B",
            config.quiet,
        )
        export = _export_gguf if config.format == "gguf" else _export_folder
        written = export(config, out, source, dtype)
    if written is None:
        return None
    parameters, dtype = written
    files = sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]
    size = sum(path.stat().st_size for path in files)
    seconds = round(time.monotonic() - started, 2)
    return Summary(str(out), str(config.format), dtype, parameters, size, len(files), seconds)


def _checked(config: ExportConfig) -> Path:
    """Check the options before any work; return the output path."""
    check_model_folder(config.model, "llmkit export chat/ --format gguf -o chat.gguf")
    if config.format is None:
        raise UserError(f"--format is required: one of {', '.join(FORMATS)}")
    if config.dtype == "q8_0" and config.format != "gguf":
        raise UserError(f"--dtype q8_0: needs --format gguf; {config.format} has float32, bfloat16 and float16")
    if config.max_shard_size is not None and config.format != "hf":
        raise UserError("--max-shard-size: needs --format hf; the others write one file of weights")
    example = EXAMPLE[config.format]
    if config.format == "gguf":
        if config.out is None or config.out == "-":
            raise UserError(f"--out is required: the file for the result, such as -o {example}")
        out = Path(config.out)
        if config.out.endswith("/") or (out.exists() and not out.is_file()):
            raise UserError(f"{config.out}: expected a file such as -o {example}, found a folder, pipe or device")
        if find_spec("gguf") is None:
            raise UserError("--format gguf: needs the package gguf; pip install 'llmkit[gguf]'")
    else:
        out = output_folder(config.out, example)
    if out.resolve() == Path(str(config.model)).resolve():
        raise UserError(f"{out}: is the model folder itself; choose another place")
    check_output(config.out or str(out), config.force)
    return out


def _export_gguf(config: ExportConfig, out: Path, source: Source, dtype: str) -> tuple[int, str] | None:
    from llmkit.export.gguf_file import plan_gguf, write_gguf

    plan = plan_gguf(source, dtype)
    for note in plan.notes:
        say(f"{config.model}: {note}")
    if config.dry_run:
        return None
    with Progress("write", total=source.parameters, unit="parameters", quiet=config.quiet) as progress:
        write_gguf(str(out), source, plan, progress.advance)
    results = {"parameters": source.parameters, "dtype": dtype, "notes": list(plan.notes)}
    try:
        _write_manifest(config, out, results)
    except BaseException:
        remove(out)
        raise
    return source.parameters, dtype


def _export_folder(config: ExportConfig, out: Path, source: Source, dtype: str) -> tuple[int, str] | None:
    from llmkit.export.writers import write_folder

    if not any((source.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        say(f"{config.model}: has no tokenizer.json, so {out} will have none")
    if config.dry_run:
        return None
    with (
        atomic_folder(out, config.force) as partial,
        Progress("write", total=source.parameters, unit="parameters", quiet=config.quiet) as progress,
    ):
        write_model_card(partial, _write_manifest(config, partial, {"parameters": source.parameters, "dtype": dtype}))
        write_folder(partial, source, dtype, config.max_shard_size or MAX_SHARD_SIZE, progress.advance)
    return source.parameters, dtype


def _export_adapter(config: ExportConfig, out: Path) -> tuple[int, str] | None:
    from llmkit.export.writers import open_adapter, write_adapter

    adapter = open_adapter(str(config.model))
    dtype = adapter.stored if config.dtype == "auto" else config.dtype
    say(
        f"{adapter.folder}: rank {adapter.config['r']} on {', '.join(adapter.config['target_modules'])} of "
        f"{adapter.config['base_model_name_or_path']}; to {out} in {dtype}",
        config.quiet,
    )
    for note in adapter.notes:
        say(note, config.quiet)
    if config.dry_run:
        return None
    with atomic_folder(out, config.force) as partial:
        parameters = sum(value.numel() for value in adapter.tensors.values())
        _write_manifest(config, partial, {"parameters": parameters, "dtype": dtype})
        write_adapter(partial, adapter, dtype)
    return parameters, dtype


def _write_manifest(config: ExportConfig, folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    return write_manifest(folder, "export", as_options(config), parents=[str(config.model)], results=results)
