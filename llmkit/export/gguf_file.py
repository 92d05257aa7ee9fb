"""A GGUF file of a model: the keys and tensors that llama.cpp's own converter writes for its family.

llama and mistral become llama.cpp's `llama`, whose rotated pairs are neighbours, (2i, 2i + 1), as ours are; qwen2 and
qwen3 keep half a head between them. What llama.cpp would compute otherwise than we do is refused, or said in a note.
Tensors are read, changed and written one at a time.
Source: llama.cpp's convert_hf_to_gguf.py and src/models/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from llmkit.export.writers import Source, check_range
from llmkit.io.files import atomic_file
from llmkit.model.config import ModelConfig
from llmkit.model.folder import CONFIG, SavedTensors
from llmkit.model.transformer import rotary_frequencies
from llmkit.model.weights import pairs_together, stock_shapes
from llmkit.tokenizer.encoding import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FACTORS = "rope_freqs.weight"
# name of --dtype -> the types of a file and of its matrices, in gguf's words
TYPES = {
    "float32": ("ALL_F32", "F32"),
    "bfloat16": ("MOSTLY_BF16", "BF16"),
    "float16": ("MOSTLY_F16", "F16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
}


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file before it is written.

    context  tokens within which llama.cpp computes what we do
    notes    where llama.cpp will not do what the folder does
    """

    tokenizer: GgufTokenizer
    context: int
    dtype: str
    notes: tuple[str, ...]


def plan_gguf(source: Source, dtype: str) -> GgufPlan:
    """Plan the file. Raises UserError for what llama.cpp cannot load or would compute otherwise."""
    if source.heads is not None:
        raise UserError(
            f"{source.folder}: a reward model: llama.cpp has no scores of this kind; --format hf exports it"
        )
    config = source.config
    _check_family(config, str(source.folder / CONFIG))
    tokenizer = load_tokenizer(source.folder)
    tokenizer.check_fits(config.vocab_size)
    ends = [end for end in config.eos_token_ids if 0 <= end < config.vocab_size]
    if tokenizer.eos_id is not None:  # some folders name one there alone
        ends.append(tokenizer.eos_id)
    vocabulary = gguf_tokenizer(tokenizer, config.vocab_size, ends)
    notes = []
    windows = [window for window in config.layer_windows or () if window is not None]
    context = min([config.max_position_embeddings, *windows])
    if context < config.max_position_embeddings:
        notes.append(
            f"a context of {context} tokens, of {config.max_position_embeddings}: within its sliding window, "
            "which llama.cpp does not know in this family"
        )
    return GgufPlan(vocabulary, context, dtype, (*notes, *vocabulary.notes))


def _check_family(config: ModelConfig, where: str) -> None:
    """Raise UserError, naming `where`, unless llama.cpp computes this model as we do."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{where}: no GGUF of {config.model_type} is written here, but of {', '.join(ARCHITECTURES)}; "
            "--format hf, and llama.cpp's convert_hf_to_gguf.py of that folder"
        )
    if config.mlp_bias:
        raise UserError(f"{where}: mlp_bias true: llama.cpp's files of this family are written without; --format hf")
    if config.model_type == "qwen3" and (config.attention_bias or config.attention_out_bias):
        raise UserError(f"{where}: llama.cpp's qwen3 has no attention_bias; --format hf keeps it")
    if config.model_type == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError(
            f"{where}: llama.cpp's qwen2 expects head_dim {config.hidden_size // config.num_attention_heads}, "
            f"found {config.head_dim}"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3" and ARCHITECTURES[config.model_type] != "llama":
        raise UserError(f"{where}: llama.cpp's {config.model_type} has no rope scaling llama3")
    if scaling is not None and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True):
        raise UserError(f"{where}: llama.cpp has yarn with beta_fast 32, beta_slow 1 and truncate alone")


def write_gguf(path: str, source: Source, plan: GgufPlan, advance: Callable[[float], object]) -> None:
    """Write the file, whole or not at all; `advance` gets the parameters of each tensor that is done.

    Raises UserError for weights that do not fit into the precision.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    with atomic_file(path) as handle:
        writer = GGUFWriter(handle.name, ARCHITECTURES[source.config.model_type])
        try:
            _add_keys(writer, source, plan)
            kinds = {}
            for name, (_, shape) in tensor_shapes(source.config).items():
                kind = kinds[name] = _tensor_type(shape, plan.dtype)
                # as gguf.quants gives it: bytes where numpy has no such type
                stored = shape if kind in plain else quant_shape_to_byte_shape(shape, kind)
                numpy_type = np.dtype(plain.get(kind, np.uint8))
                size = int(np.prod(stored)) * numpy_type.itemsize
                writer.add_tensor_info(name, stored, numpy_type, size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            (file,) = writer.fout
            for name, value in read_tensors(source.config, source.tensors):
                if kinds[name] == GGMLQuantizationType.F16:
                    check_range(value, torch.float16, f"{source.folder}: {name}")
                data = quantize(value.numpy(), kinds[name])
                writer.write_padding(file, file.tell())
                # not write_tensor_data: on a full disk numpy's tofile loses the last 4 kB in silence
                file.write(np.ascontiguousarray(data).data)
                writer.write_padding(file, data.nbytes)
                advance(value.numel())
        finally:
            writer.close()


def _add_keys(writer: GGUFWriter, source: Source, plan: GgufPlan) -> None:
    import gguf

    config, words = source.config, plan.tokenizer
    writer.add_type("model")
    writer.add_name(source.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[TYPES[plan.dtype][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(plan.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.rope_type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
            its_own = max(1.0, 0.1 * math.log(scaling.factor) + 1.0)  # by which llama.cpp multiplies what is stated
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / its_own)
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


def _tensor_type(shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """Matrices in the type of --dtype, vectors in float32, as llama.cpp expects them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[TYPES[dtype][1]]
    fits = shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0  # else float16, as llama.cpp's converter does
    return wanted if fits else GGMLQuantizationType.F16


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map GGUF's name of every tensor of the file to its name in the folder and its shape."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    architecture = MODEL_ARCH[ARCHITECTURES[config.model_type].upper()]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        shapes[ROPE_FACTORS] = (ROPE_FACTORS, (config.head_dim // 2,))
    for name, shape in stock_shapes(config).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, f"gguf has no name for {name}"
        shapes[theirs] = (name, shape)
    return shapes


def read_tensors(config: ModelConfig, tensors: SavedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, values in float32), one at a time, in the order of `tensor_shapes`."""
    permuted = ARCHITECTURES[config.model_type] == "llama"
    for theirs, (name, _) in tensor_shapes(config).items():
        if name == ROPE_FACTORS:
            plain = rotary_frequencies(config.head_dim, config.rope_theta)
            yield name, (plain / rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)).float()
            continue
        value = tensors.read(name).to(torch.float32)
        if permuted and (".q_proj." in name or ".k_proj." in name):
            value = pairs_together(value, config)
        yield theirs, value.contiguous()
