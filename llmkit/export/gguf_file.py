"""Write a model as a GGUF file, with the keys and tensors that llama.cpp's own converter writes for its family.

Some of llama.cpp's architectures rotate neighbouring channels, (2i, 2i + 1), as we do; others rotate channels half a
head apart, like Hugging Face. Models that llama.cpp computes differently are refused, or get a note. Tensors are read,
converted and written one at a time.
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
    """llmkit's knowledge of an architecture of llama.cpp.

    neighbours    rotated channels are neighbours
    biases        supported biases of a layer's matrices
    scalings      kinds of rope scaling that it computes as we do
    square        the heads must add up to the hidden size
    window_every  every n-th layer has no window; None if windows are not supported
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
# --dtype -> gguf's names for the types of the file and of its matrices
TYPES = {
    "float32": ("ALL_F32", "F32"),
    "bfloat16": ("MOSTLY_BF16", "BF16"),
    "float16": ("MOSTLY_F16", "F16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
}


@dataclass(frozen=True)
class GgufPlan:
    """What will be written to a GGUF file.

    context  longest context that llama.cpp computes as we do, in tokens
    notes    differences between llama.cpp and the model folder
    """

    tokenizer: GgufTokenizer
    context: int
    dtype: str
    notes: tuple[str, ...]


def plan_gguf(source: Source, dtype: str) -> GgufPlan:
    """Plan the file. Raises UserError if llama.cpp cannot load the model or would compute it differently."""
    if source.heads is not None:
        raise UserError(f"{source.folder}: a reward model, whose scores llama.cpp does not support; use --format hf")
    config = source.config
    _check_family(config, str(source.folder / CONFIG))
    tokenizer = load_tokenizer(source.folder)
    tokenizer.check_fits(config.vocab_size)
    ends = [end for end in config.eos_token_ids if 0 <= end < config.vocab_size]
    if tokenizer.eos_id is not None:  # some folders name an end token only there
        ends.append(tokenizer.eos_id)
    vocabulary = gguf_tokenizer(tokenizer, config.vocab_size, ends)
    notes = []
    windows = [window for window in config.layer_windows or () if window is not None]
    if ARCHITECTURES[config.model_type].window_every:
        windows = []
    context = min([config.max_position_embeddings, *windows])
    if context < config.max_position_embeddings:
        notes.append(
            f"the context is reduced from {config.max_position_embeddings} to {context} tokens, the sliding window, "
            "which llama.cpp does not support for this family"
        )
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "longrope":
        first = config.rope_scaling.original_max_position_embeddings
        notes.append(
            f"llama.cpp scales positions by the context size that it is started with: "
            f"for up to {counted(first, 'token')} start it with -c {first}"
        )
    return GgufPlan(vocabulary, context, dtype, (*notes, *vocabulary.notes))


def _check_family(config: ModelConfig, where: str) -> None:
    """Raise UserError, prefixed by `where`, unless llama.cpp computes this model as we do."""
    theirs = ARCHITECTURES.get(config.model_type)
    if theirs is None:
        raise UserError(
            f"{where}: GGUF export supports {', '.join(ARCHITECTURES)}, not {config.model_type}; "
            "use --format hf, then llama.cpp's convert_hf_to_gguf.py"
        )
    name, every, layers = theirs.name, theirs.window_every, range(config.num_hidden_layers)
    for bias in config.layer_shapes().keys() & {*ATTENTION_BIASES, *MLP_BIASES} - {*theirs.biases}:
        kind = "attention_bias" if bias in ATTENTION_BIASES else "mlp_bias"
        raise UserError(f"{where}: llama.cpp's {name} does not support {kind}; --format hf keeps it")
    if theirs.square and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError(
            f"{where}: llama.cpp's {name} expects head_dim {config.hidden_size // config.num_attention_heads}, "
            f"found {config.head_dim}"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type not in theirs.scalings:
        raise UserError(f"{where}: llama.cpp's {name} does not support rope scaling {scaling.rope_type}")
    if scaling is not None and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True):
        raise UserError(f"{where}: llama.cpp supports yarn only with beta_fast 32, beta_slow 1 and truncate")
    if every is not None:
        windows = config.layer_windows or (None,) * config.num_hidden_layers
        without = [i for i, window in enumerate(windows) if window is None]
        if (name != "olmo2" or config.layer_windows) and without != [i for i in layers if (i + 1) % every == 0]:
            raise UserError(f"{where}: llama.cpp's {name} expects a window in all layers but the last of every {every}")
        local = config.sliding_rope
        if (local is None and scaling is not None) or (
            local is not None and (local.scaling or (name == "olmo2" and local.theta != config.rope_theta))
        ):
            raise UserError(f"{where}: llama.cpp's {name} does not support the RoPE of the layers with a window")
    if name == "smollm3" and config.no_rope_layers != tuple(i for i in layers if (i + 1) % 4 == 0):
        raise UserError(f"{where}: llama.cpp's smollm3 expects RoPE in all layers but the last of every 4")
    if name == "gemma2" and None in (config.attention_softcap, config.logits_softcap):
        raise UserError(f"{where}: llama.cpp's gemma2 requires softcaps")
    if name == "gemma3" and config.logits_softcap is not None:
        raise UserError(f"{where}: llama.cpp's gemma3 does not support softcaps")
    if name in ("gemma2", "gemma3"):
        largest = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[name]  # llama.cpp recognizes 27B by this
        divisor = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != divisor:
            raise UserError(
                f"{where}: llama.cpp's {name} expects query_pre_attn_scalar {divisor}, "
                f"found {config.query_pre_attn_scalar}"
            )


def write_gguf(path: str, source: Source, plan: GgufPlan, advance: Callable[[float], object]) -> None:
    """Write the file atomically; `advance` is called with the parameter count of each finished tensor.

    Raises UserError for weights that overflow the precision.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    # as in llama.cpp's converter: vectors are float32, matrices whose rows are not a multiple of a block float16
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
                # as returned by gguf.quants: bytes for types that numpy lacks
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
                # not write_tensor_data: on a full disk numpy's tofile silently loses the last 4 kB
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
    # llama.cpp takes a model with this name for Phi-3 itself, and requires its tokens
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
        # llama.cpp multiplies the stored factor by its own
        own = max(1.0, 0.1 * math.log(scaling.factor) + 1.0) if scaling.rope_type == "yarn" else 1.0
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / own)


def gguf_tensors(config: ModelConfig) -> dict[str, StockTensor | Tensor]:
    """Map the GGUF name of every tensor to the folder's tensor, or to computed frequency factors."""
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
    if theirs.name == "olmo2" and config.tied_on_disk:  # olmo2 cannot mark the head as tied to the embedding
        tensors["output.weight"] = tensors["token_embd.weight"]
    return tensors


def read_tensors(config: ModelConfig, tensors: SavedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, float32 values) one at a time, in the order of `gguf_tensors`."""
    for name, stock in gguf_tensors(config).items():
        if isinstance(stock, Tensor):
            yield name, stock
            continue
        value = tensors.read(stock.name).to(torch.float32) + stock.offset
        value = value.T if stock.transposed else value
        if stock.pairs and ARCHITECTURES[config.model_type].neighbours:
            value = pairs_apart(value, config, stock.pairs, back=True)
        yield name, value.contiguous()
