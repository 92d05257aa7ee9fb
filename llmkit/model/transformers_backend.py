"""Models of families that are not in model/families.py, computed by the package transformers.

A `TransformersModel` has the interface of `Transformer`: token ids go in, hidden states come out, `logits` and `loss`
complete them. Documents packed into a row, and answers that share a prompt, become separate rows, padded on the right,
so that no causal architecture, recurrent ones included, sees across documents.

Code of a folder is never run. llmkit reads the weights, so transformers opens no file and no address.

B batch, T tokens, N documents, L tokens of the longest of them, C hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmkit.errors import UserError
from llmkit.io.foreign import integer, shown
from llmkit.io.progress import say
from llmkit.io.ranks import launch
from llmkit.kernels.attention import Branching, Packing
from llmkit.model.config import SIZES, ModelConfig
from llmkit.model.families import FAMILIES
from llmkit.model.transformer import Transformer

PACKAGE = "transformers>=5"
CONTEXT = 2048  # tokens, if a configuration has no limit: the default of lm-evaluation-harness
_CACHES = ("cache", "past_key_values", "cache_params")  # names of the argument: from release 5.2x on, then before


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(ModelConfig):
    """Sizes of a model that transformers computes.

    parameters  number of parameters of the saved model
    stock       transformers' own configuration
    """

    backend: ClassVar[str] = "transformers"
    parameters: int
    stock: Any

    def __post_init__(self) -> None:
        """Check nothing: transformers has checked the sizes."""

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the saved model."""
        return self.parameters

    def flops_per_token(self, context: int) -> float:
        """Estimate the training FLOPs per token: 6 per parameter, including all experts of a mixture, and attention."""
        return 6.0 * self.parameters + 6 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * context


@cache
def load_package() -> Any:
    """Import transformers and silence it. Raises UserError without release 5 or later."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"--backend transformers: expected the package, found none ({error}); pip install '{PACKAGE}'"
        ) from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UserError(
            f"--backend transformers: expected release 5, found {transformers.__version__}; pip install '{PACKAGE}'"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@cache
def announce(folder: str, family: str) -> None:
    """Print once that transformers computes this family, and the cost."""
    say(
        f"{folder}: family {family!r} is not native; running it through transformers (about 2x slower sampling on a "
        "CPU, and packed documents are padded: docs/models.md)"
    )


def read_config(values: Mapping[str, Any], where: str) -> TransformersConfig:
    """Convert a parsed `config.json`. Raises UserError unless transformers has a causal language model for it."""
    package, family = load_package(), values.get("model_type")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        code = "; its own code (auto_map) is never run" if values.get("auto_map") else ""
        raise UserError(
            f"{where}: expected a model_type of transformers {package.__version__} or one of {', '.join(FAMILIES)}, "
            f"found {shown(family)}{code}; choose another model, or a newer transformers"
        )
    try:
        stock = CONFIG_MAPPING[family].from_dict(_with_floats(values))
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(stock), None)
        if kind is None or stock.is_encoder_decoder:
            raise UserError(f"{where}: expected a decoder-only language model, found {family!r}; choose another model")
        for name, most in SIZES.items():  # before memory is allocated for them
            integer({name: getattr(stock.get_text_config(), name, None)}, name, where, at_most=most)
        for config in (stock, stock.get_text_config()):
            for name, value in vars(config).items():
                if "drop" in name and isinstance(value, float):  # no dropout, as in our own families
                    setattr(config, name, 0.0)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in kind._from_config(stock).parameters())
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where}: transformers {package.__version__} refuses this {family!r}: {_first_line(error)}"
        ) from error
    sizes = stock.get_text_config()

    def size(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := getattr(sizes, name, None), int)), None)

    hidden, heads = size("hidden_size") or 0, size("num_attention_heads") or 0
    ends = values.get("eos_token_id")
    return TransformersConfig(
        vocab_size=size("vocab_size") or 0,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner") or 4 * hidden,
        num_hidden_layers=size("num_hidden_layers") or 1,
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads") or heads,
        head_dim=size("head_dim") or hidden // max(1, heads),
        max_position_embeddings=size("n_positions", "max_position_embeddings", "n_ctx", "seq_length") or CONTEXT,
        tie_word_embeddings=bool(stock.tie_word_embeddings),
        model_type=family,
        bos_token_id=integer(values, "bos_token_id", where, at_least=-1),
        eos_token_id=tuple(ends) if isinstance(ends, list) else ends,
        parameters=parameters,
        stock=stock,
    )


def _with_floats(value: Any) -> Any:
    """Replace each `{"__float__": "Infinity"}`, a number that JSON cannot express, by the float."""
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {name: _with_floats(item) for name, item in value.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TransformersModel(Transformer):
    """A language model of transformers with the interface of `Transformer`.

    module  transformers' own model, with the same parameters
    """

    config: TransformersConfig
    layers = ()  # nothing is compiled or sharded by layer

    def __init__(self, config: TransformersConfig, module: Any) -> None:
        nn.Module.__init__(self)  # without building a decoder
        self.config, self.module, self._checkpoint_layers = config, module, False
        accepted = inspect.signature(module.base_model.forward).parameters
        self.cache_name = next((name for name in _CACHES if name in accepted), None)
        self._has_positions = "position_ids" in accepted
        self._scale: float | None = self._head_scale()

    @property
    def head(self) -> nn.Linear:
        """The module that maps hidden states to logits."""
        return self.module.get_output_embeddings()

    @property
    def tables(self) -> list[nn.Embedding | nn.Linear]:
        """Modules with a row per token."""
        return [self.module.get_input_embeddings(), self.head]

    @classmethod
    def load(
        cls,
        config: TransformersConfig,
        name: str,
        state: dict[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> TransformersModel:
        """Build the model from a folder's tensors. Raises UserError if any is missing, unexpected or misshapen."""
        if launch().size > 1:
            raise UserError(
                f"--backend transformers: expected one process, found {launch().size}; start without torchrun"
            )
        kind = cls.kind(config)
        doubt = "are config.json and weights of one model?"
        try:
            module, info = kind.from_pretrained(
                None, config=config.stock, state_dict=state, dtype=dtype, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"{name}: transformers cannot load these tensors: {_first_line(error)}; {doubt}") from error
        for key, shape, expected in sorted(info["mismatched_keys"]):
            raise UserError(f"{name}: tensor {key}: expected shape {list(expected)}, found {list(shape)}; {doubt}")
        for fault in ("missing", "unexpected"):
            for key in sorted(info[f"{fault}_keys"]):
                raise UserError(f"{name}: {fault} tensor {key} for model_type {config.model_type}")
        model = cls(config, module.to(device)).eval()
        if config.model_type not in FAMILIES:
            announce(name, config.model_type)
        return model

    @property
    def embed_tokens(self) -> Tensor:  # type: ignore[override]
        """Weight of the embedding (V, hidden)."""
        return self.module.get_input_embeddings().weight

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head (V, hidden); the embedding if they are tied."""
        return self.head.weight  # type: ignore[return-value]

    @property
    def checkpoint_layers(self) -> bool:  # type: ignore[override]
        """True if backward recomputes the activations of each layer, in families that support it."""
        return self._checkpoint_layers

    @checkpoint_layers.setter
    def checkpoint_layers(self, wanted: bool) -> None:
        self._checkpoint_layers = wanted
        if wanted:
            enable = getattr(self.module, "activation_checkpointing_enable", None)  # from release 5.2x on
            (enable or self.module.gradient_checkpointing_enable)({"use_reentrant": False})

    def run(self, token_ids_NL: Tensor, cache: Any = None, **options: Any) -> Tensor:
        """Return hidden states (N, L, C), ready for the head, or logits (N, L, V) if the head is more than a matrix.

        cache  of transformers: the tokens follow those in it, and are added to it
        """
        options |= {"use_cache": False} if cache is None else {"use_cache": True, str(self.cache_name): cache}
        if not self._has_positions:
            options.pop("position_ids", None)
        if self._scale is None:
            return self.module(token_ids_NL, **options).logits
        hidden_NLC = self.module.base_model(token_ids_NL, **options)[0]
        # mamba2's are float32; `weight` of a table with adapters would be computed here
        hidden_NLC = hidden_NLC.to(next(self.module.get_input_embeddings().parameters()).dtype)
        return hidden_NLC if self._scale == 1.0 else hidden_NLC * self._scale

    @torch.no_grad()
    def _head_scale(self) -> float | None:
        """Measure the scale s of logits = s * hidden @ head.T; return None if the head is more than that.

        Raises UserError if a token sees later ones.
        """
        head = self.head
        ids_2L = torch.arange(8, device=self.embed_tokens.device).repeat(2, 1) % self.config.vocab_size
        ids_2L[1, -1] = 0
        self._scale = None
        logits_2LV = self.run(ids_2L).float()
        near = 1e-3 if logits_2LV.dtype == self.embed_tokens.dtype else 0.1  # tolerance relative to the largest logit
        if not _close(logits_2LV[0, :-1], logits_2LV[1, :-1], near):
            raise UserError(
                f"model_type {self.config.model_type!r}: expected causal layers, found tokens that see later ones"
            )
        capped = any("cap" in name and value for name, value in vars(self.config.stock.get_text_config()).items())
        if capped or not isinstance(head, nn.Linear) or head.bias is not None:
            return None
        self._scale = 1.0
        hidden_2LC = self.run(ids_2L)
        if not isinstance(hidden_2LC, Tensor) or hidden_2LC.shape[-1] != head.weight.shape[1]:
            return None
        plain_2LV = F.linear(hidden_2LC, head.weight).float()
        scale = float((logits_2LV * plain_2LV).sum() / plain_2LV.square().sum())
        scale = 1.0 if abs(scale - 1.0) < near else scale
        return scale if _close(logits_2LV, scale * plain_2LV, near) else None

    def forward(
        self,
        token_ids_BT: Tensor,
        *,
        doc_ids: Tensor | Packing | Branching | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the input of `logits` and `logprobs`: hidden states as `Transformer.forward`, or logits."""
        training = self.training and torch.is_grad_enabled()
        if self.module.training != training:
            self.module.train(training)
        if doc_ids is None:
            states_BTC = self.run(token_ids_BT)
            return states_BTC if rows is None else states_BTC.flatten(0, 1)[rows]
        ids, states, positions = token_ids_BT.flatten(), [], []
        for position_NL, is_token_NL in _document_rows(doc_ids):
            states.append(self.run(ids[position_NL])[is_token_NL])
            positions.append(position_NL[is_token_NL])
        position = torch.cat(positions)
        # a token that several answers share is computed with each of them, and taken from the first
        order = torch.arange(len(position), device=position.device)
        first = torch.full_like(ids, len(position)).scatter_reduce(0, position, order, "amin")
        if rows is None:
            return torch.cat(states)[first].unflatten(0, token_ids_BT.shape)
        return torch.cat(states)[first[rows]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., hidden) to logits (..., V)."""
        return hidden if self._scale is None else F.linear(hidden, self.head_weight)

    def loss(self, token_ids_BT: Tensor, targets_BT: Tensor, doc_ids: Any = None, **options: Any) -> Tensor:
        """Return the cross-entropy of the targets, as `Transformer.loss`."""
        if self._scale is not None:
            return super().loss(token_ids_BT, targets_BT, doc_ids, **options)
        options.pop("chunk_tokens", None)
        logits_NV = self(token_ids_BT, doc_ids=doc_ids).flatten(0, 1).float()
        return F.cross_entropy(logits_NV, targets_BT.flatten(), **options)

    def target_logprobs(self, hidden_NC: Tensor, target_N: Tensor) -> Tensor:
        """Return the log-probability of each target, as `Transformer.target_logprobs`."""
        return self.logprobs(hidden_NC, target_N, 1.0)[0]

    def logprobs(self, hidden_NC: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each target and the entropy, as `Transformer.logprobs`."""
        if self._scale is not None:
            return super().logprobs(hidden_NC, target_N, temperature)
        logprobs_NV = torch.log_softmax(hidden_NC.float() / temperature, -1)
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        return logprobs_NV.gather(1, target_N.unsqueeze(1)).squeeze(1), entropy_N

    def grow(self, rows: int) -> None:
        """Resize embedding and head to `rows` rows."""
        self.module.resize_token_embeddings(rows, mean_resizing=False)
        self.config = replace(self.config, vocab_size=rows)

    @classmethod
    def kind(cls, config: TransformersConfig) -> Any:
        """Return the model class of transformers."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config.stock)]

    @torch.no_grad()
    def merged(self) -> TransformersModel:
        """Return a copy with adapters merged, which shares all other tensors; without adapters, the model itself."""
        if not any(map(parametrize.is_parametrized, self.module.modules())):
            return self
        model = copy.deepcopy(self, {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())})
        _merge_adapters(model.module)
        return model

    @torch.no_grad()
    def save(self, folder: Path, dtype: torch.dtype, max_shard_size: int = 5 * 10**9) -> None:
        """Write configuration and weights in transformers' format. Adapters are merged in place: stop training."""
        _merge_adapters(self.module)
        self.module.tie_weights()
        module = self.module if self.embed_tokens.dtype == dtype else self.module.to(dtype)
        ends = list(self.config.eos_token_ids)
        module.config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
        tokens = {"bos_token_id": self.config.bos_token_id, "eos_token_id": module.config.eos_token_id}
        module.generation_config = load_package().GenerationConfig(**tokens)
        module.save_pretrained(folder, max_shard_size=max_shard_size)
        for path in folder.glob("*.safetensors"):  # save_file makes them readable by the owner only
            path.chmod((folder / "config.json").stat().st_mode)


class TransformersReward(TransformersModel):
    """A decoder of transformers whose head returns `heads` scores instead of logits: its sequence classifier."""

    @classmethod
    def kind(cls, config: TransformersConfig) -> Any:
        """Return the model class of transformers. Raises UserError if the family has none with a matrix of scores."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config.stock), None)
        with torch.device("meta"):
            head = getattr(kind and kind._from_config(config.stock), "score", None)
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise UserError(
                f"model_type {config.model_type!r}: expected a family with a reward model in transformers whose head "
                "is a matrix named score; choose another model"
            )
        return kind

    @classmethod
    def of(cls, model: TransformersModel, heads: int, draw: Callable[[int, int], Tensor]) -> TransformersReward:
        """Build a reward model from the layers of a language model, with the head `draw(heads, hidden)`."""
        stock = copy.deepcopy(model.module.config)  # unlike model.config.stock, with added rows
        stock.num_labels = heads
        config = replace(model.config, stock=stock)
        kind = cls.kind(config)
        with torch.device("meta"):
            module = kind._from_config(stock)
        setattr(module, module.base_model_prefix, model.module.base_model)
        module.score.weight = nn.Parameter(draw(heads, module.score.in_features).to(model.embed_tokens))
        return cls(config, module).train(model.training)

    @property
    def head(self) -> nn.Linear:
        """The module that maps hidden states to scores."""
        return self.module.score

    @property
    def tables(self) -> list[nn.Embedding | nn.Linear]:
        """Modules with a row per token."""
        return [self.module.get_input_embeddings()]

    @property
    def score(self) -> Tensor:
        """Weight of the head (heads, hidden)."""
        return self.module.score.weight

    def scores(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., hidden) to scores (..., heads), in float32."""
        return F.linear(hidden.float(), self.score.float())

    def _head_scale(self) -> float:
        return 1.0  # hidden states are not scaled


def _merge_adapters(module: nn.Module) -> None:
    """Replace parameters with adapters by their sums; torch's own removal would write into shared tensors."""
    for owner in list(module.modules()):
        if parametrize.is_parametrized(owner):
            values = {name: getattr(owner, name) for name in owner.parametrizations}  # type: ignore[union-attr]
            owner.__class__ = parametrize.type_before_parametrizations(owner)
            del owner.parametrizations
            for name, value in values.items():
                owner.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _close(actual: Tensor, expected: Tensor, near: float) -> bool:
    return bool((actual - expected).abs().max() <= near * expected.abs().max())


def _document_rows(doc_ids: Tensor | Packing | Branching) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield documents in batches, longest first: token positions in the flat batch (N, L), right-padded, and a mask.

    A token that only itself sees ends a document, or one of the answers that share a prompt: all tokens that it sees
    are the row. A batch has documents of more than half the length of its longest, so that less than half is padding.
    """
    if isinstance(doc_ids, Branching):
        visible_BTT = doc_ids.mask().squeeze(1)  # the keys that each query sees
    else:
        ids_BT = doc_ids.doc_ids if isinstance(doc_ids, Packing) else doc_ids
        visible_BTT = (ids_BT.unsqueeze(2) == ids_BT.unsqueeze(1)).tril()
    batch_N, end_N = (visible_BTT.sum(1) == 1).nonzero(as_tuple=True)
    visible_NT = visible_BTT[batch_N, end_N]
    length_N, longest_first = visible_NT.sum(1).sort(descending=True, stable=True)
    position_NT = (~visible_NT[longest_first]).byte().argsort(dim=1, stable=True)
    position_NT += batch_N[longest_first].unsqueeze(1) * visible_BTT.shape[1]
    lengths, start = length_N.tolist(), 0
    while start < len(lengths):
        longest = lengths[start]
        stop = next((i for i in range(start, len(lengths)) if lengths[i] <= longest / 2), len(lengths))
        is_token_NL = torch.arange(longest, device=position_NT.device) < length_N[start:stop].unsqueeze(1)
        yield position_NT[start:stop, :longest], is_token_NL
        start = stop
