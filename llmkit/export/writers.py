"""Read and check a model folder, and write it in another precision, or only its adapter.

Memory: the model in its new precision, or one file of it if it has several.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmkit.errors import UserError
from llmkit.io.files import check_file
from llmkit.io.foreign import check_no_adapter, shown
from llmkit.io.jsonl import read_object, write_json
from llmkit.model.config import ModelConfig
from llmkit.model.folder import CONFIG, GENERATION, SavedTensors, load_config, save_tensors, write_tensors
from llmkit.model.weights import stock_shapes
from llmkit.reward_model.head import SCORE
from llmkit.tokenizer.encoding import copy_companions, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
# files that our tokenizers do not have, for other libraries or for people
_COPIED = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", GENERATION)


@dataclass(frozen=True)
class Source:
    """A model folder to export, with checked headers.

    heads   number of scores of a reward model; None for a language model
    stored  precision of the matrices
    """

    folder: Path
    config: ModelConfig
    tensors: SavedTensors
    heads: int | None
    stored: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = stock_shapes(self.config)
        if self.heads is not None:
            shapes[SCORE] = (self.heads, self.config.hidden_size)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def open_source(folder: str) -> Source:
    """Read the headers of a model folder of any kind. Raises UserError if it is damaged or of an unsupported family."""
    config, tensors = load_config(folder), SavedTensors(folder)
    heads = None
    if SCORE in tensors.where:
        config = replace(config, tie_word_embeddings=True)  # no language-model head
        heads = tensors.rows(SCORE, "a reward model")
    tensors.check(config, {} if heads is None else {SCORE: (heads, config.hidden_size)})
    matrix = next(name for name, shape in stock_shapes(config).items() if len(shape) == 2)
    return Source(tensors.folder, config, tensors, heads, _STORED[tensors.stored_dtype(matrix)])


def narrowed(value: Tensor, dtype: str, where: str) -> Tensor:
    """Convert a tensor. Raises UserError for values that would overflow."""
    check_range(value, DTYPES[dtype], where)
    return value.to(DTYPES[dtype]).contiguous()


def check_range(value: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raise UserError for values that would overflow."""
    largest = torch.finfo(dtype).max
    if value.is_floating_point() and value.numel() and bool((value.abs() > largest).any()):
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: {value.abs().max().item():.3g} is beyond {name}'s {largest:.3g}; use --dtype bfloat16"
        )


# ---- a folder, an adapter


def _copy_tokenizer(source: Path, folder: Path) -> None:
    copy_companions(source, folder)
    if (source / "tokenizer.json").is_file():
        load_tokenizer(source).copy_to(folder)


def write_folder(
    work: Path, source: Source, dtype: str, max_shard_size: int, advance: Callable[[float], object]
) -> None:
    """Write the model folder in another precision or with other shards, and the files next to its weights.

    RoPE settings in the format of transformers 4 are also written in that of transformers 5.
    """
    values = read_object(source.folder / CONFIG)
    if values.get("model_type") != source.config.model_type:  # the text model of a vision-language model
        values = source.config.to_hf()
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    if rope := source.config.to_hf().get("rope_parameters"):
        values.setdefault("rope_parameters", rope)
    _copy_tokenizer(source.folder, work)
    for name in _COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, work / name)

    def tensor_of(name: str) -> Tensor:
        value = narrowed(source.tensors.read(name), dtype, f"{source.folder}: {name}")
        advance(value.numel())
        return value

    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape in source.shapes.items()}
    save_tensors(work, values, sizes, tensor_of, max_shard_size)


@dataclass(frozen=True)
class Adapter:
    """An adapter in PEFT's format, in a subfolder of the model's; `notes` are instructions for using it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> str:
        return str(next(iter(self.tensors.values())).dtype).removeprefix("torch.")


def open_adapter(folder: str) -> Adapter:
    """Read the adapter that `llmkit sft --keep-adapter` kept in a folder.

    Raises UserError if there is none, or if it lacks embedding rows that the base model lacks too.
    """
    adapter = Path(folder) / ADAPTER
    check_no_adapter(folder)
    if not (adapter / ADAPTER_CONFIG).is_file() or not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder}: expected {ADAPTER}/{ADAPTER_CONFIG} and {ADAPTER}/{ADAPTER_WEIGHTS}, found no adapter; "
            "llmkit sft --lora-rank 16 --keep-adapter keeps one, --format hf exports the complete model"
        )
    config = read_object(adapter / ADAPTER_CONFIG)
    check_file(adapter / ADAPTER_WEIGHTS)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: expected a folder or a name for base_model_name_or_path, found {shown(base)}"
        )
    notes: tuple[str, ...] = ()
    if os.path.isfile(f"{base}/{CONFIG}"):
        known, tokens = load_config(base, "auto").vocab_size, load_tokenizer(folder).vocab_size
        rows = config.get("trainable_token_indices") or {}
        if isinstance(rows, dict):  # by name of the embedding, which depends on the family, and of the head
            rows = next((ids for name, ids in rows.items() if name != "lm_head"), ())
        if not {*range(known, tokens)} <= {*rows}:
            raise UserError(
                f"{folder}: has {tokens} tokens, its base {base} {known}, and the adapter lacks the other rows; "
                "--format hf exports the complete model"
            )
        if known < tokens:
            notes = (
                f"the base has {known} rows and the adapter {tokens} tokens: AutoPeftModelForCausalLM resizes the "
                f"embedding itself, otherwise call model.resize_token_embeddings({tokens}) before PeftModel",
            )
    try:
        return Adapter(adapter, config, load_file(adapter / ADAPTER_WEIGHTS), notes)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{adapter / ADAPTER_WEIGHTS}: damaged or truncated safetensors file: {error}") from None


def write_adapter(work: Path, adapter: Adapter, dtype: str) -> None:
    """Write the adapter in PEFT's format, with the tokenizer next to it."""
    _copy_tokenizer(adapter.folder.parent, work)
    tensors = {name: narrowed(value, dtype, f"{adapter.folder}: {name}") for name, value in adapter.tensors.items()}
    write_json(work / ADAPTER_CONFIG, adapter.config)
    write_tensors(work / ADAPTER_WEIGHTS, tensors)
