"""Low-rank adapters: W + alpha / rank * B A in place of W, for any of a layer's projections.

    adapter = LoraAdapter(model, rank=16, alpha=32, targets=("q", "v"), seed=0)
    train(adapter.parameters())
    save_model(model, "chat/")                       # with the sums as matrices

The sum is computed for the complete matrix, once in the forward and once in the backward pass: this takes rank products
per weight, while a batch takes one per token, and the layer runs its usual kernels. It saves the optimizer's state and
the masters, but not the gradient of W, which exists for one layer at a time. W may be quantized (model/quantized.py).
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1: A starts random, B at zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmkit.errors import UserError
from llmkit.io.files import atomic_file
from llmkit.kernels.dispatch import once_differentiable
from llmkit.model.config import ModelConfig
from llmkit.model.families import FAMILIES
from llmkit.model.folder import write_tensors
from llmkit.model.transformer import MATRICES, Transformer
from llmkit.model.transformers_backend import TransformersModel
from llmkit.model.weights import embedding_name, pairs_apart, stacked_modules

# names of the matrices in each stacked matrix of a layer
PROJECTIONS = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
_PEFT_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight", "rows": "token_adapter.trainable_tokens_delta"}
TARGETS = tuple(name for names in PROJECTIONS.values() for name in names)


def projections(config: ModelConfig) -> dict[str, dict[str, tuple[str, int]]]:
    """Return, by parameter of a layer and name of a target, the module in a Hugging Face model and its rows.

    If the checkpoint has one module for several, such as phi3's qkv_proj, they are one target, "qkv".
    """
    out = {}
    for stacked, names in PROJECTIONS.items():
        modules = stacked_modules(config)[stacked]
        if len(modules) < len(names):
            names = ("up",) if stacked == "gate_up" and not config.gated_mlp else (stacked,)
        out[stacked] = dict(zip(names, modules, strict=True))
    return out


class _AddProduct(torch.autograd.Function):
    """Adds scale * up @ down in place to rows of a matrix, from `first` on, without a temporary of its size."""

    @staticmethod
    def forward(ctx, weight, up, down, first, scale):
        ctx.save_for_backward(up, down)
        ctx.rows, ctx.scale = slice(first, first + len(up)), scale
        weight[ctx.rows].addmm_(up, down, alpha=scale)
        ctx.mark_dirty(weight)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        up, down = ctx.saved_tensors
        rows = grad[ctx.rows]
        return grad, ctx.scale * (rows @ down.T), ctx.scale * (up.T @ rows), None, None


class _LowRankSum(nn.Module):
    """Adds a low-rank product to each adapted matrix of a stacked parameter."""

    def __init__(self, inputs: int, rows: dict[str, int], adapted: Sequence[str], rank: int, scale: float, draw):
        super().__init__()
        self.rows, self.scale = rows, scale
        down = {name: draw((rank, inputs), 1 / math.sqrt(inputs)) for name in adapted}
        self.down = nn.ParameterDict(down)
        self.up = nn.ParameterDict({name: down[name].new_zeros(rows[name], rank) for name in adapted})

    def forward(self, weight: Tensor) -> Tensor:
        if not isinstance(weight, nn.Parameter):  # just dequantized and not shared: add in place
            first = 0
            for name, rows in self.rows.items():
                if name in self.down:
                    weight = _AddProduct.apply(weight, self.up[name], self.down[name], first, self.scale)
                first += rows
            return weight
        matrices = [
            torch.add(matrix, self.up[name] @ self.down[name], alpha=self.scale) if name in self.down else matrix
            for name, matrix in zip(self.rows, weight.split(list(self.rows.values())), strict=True)
        ]
        return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


class _Rows(nn.Module):
    """An embedding or a head with some rows replaced by trained ones."""

    def __init__(self, weight: Tensor, token_ids: Sequence[int], dtype: torch.dtype):
        super().__init__()
        ids = torch.tensor(token_ids, device=weight.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.rows = nn.Parameter(weight.detach()[ids].to(dtype, copy=True))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.rows.dtype).index_copy(0, cast("Tensor", self.token_ids), self.rows)


class _Matrix(NamedTuple):
    """A parameter that gets adapters: its input size, the rows of its stacked matrices, and which of these are adapted.

    adapted  path of the adapter by name of the matrix
    """

    module: nn.Module
    attribute: str
    inputs: int
    rows: dict[str, int]
    adapted: dict[str, str]


class LoraAdapter:
    """Adapters on a model with frozen parameters.

    rank, alpha  of every adapter
    targets      projections that get an adapter in every layer, by the names in `projections`; None: all
    token_ids    tokens whose rows of the embedding, and of an untied head, are trained as well; ascending
    dtype        of the adapters, and of the sums unless the model's is wider; None: the model's
    """

    def __init__(
        self,
        model: Transformer,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        token_ids: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ):
        self.model, self.rank, self.alpha = model, rank, alpha
        self.targets = tuple(self._all_targets() if targets is None else targets)
        self.token_ids = tuple(token_ids)
        matrices = list(self._matrices())
        sides = [min(matrix.rows[name], matrix.inputs) for matrix in matrices for name in matrix.adapted]
        if rank > max(sides, default=0):
            raise UserError(
                f"--lora-rank: expected at most {max(sides, default=0)}, the smaller side of the adapted matrices, "
                f"found {rank}; --lora-rank none trains all parameters"
            )
        device, dtype = model.embed_tokens.device, dtype or model.embed_tokens.dtype
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, int], bound: float) -> Tensor:
            return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound).to(device, dtype)

        model.requires_grad_(False)
        self._low_rank: dict[str, tuple[_LowRankSum, str]] = {}
        for matrix in matrices:
            low_rank = _LowRankSum(matrix.inputs, matrix.rows, list(matrix.adapted), rank, alpha / rank, draw)
            parametrize.register_parametrization(matrix.module, matrix.attribute, low_rank, unsafe=True)
            self._low_rank |= {matrix.adapted[name]: (low_rank, name) for name in low_rank.down}
        self._rows: dict[str, _Rows] = {}
        tables = [(*table, getattr(*table[1:])) for table in self._tables() if token_ids]
        trained: dict[int, nn.Parameter] = {}  # by the weight's id: tied tables share their rows
        for path, module, attribute, weight in tables:
            rows = _Rows(weight, token_ids, dtype)
            if id(weight) in trained:
                rows.rows = trained[id(weight)]
            else:
                self._rows[path], trained[id(weight)] = rows, rows.rows
            parametrize.register_parametrization(module, attribute, rows, unsafe=True)

    def _all_targets(self) -> Iterable[str]:
        return chain.from_iterable(projections(self.model.config).values())

    def _matrices(self) -> Iterator[_Matrix]:
        known, shapes = projections(self.model.config), self.model.config.layer_shapes()
        for index, layer in enumerate(self.model.layers):
            for stacked in MATRICES:
                rows = {target: count for target, (_, count) in known[stacked].items()}
                adapted = {target: f"layers.{index}.{target}" for target in rows if target in self.targets}
                if adapted:
                    yield _Matrix(layer, stacked, shapes[stacked][1], rows, adapted)

    def _tables(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield path, module and parameter of the embedding, and of an untied head."""
        yield "embed_tokens", self.model, "embed_tokens"
        if self.model.lm_head is not None:
            yield "lm_head", self.model, "lm_head"

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of every A, (rank, in), `PATH.down`, and B, (out, rank), `PATH.up`, such as
        `layers.0.q.down`, and of the rows of tokens, `PATH.rows`."""
        for path, (low_rank, name) in self._low_rank.items():
            yield f"{path}.down", low_rank.down[name]
            yield f"{path}.up", low_rank.up[name]
        for path, table in self._rows.items():
            yield f"{path}.rows", table.rows

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Set the adapters by the names of `parameters`."""
        for name, parameter in self.parameters():
            parameter.copy_(values[name])

    def save(self, folder: Path, base: str, tokens: int | None = None) -> None:
        """Write adapter_config.json, which names the base, and adapter_model.safetensors in PEFT's format.

        Rows of ids from `tokens` on, which PEFT's model does not have, are left out.
        """
        saved_ids = [token for token in self.token_ids if tokens is None or token < tokens]
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters():
            path, _, kind = name.rpartition(".")
            value = parameter.detach().to("cpu", torch.float32)
            value = value[: len(saved_ids)] if kind == "rows" else self._as_stored(path, kind, value)
            tensors[f"base_model.model.{self._module(path)}.{_PEFT_NAMES[kind]}"] = value.contiguous()
        peft_config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            **self._peft_modules(),
        }
        if saved_ids:
            last_names = [self._module(path).split(".")[-1] for path in self._rows]
            peft_config["trainable_token_indices"] = dict.fromkeys(last_names, saved_ids)
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / "adapter_config.json", "w") as handle:
            json.dump(peft_config, handle, indent=2)
        write_tensors(folder / "adapter_model.safetensors", tensors)

    def _module(self, path: str) -> str:
        """Return the name of the module in a Hugging Face model."""
        config = self.model.config
        if path == "lm_head":
            return path
        if path == "embed_tokens":
            return embedding_name(config).removesuffix(".weight")
        _, index, target = path.split(".")
        family = FAMILIES[config.model_type]
        module, _ = next(modules[target] for modules in projections(config).values() if target in modules)
        return f"{family.prefix}{family.layers}.{index}.{module}"

    def _as_stored(self, path: str, kind: str, value: Tensor) -> Tensor:
        """Reorder the rotated rows of B as in the checkpoint."""
        config, target = self.model.config, path.split(".")[-1]
        if kind == "down" or target not in ("q", "k", "qkv") or config.learned_positions:
            return value
        return pairs_apart(value, config, sum(config.stacked_rows["qkv"][:2]) if target == "qkv" else len(value))

    def _peft_modules(self) -> dict[str, Any]:
        names = [self._module(f"layers.0.{target}").split(".")[-1] for target in self.targets]
        transposed = FAMILIES[self.model.config.model_type].transposed
        return {"target_modules": list(dict.fromkeys(names))} | ({"fan_in_fan_out": True} if transposed else {})


class LinearAdapter(LoraAdapter):
    """Adapters on the linear modules of a model that transformers computes, except its head and experts in one tensor.
    Parameters as in `LoraAdapter`, but targets are paths of modules."""

    model: TransformersModel

    def _all_targets(self) -> Iterable[str]:
        modules = self.model.module.named_modules()
        return [path for path, module in modules if isinstance(module, nn.Linear) and module is not self.model.head]

    def _matrices(self) -> Iterator[_Matrix]:
        for path in self.targets:
            linear = self.model.module.get_submodule(path)
            rows, inputs = linear.weight.shape
            yield _Matrix(linear, "weight", inputs, {"weight": rows}, {"weight": path})

    def _tables(self) -> Iterator[tuple[str, nn.Module, str]]:
        paths = {module: path for path, module in self.model.module.named_modules()}
        return ((paths[table], table, "weight") for table in self.model.tables)

    def _module(self, path: str) -> str:
        return path

    def _as_stored(self, path: str, kind: str, value: Tensor) -> Tensor:
        return value

    def _peft_modules(self) -> dict[str, Any]:
        return {"target_modules": list(self.targets)}
