"""A GGUF file of a model: the keys and tensors that llama.cpp's own converter writes for its family.

In some architectures of llama.cpp rotated pairs are neighbours, (2i, 2i + 1), as ours are; others keep half a head
between them, as Hugging Face does. What llama.cpp would compute otherwise than we do is refused, or said in a note.
Tensors are read, changed and written one at a time.
Source: llama.cpp's convert_hf_to_gguf.py and src/models/.
"""

from __future__ import annotations

import math
import re
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
from llmkit.io.progress import counted
from llmkit.model.config import ModelConfig
from llmkit.model.folder import CONFIG, SavedTensors
from llmkit.model.transformer import rotary_frequencies
from llmkit.model.weights import StockTensor, pairs_apart, stock_tensors
from llmkit.tokenizer.encoding import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

ATTENTION_BIASES, MLP_BIASES = ("qkv_bias", "out_bias"), ("gate_up_bias", "down_bias")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp has of a family.

    neighbours    True if rotated pairs are neighbours there
    biases        of a layer's matrices that it knows
    scalings      kinds of rope scaling that it computes as we do
    square        True if the heads must add up to the hidden size
    window_every  the layers that have no window; None where it knows no windows
    """

    name: str
    neighbours: bool = False
    biases: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("linear", "yarn", "dynamic")
    square: bool = False
    window_every: int | None = None


ARCHITECTURES = {
    "llama": Architecture(
        "llama", True, ATTENTION_BIASES + MLP_BIASES, scalings=("linear", "yarn", "dynamic", "llama3")
    ),
    "mistral": Architecture("llama", True, scalings=("linear", "yarn", "dynamic", "llama3")),
    "qwen2": Architecture("qwen2", biases=("qkv_bias",), square=True),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", scalings=("dynamic",), window_every=2),
    "gemma3_text": Architecture("gemma3", scalings=("linear", "dynamic"), window_every=6),
    "gpt2": Architecture("gpt2", biases=ATTENTION_BIASES + MLP_BIASES),
    "granite": Architecture("granite", True, ATTENTION_BIASES + MLP_BIASES),
    "olmo2": Architecture("olmo2", square=True),
    "olmo3": Architecture("olmo2", square=True, window_every=4),
    "phi3": Architecture("phi3", scalings=("longrope",), square=True),
    "smollm3": Architecture("smollm3", True),
}
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
    if ARCHITECTURES[config.model_type].window_every:
        windows = []
    context = min([config.max_position_embeddings, *windows])
    if context < config.max_position_embeddings:
        notes.append(
            f"a context of {context} tokens, of {config.max_position_embeddings}: within its sliding window, "
            "which llama.cpp does not know in this family"
        )
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "longrope":
        first = config.rope_scaling.original_max_position_embeddings
        notes.append(
            f"llama.cpp turns positions by the context that it is started with: "
            f"up to {counted(first, 'token')} start it with -c {first}"
        )
    return GgufPlan(vocabulary, context, dtype, (*notes, *vocabulary.notes))


def _check_family(config: ModelConfig, where: str) -> None:
    """Raise UserError, naming `where`, unless llama.cpp computes this model as we do."""
    theirs = ARCHITECTURES.get(config.model_type)
    if theirs is None:
        raise UserError(
            f"{where}: no GGUF of {config.model_type} is written here, but of {', '.join(ARCHITECTURES)}; "
            "--format hf, and llama.cpp's convert_hf_to_gguf.py of that folder"
        )
    name, every, layers = theirs.name, theirs.window_every, range(config.num_hidden_layers)
    for bias in config.layer_shapes().keys() & {*ATTENTION_BIASES, *MLP_BIASES} - {*theirs.biases}:
        kind = "attention_bias" if bias in ATTENTION_BIASES else "mlp_bias"
        raise UserError(f"{where}: llama.cpp's {name} has no {kind}; --format hf keeps it")
    if theirs.square and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError(
            f"{where}: llama.cpp's {name} expects head_dim {config.hidden_size // config.num_attention_heads}, "
            f"found {config.head_dim}"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type not in theirs.scalings:
        raise UserError(f"{where}: llama.cpp's {name} has no rope scaling {scaling.rope_type}")
    if scaling is not None and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True):
        raise UserError(f"{where}: llama.cpp has yarn with beta_fast 32, beta_slow 1 and truncate alone")
    if every is not None:
        windows = config.layer_windows or (None,) * config.num_hidden_layers
        without = [i for i, window in enumerate(windows) if window is None]
        if (name != "olmo2" or config.layer_windows) and without != [i for i in layers if (i + 1) % every == 0]:
            raise UserError(f"{where}: llama.cpp's {name} has a window in every layer but each {every}th")
        local = config.sliding_rope
        if (local is None and scaling is not None) or (
            local is not None and (local.scaling or (name == "olmo2" and local.theta != config.rope_theta))
        ):
            raise UserError(f"{where}: llama.cpp's {name} does not rotate the layers with a window so")
    if name == "smollm3" and config.no_rope_layers != tuple(i for i in layers if (i + 1) % 4 == 0):
        raise UserError(f"{where}: llama.cpp's smollm3 rotates all layers but every 4th alone")
    if name == "gemma2" and None in (config.attention_softcap, config.logits_softcap):
        raise UserError(f"{where}: llama.cpp's gemma2 has softcaps always")
    if name == "gemma3" and config.logits_softcap is not None:
        raise UserError(f"{where}: llama.cpp's gemma3 has no softcaps")
    if name in ("gemma2", "gemma3"):
        largest = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[name]  # 27B, by which llama.cpp knows it
        divisor = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != divisor:
            raise UserError(
                f"{where}: llama.cpp's {name} expects query_pre_attn_scalar {divisor}, "
                f"found {config.query_pre_attn_scalar}"
            )


def write_gguf(path: str, source: Source, plan: GgufPlan, advance: Callable[[float], object]) -> None:
    """Write the file, whole or not at all; `advance` gets the parameters of each tensor that is done.

    Raises UserError for weights that do not fit into the precision.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    # of vectors float32, and float16 where rows are no multiple of a block, as llama.cpp's converter has them
    matrix_kind = GGMLQuantizationType[TYPES[plan.dtype][1]]
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    with atomic_file(path) as handle:
        writer = GGUFWriter(handle.name, ARCHITECTURES[source.config.model_type].name)
        try:
            _add_keys(writer, source, plan)
            kinds = {}
            for name, tensor in gguf_tensors(source.config).items():
                transposed = isinstance(tensor, StockTensor) and tensor.transposed
                shape = tuple(tensor.shape)[::-1] if transposed else tuple(tensor.shape)
                kind = matrix_kind if shape[-1] % GGML_QUANT_SIZES[matrix_kind][0] == 0 else GGMLQuantizationType.F16
                kind = kinds[name] = GGMLQuantizationType.F32 if len(shape) == 1 else kind
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
    name = source.folder.resolve().name
    # llama.cpp takes a file of this name for Phi-3 itself, and does not load it without its tokens
    if not re.search("phi-?3", name.lower()) or {"<unk>", "</s>", "<|endoftext|>"} <= {*words.tokens}:
        writer.add_name(name)
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
    (writer.add_layer_norm_eps if config.layer_norm else writer.add_layer_norm_rms_eps)(config.rms_norm_eps)
    if not config.learned_positions:
        _add_rope(writer, config)
    if ARCHITECTURES[config.model_type].window_every and config.layer_windows is not None:
        writer.add_sliding_window(next(window for window in config.layer_windows if window is not None))
        writer.add_rope_freq_base_swa(config.sliding_rope.theta if config.sliding_rope else config.rope_theta)
    if config.attention_softcap is not None and config.logits_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.logits_softcap)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier or config.head_dim**-0.5)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
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


def _add_rope(writer: GGUFWriter, config: ModelConfig) -> None:
    import gguf

    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type not in ("linear", "yarn", "longrope"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    if scaling.rope_type != "longrope":
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type != "linear":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        # by its own llama.cpp multiplies what is stated
        own = max(1.0, 0.1 * math.log(scaling.factor) + 1.0) if scaling.rope_type == "yarn" else 1.0
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / own)


def gguf_tensors(config: ModelConfig) -> dict[str, StockTensor | Tensor]:
    """Map GGUF's name of every tensor of the file to that of the folder, or to divisors of the frequencies."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    theirs = ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(MODEL_ARCH[theirs.name.upper()], config.num_hidden_layers)
    tensors: dict[str, StockTensor | Tensor] = {}
    scaling, channels = config.rope_scaling, config.rotary_dim or config.head_dim
    if scaling is not None and scaling.rope_type == "llama3":
        plain = rotary_frequencies(channels, config.rope_theta)
        scaled = rotary_frequencies(channels, config.rope_theta, scaling)
        tensors["rope_freqs.weight"] = (plain / scaled).float()
    elif scaling is not None and scaling.rope_type == "longrope":
        tensors["rope_factors_long.weight"] = torch.tensor(scaling.long_factor)
        tensors["rope_factors_short.weight"] = torch.tensor(scaling.short_factor)
    for stock in stock_tensors(config):
        name = names.get_name(stock.name, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf has no name for {stock.name}"
        tensors[name] = stock
    if theirs.name == "olmo2" and config.tied_on_disk:  # which has no other way to say that the head is the embedding
        tensors["output.weight"] = tensors["token_embd.weight"]
    return tensors


def read_tensors(config: ModelConfig, tensors: SavedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, values in float32), one at a time, in the order of `gguf_tensors`."""
    for name, stock in gguf_tensors(config).items():
        if isinstance(stock, Tensor):
            yield name, stock
            continue
        value = tensors.read(stock.name).to(torch.float32) + stock.offset
        value = value.T if stock.transposed else value
        if stock.pairs and ARCHITECTURES[config.model_type].neighbours:
            value = pairs_apart(value, config, stock.pairs, back=True)
        yield name, value.contiguous()
