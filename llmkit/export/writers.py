"""A model folder for other programs: a GGUF file, a folder in another precision, the adapter alone.

Tensors are read, changed and written one at a time for GGUF; a folder is held once, in its new precision.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmkit.errors import UserError
from llmkit.export import gguf_model, gguf_tokenizer
from llmkit.io.files import atomic_file, write_json
from llmkit.io.foreign import check_file, check_no_adapter, read_object, shown
from llmkit.model.config import ModelConfig
from llmkit.model.folder import CONFIG, GENERATION, SavedTensors, load_config, save_tensors, write_tensors
from llmkit.model.weights import stock_shapes
from llmkit.reward_model.head import SCORE
from llmkit.tokenizer.encoding import copy_companions, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# name of --dtype -> the types of a file and of its matrices, in gguf's words
_GGUF_TYPES = {
    "float32": ("ALL_F32", "F32"),
    "bfloat16": ("MOSTLY_BF16", "BF16"),
    "float16": ("MOSTLY_F16", "F16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
}
ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
# beside those that our own tokenizers have; what other libraries read, or people
_COPIED = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", GENERATION)


@dataclass(frozen=True)
class Source:
    """A model folder that is to be exported: its headers read and checked, its tensors not yet.

    heads    scores of a reward model, None for a language model
    stored   precision of its matrices: float32, bfloat16 or float16
    """

    folder: Path
    config: ModelConfig
    tensors: SavedTensors
    heads: int | None
    stored: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order of the layers."""
        shapes = stock_shapes(self.config)
        if self.heads is not None:
            shapes[SCORE] = (self.heads, self.config.hidden_size)
        return shapes

    @property
    def parameters(self) -> int:
        """Numbers that the folder holds."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def open_source(folder: str) -> Source:
    """Read the headers of a model folder of any kind. Raises UserError for one that is damaged or of another family."""
    config, tensors = load_config(folder), SavedTensors(Path(folder))
    heads = None
    if SCORE in tensors.where:
        config = replace(config, tie_word_embeddings=True)  # no head for words
        heads = tensors.rows(SCORE, "a reward model")
    tensors.check(config, {} if heads is None else {SCORE: (heads, config.hidden_size)})
    sample = "model.layers.0.mlp.down_proj.weight"
    return Source(Path(folder), config, tensors, heads, _STORED[tensors.stored_dtype(sample)])


# ---- GGUF


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file before it is written; `notes` tell where llama.cpp will not do what the folder does."""

    model: gguf_model.GgufModel
    tokenizer: gguf_tokenizer.GgufTokenizer
    dtype: str
    name: str

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.model.notes, *self.tokenizer.notes)


def plan_gguf(source: Source, dtype: str) -> GgufPlan:
    """Raises UserError for what llama.cpp cannot load or would compute otherwise."""
    if source.heads is not None:
        raise UserError(
            f"{source.folder}: a reward model: llama.cpp has no scores of this kind; --format hf exports it"
        )
    tokenizer = load_tokenizer(source.folder)
    tokenizer.check_fits(source.config.vocab_size)
    ends = (*_ends(source), *(() if tokenizer.eos_id is None else (tokenizer.eos_id,)))  # some name one there alone
    vocabulary = gguf_tokenizer.for_gguf(tokenizer, source.config.vocab_size, ends)
    model = gguf_model.for_gguf(source.config, str(source.folder / CONFIG))
    return GgufPlan(model, vocabulary, dtype, source.folder.resolve().name)


def _ends(source: Source) -> tuple[int, ...]:
    """The tokens that end a generation."""
    return tuple(end for end in source.config.eos_token_ids if 0 <= end < source.config.vocab_size)


def write_gguf(path: str, source: Source, plan: GgufPlan, advance: Callable[[float], object]) -> None:
    """Write the file, whole or not at all; `advance` gets the parameters of each tensor that is done.

    Raises UserError for weights that do not fit into the precision.
    """
    from gguf import GGUFWriter

    with atomic_file(path) as handle:
        writer = GGUFWriter(handle.name, plan.model.architecture)
        try:
            _add_keys(writer, plan)
            types = dict(_tensor_types(source.config, plan.dtype))
            for name, (kind, shape) in types.items():
                writer.add_tensor_info(name, *_stored_as(kind, shape), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            for name, value in gguf_model.read_tensors(source.config, source.tensors):
                data = _quantized(value, types[name][0], f"{source.folder}: {name}")
                writer.write_padding(file, file.tell())
                # not write_tensor_data: on a full disk numpy's tofile loses the last 4 kB in silence
                file.write(np.ascontiguousarray(data).data)
                writer.write_padding(file, data.nbytes)
                advance(value.numel())
        finally:
            writer.close()


def _add_keys(writer: GGUFWriter, plan: GgufPlan) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_file_type(gguf.LlamaFileType[_GGUF_TYPES[plan.dtype][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_model.add_model_keys(writer, plan.model)
    words = plan.tokenizer
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(True)
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in (
        (writer.add_bos_token_id, words.bos_id),
        (writer.add_pad_token_id, words.pad_id),
        (writer.add_unk_token_id, words.unknown_id),
        *zip(ends, words.ends, strict=False),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(False)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _tensor_types(
    config: ModelConfig, dtype: str
) -> Iterator[tuple[str, tuple[GGMLQuantizationType, tuple[int, ...]]]]:
    """(name, (type, shape)): matrices in the type that is asked for, vectors in float32, as llama.cpp expects them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[_GGUF_TYPES[dtype][1]]
    for name, (_, shape) in gguf_model.tensor_shapes(config).items():
        fits = shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0  # else float16, as llama.cpp's converter does
        matrix = wanted if fits else GGMLQuantizationType.F16
        yield name, (matrix if len(shape) > 1 else GGMLQuantizationType.F32, shape)


def _stored_as(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any, int]:
    """Shape, numpy type and bytes of a tensor as gguf.quants gives it: bytes where numpy has no such type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    numpy = np.dtype(plain.get(kind, np.uint8))
    stored = shape if kind in plain else quant_shape_to_byte_shape(shape, kind)
    return stored, numpy, int(np.prod(stored)) * numpy.itemsize


def _quantized(value: Tensor, kind: GGMLQuantizationType, where: str) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == GGMLQuantizationType.F16:
        _check_range(value, torch.float16, where)
    return quantize(value.numpy(), kind)


def _check_range(value: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raise UserError for numbers that would become infinite."""
    largest = torch.finfo(dtype).max
    if value.is_floating_point() and value.numel() and bool((value.abs() > largest).any()):
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: {value.abs().max().item():.3g} is beyond {name}'s {largest:.3g}; use --dtype bfloat16"
        )


# ---- a folder, an adapter


def write_folder(
    work: Path, source: Source, dtype: str, max_shard_size: int, advance: Callable[[float], object]
) -> None:
    """Write the model folder in another precision or in other shards, with all that stands beside its weights."""
    values = read_object(source.folder / CONFIG)
    key = "dtype" if "dtype" in values else "torch_dtype"
    values[key] = dtype
    copy_companions(source.folder, work)
    if (source.folder / "tokenizer.json").is_file():
        load_tokenizer(source.folder).copy_to(work)
    for name in _COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, work / name)
    tensors = {}
    for name in source.shapes:
        value = source.tensors.read(name)
        _check_range(value, DTYPES[dtype], f"{source.folder}: {name}")
        tensors[name] = value.to(DTYPES[dtype]).contiguous()
        advance(value.numel())
    save_tensors(work, values, tensors, max_shard_size)


@dataclass(frozen=True)
class Adapter:
    """An adapter in PEFT's form, in the folder `place`, and the folder of the model that has its tokenizer.

    notes  what its reader must do
    """

    place: Path
    model: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> str:
        """Its precision."""
        return str(next(iter(self.tensors.values())).dtype).removeprefix("torch.")

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.tensors.values())


def open_adapter(folder: str) -> Adapter:
    """The adapter that `llmkit sft --keep-adapter` kept in a folder.

    Raises UserError where there is none, and where it lacks rows that the model has and the base has not.
    """
    adapter = Path(folder) / ADAPTER
    check_no_adapter(folder)
    if not (adapter / ADAPTER_CONFIG).is_file() or not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder}: expected {ADAPTER}/{ADAPTER_CONFIG} and {ADAPTER}/{ADAPTER_WEIGHTS}, found no adapter; "
            "llmkit sft --lora-rank 16 --keep-adapter keeps one, --format hf exports the whole model"
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
        known, tokens = load_config(base).vocab_size, load_tokenizer(folder).vocab_size
        rows = config.get("trainable_token_indices") or {}
        trained_rows = rows.get("embed_tokens", ()) if isinstance(rows, dict) else rows
        if not {*range(known, tokens)} <= {*trained_rows}:
            raise UserError(
                f"{folder}: its base {base} has {known} tokens and it has {tokens}, whose rows the adapter does not "
                "hold; --format hf exports the whole model"
            )
        if known < tokens:
            notes = (
                f"the base has {known} rows and the adapter speaks of {tokens} tokens: AutoPeftModelForCausalLM makes "
                f"room by itself, elsewhere model.resize_token_embeddings({tokens}) comes before PeftModel",
            )
    try:
        return Adapter(adapter, Path(folder), config, load_file(adapter / ADAPTER_WEIGHTS), notes)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{adapter / ADAPTER_WEIGHTS}: damaged or cut safetensors file: {error}") from None


def write_adapter(work: Path, adapter: Adapter, dtype: str) -> None:
    """Write the adapter as PEFT reads it, with the tokenizer beside it."""
    copy_companions(adapter.model, work)
    if (adapter.model / "tokenizer.json").is_file():
        load_tokenizer(adapter.model).copy_to(work)
    for name, value in adapter.tensors.items():
        _check_range(value, DTYPES[dtype], f"{adapter.place}: {name}")
    tensors = {name: value.to(DTYPES[dtype]).contiguous() for name, value in adapter.tensors.items()}
    write_json(work / ADAPTER_CONFIG, adapter.config)
    write_tensors(work / ADAPTER_WEIGHTS, tensors)
