"""Model folders in Hugging Face's format: load ours and foreign ones, save ours for stock transformers.

A folder is refused, with its name and a reason, if the loaded model would not be the saved one: another family, a
tensor that is missing, unknown or of another shape, a truncated file, a pickle.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmkit.errors import UserError
from llmkit.io.files import atomic_file, check_file, read_file
from llmkit.io.foreign import check_no_adapter, shown
from llmkit.io.hub import INDEX, WEIGHTS, local_folder
from llmkit.io.jsonl import object_of, read_object, write_json
from llmkit.io.progress import counted
from llmkit.model.config import ModelConfig, token_ids
from llmkit.model.families import FAMILIES
from llmkit.model.quantized import quantized_when_filled
from llmkit.model.transformer import Transformer
from llmkit.model.transformers_backend import PACKAGE, TransformersConfig, TransformersModel, read_config
from llmkit.model.weights import HEAD, embedding_name, export_tensor, import_state_dict, stock_shapes, stock_tensors

CONFIG = "config.json"
SCORE = "score.weight"  # of a reward model
GENERATION = "generation_config.json"
# Unused buffers of old checkpoints.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# suffixes of tensor names in folders of gptq, awq, fp8, compressed-tensors, bitsandbytes and mxfp4
_QUANTIZED = (
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".SCB",
    ".absmax",
    "_blocks",
)
ORIGINAL = "use the model's unquantized folder"
# of a multimodal model: fields that its parts share, prefixes of its text model, and prefixes of what is left out
_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "auto_map")
_TEXT_MODEL = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_PICTURES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
LARGEST_INDEX = 64 << 20  # bytes
_NO_JSON = re.compile(rb"(?<=[\[,:\s])(-?Infinity|NaN)(?=[\s,\]}])")  # written by Python: time_step_limit of mamba2
_FLOATS = ("F64", "F32", "F16", "BF16")
_NARROW = ("F8", "F4", "F6")


def load_config(folder: str | os.PathLike[str], backend: str = "llmkit") -> ModelConfig:
    """Read the configuration of a model folder, or of a model at an address.

    backend: "llmkit"; "transformers"; or "auto", which is transformers if it is installed and the family is not native
    """
    folder = local_folder(folder)
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a model folder, found {'a file' if path.parent.exists() else 'nothing'}")
    try:
        values = object_of(_NO_JSON.sub(rb'{"__float__": "\1"}', read_file(path)), path)
    except FileNotFoundError:
        check_no_adapter(folder)
        raise UserError(f"{path}: not found; expected a model folder with {CONFIG}") from None
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(f"{path}: expected unquantized weights, found quantization {shown(method)}; {ORIGINAL}")
    text, ours = values.get("text_config"), values
    if isinstance(text, dict) and values.get("model_type") not in (*FAMILIES,):  # a multimodal model's
        ours = {name: values[name] for name in _SHARED if name in values} | text
    native, advice = ours.get("model_type") in (*FAMILIES,), "choose a model of one of these families"
    if backend == "auto" and not native:
        if find_spec("transformers") is not None:
            backend = "transformers"
        advice += f", or pip install '{PACKAGE}', which supports others"
    elif backend == "llmkit":
        advice += "; transformers supports others, but not with --backend llmkit, in pretrain or for weights of export"
    if backend == "transformers":
        config = read_config(values, str(path))
    else:
        config = ModelConfig.from_hf(ours, str(path), advice)
    generation = path.with_name(GENERATION)
    if not generation.exists():
        return config
    ends = token_ids(read_object(generation), "eos_token_id", str(generation))  # it takes precedence in transformers
    return config if ends is None else replace(config, eos_token_id=ends)


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    backend: str = "llmkit",
) -> Transformer:
    """Load a model folder, with one safetensors file or several and an index.

    dtype     None is bfloat16 if all tensors are, else float32
    quantize  "nf4" or "int8" for the matrices of layers (model/quantized.py), layer by layer: the complete model is
              never in memory unquantized
    backend   as in `load_config`
    """
    config = load_config(folder, backend)
    tensors = SavedTensors(folder)
    if isinstance(config, TransformersConfig):
        if quantize is not None:
            raise UserError(
                f"--quantize {quantize}: expected a family that llmkit computes itself ({', '.join(FAMILIES)}), found "
                f"{config.model_type!r} computed by transformers; leave out --quantize"
                + (" or --backend" if config.model_type in FAMILIES else "")
            )
        tensors.check_kind()
        return TransformersModel.load(config, tensors.name, tensors.read_all(), dtype or torch.float32, device)
    tensors.check(config)
    if dtype is None:
        stored = {tensors.stored_dtype(name) for name in stock_shapes(config)}
        dtype = torch.bfloat16 if stored == {"BF16"} else torch.float32
    if quantize is None:
        model = Transformer(config, dtype=dtype, device=device)
        import_state_dict(model, tensors.read)
    else:
        model = Transformer(config, dtype=dtype, device="meta").to_empty(device=device, recurse=False)
        around = partial(quantized_when_filled, kind=quantize, dtype=dtype, device=device)
        import_state_dict(model, tensors.read, around)
    return model.eval()


def save_model(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write config.json, generation_config.json and, last, the weights, each atomically.

    A model trained from scratch becomes a stock `Qwen3ForCausalLM`; a loaded one keeps its family. Above
    `max_shard_size` bytes the weights are split into several files with an index, which is then written last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, TransformersModel):
        return model.save(folder, dtype, max_shard_size)
    config = model.config
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / GENERATION, {k: v for k, v in tokens.items() if v is not None})
    values = config.to_hf(str(dtype).removeprefix("torch."))
    stock = {tensor.name: tensor for tensor in stock_tensors(config)}
    sizes = {name: math.prod(tensor.shape) * dtype.itemsize for name, tensor in stock.items()}
    save_tensors(folder, values, sizes, lambda name: export_tensor(model, stock[name], dtype), max_shard_size)


def save_tensors(
    folder: Path,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    tensor_of: Callable[[str], Tensor],
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write `config` as config.json and, last, the weights, in one file or in several with an index.

    sizes      bytes of each tensor, by name
    tensor_of  returns a tensor by name; only those of one file are in memory at a time
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config)
    shards: list[list[str]] = [[]]
    size = 0
    for key, more in sizes.items():
        if size and size + more > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += more
    several = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = several if len(shards) > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, {key: tensor_of(key) for key in shard})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        names.append(INDEX)
    for path in (folder / WEIGHTS, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        if path.name not in names:  # of an earlier save in the other form; a loader must not find both
            path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically, with the usual permissions of a new file."""
    with atomic_file(path) as handle:
        save_file(tensors, handle.name, metadata={"format": "pt"})


class SavedTensors:
    """The tensors of a folder by name, in whichever file; only headers are read before `read`."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.name = os.fspath(folder)  # in errors
        self.folder = folder = local_folder(folder, weights=True)
        self._open_files: dict[Path, Any] = {}
        self.where: dict[str, Path] = {}
        self.stored_as: dict[str, str] = {}  # names in the file of renamed tensors
        if (folder / WEIGHTS).exists():
            self._open(folder / WEIGHTS)
        elif (folder / INDEX).exists():
            weight_map = read_object(folder / INDEX, LARGEST_INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / INDEX}: expected field 'weight_map'")
            for name in weight_map.values():
                if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name or len(name) > 255:
                    raise UserError(f"{folder / INDEX}: expected a file of this folder, found {shown(name)}")
            for name in sorted(set(weight_map.values())):
                if not (folder / name).exists():
                    raise UserError(f"{folder / name}: not found; {INDEX} names it")
                self._open(folder / name)
            for name, file in weight_map.items():
                if self.where.get(name) != folder / file:
                    raise UserError(f"{folder / file}: expected tensor {name}, which {INDEX} lists, found none")
        else:
            raise UserError(_no_weights(folder))

    def _open(self, path: Path) -> None:
        check_file(path)  # opening a pipe would wait forever
        try:
            file = safe_open(path, framework="pt")
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or truncated safetensors file: {error}") from None
        self._open_files[path] = file
        for name in names:
            if name in self.where:
                raise UserError(f"{path}: tensor {name} is in {self.where[name].name} as well")
            self.where[name] = path

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def stored_dtype(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def rows(self, name: str, what: str) -> int:
        """Return the first dimension of a tensor. Raises UserError, naming `what` is expected, if it is missing."""
        if name not in self.where:
            raise UserError(f"{self.name}: expected {what}, found no tensor {name}")
        return self.shape(name)[0]

    def _slice(self, name: str) -> Any:
        return self._open_files[self.where[name]].get_slice(self.stored_as.get(name, name))

    def read(self, name: str) -> Tensor:
        return self._open_files[self.where[name]].get_tensor(self.stored_as.get(name, name))

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.where}

    def check(self, config: ModelConfig, others: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Raise UserError unless the tensors are exactly those of the model and `others`, with their shapes.

        A tied embedding may have either of its names.
        """
        if self.where and config.num_hidden_layers > len(self.where):  # before names are generated for all of them
            raise UserError(
                f"{self.name}: expected the tensors of num_hidden_layers {config.num_hidden_layers}, "
                f"found {counted(len(self.where), 'tensor')} in all"
            )
        shapes, embedding = {**stock_shapes(config), **(others or {})}, embedding_name(config)
        self._name_as_ours(config)
        if config.tie_word_embeddings and HEAD in self.where:
            if embedding in self.where:
                self._check_shape(embedding, shapes[embedding])
                self._check_shape(HEAD, shapes[embedding])
                if not torch.equal(self.read(embedding), self.read(HEAD)):
                    raise UserError(
                        f"{self.where[HEAD]}: {embedding} and {HEAD} differ, but {CONFIG} has tie_word_embeddings true"
                    )
            else:
                self.where[embedding], self.stored_as[embedding] = self.where[HEAD], HEAD
            del self.where[HEAD]
        self.check_kind(scores=SCORE in shapes)
        missing = [name for name in shapes if name not in self.where]
        if missing:
            raise UserError(f"{self.name}: missing tensor {_first(missing)}")
        extra = [name for name in self.where if name not in shapes and not name.endswith(_IGNORED_SUFFIXES)]
        if extra:
            raise UserError(
                f"{self.where[extra[0]]}: unexpected tensor {_first(extra)} for model_type {config.model_type}"
            )
        for name, shape in shapes.items():
            self._check_shape(name, shape)

    def check_kind(self, scores: bool = False) -> None:
        """Raise UserError for quantized tensors, and for a reward model unless `scores`."""
        if SCORE in self.where and not scores:
            raise UserError(
                f"{self.name}: expected a language model, found a reward model; score texts with "
                f"llmkit train-reward --score {self.name}"
            )
        for name, where in self.where.items():
            if name.endswith(_QUANTIZED) or self.stored_dtype(name).startswith(_NARROW):
                raise UserError(f"{where}: found the quantized tensor {name}; {ORIGINAL}")
            if name.endswith(".weight"):
                self._check_float(name)

    def _name_as_ours(self, config: ModelConfig) -> None:
        """Rename tensors to those of a text model with its head: from the text model of a multimodal one, or from a
        model without its head, such as gpt2's own folder."""
        prefix, names = FAMILIES[config.model_type].prefix, {name: name for name in self.where}
        for theirs, ours in _TEXT_MODEL.items():
            names |= {name: ours + name.removeprefix(theirs) for name in self.where if name.startswith(theirs)}
        if any(name != ours for name, ours in names.items()):
            names = {name: ours for name, ours in names.items() if not name.startswith(_PICTURES)}
        elif not any(name.startswith(prefix) for name in names):
            names = {name: name if name in (HEAD, SCORE) else prefix + name for name in names}
        self.stored_as |= {ours: self.stored_as.get(name, name) for name, ours in names.items() if name != ours}
        self.where = {ours: self.where[name] for name, ours in names.items()}

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        where, shape = self.where[name], self.shape(name)
        if shape != expected:
            raise UserError(
                f"{where}: tensor {name}: expected shape {list(expected)}, found {list(shape)}; "
                f"are {CONFIG} and weights of one model?"
            )
        self._check_float(name)

    def _check_float(self, name: str) -> None:
        if self.stored_dtype(name) not in _FLOATS:
            raise UserError(
                f"{self.where[name]}: tensor {name}: expected dtype {', '.join(_FLOATS)}, found "
                f"{self.stored_dtype(name)}; {ORIGINAL}"
            )


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if not pickles:
        message = f"{folder}: expected {WEIGHTS} or {INDEX}, found neither"
        others = sorted(path.name for pattern in ("*.gguf", "*.safetensors") for path in folder.glob(pattern))
        if not others:
            return message
        if others[0].endswith(".gguf"):
            return f"{message}, but {others[0]}, which is llama.cpp's; download the model's safetensors files"
        if (folder / "adapter_config.json").exists():
            return f"{message}, but an adapter, {others[0]}; merge it into its base: peft's merge_and_unload"
        return f"{message}, but {others[0]}; rename it to {WEIGHTS} if that is what it is"
    convert = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"[kind.from_pretrained({str(folder)!r}).save_pretrained('NEW_FOLDER') for kind in (M, T)]"
    )
    return (
        f"{folder / pickles[0]}: a pickle can run code, so it is not read; "
        f'convert it if you trust it: python -c "{convert}"'
    )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
