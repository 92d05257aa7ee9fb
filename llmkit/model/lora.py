"""Low-rank adapters: W + alpha / rank * B A in place of W, for any of a layer's projections.

    adapter = LoraAdapter(model, rank=16, alpha=32, targets=("q", "v"), seed=0)
    train(adapter.parameters())
    save_model(model, "chat/")                       # whose matrices are the sums

The sum is made for a whole matrix, once in the forward pass and once in the backward pass: rank times fewer products
than the batch's, and the layer runs the kernels that it always runs. What is saved is the optimizer's state and the
masters, not the gradient of W, which lives for a moment in each layer. W may be held quantized (model/quantized.py).
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1: A is drawn, B is zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from llmkit.errors import UserError
from llmkit.io.files import atomic_file
from llmkit.model.config import ModelConfig
from llmkit.model.families import FAMILIES
from llmkit.model.folder import write_tensors
from llmkit.model.transformer import MATRICES, Transformer
from llmkit.model.transformers_backend import TransformersModel
from llmkit.model.weights import embedding_name, pairs_apart, stacked_modules

# the names of the matrices that a layer's matrices stack
PROJECTIONS = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
TARGETS = tuple(name for names in PROJECTIONS.values() for name in names)


def projections(config: ModelConfig) -> dict[str, dict[str, tuple[str, int]]]:
    """The module in a Hugging Face model, and its rows, by parameter of a layer and name of a target.

    Where the checkpoint has one module for several, as phi3's qkv_proj, that is one target, "qkv".
    """
    out = {}
    for stacked, names in PROJECTIONS.items():
        modules = stacked_modules(config)[stacked]
        if len(modules) < len(names):
            names = ("up",) if stacked == "gate_up" and not config.gated_mlp else (stacked,)
        out[stacked] = dict(zip(names, modules, strict=True))
    return out


class _AddProduct(torch.autograd.Function):
    """Adds scale * up @ down in place to rows of a matrix, from `first` on: no temporary of its size in either pass."""

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
    """Adds to a stacked parameter a low-rank product for each adapted matrix of it."""

    def __init__(self, inputs: int, rows: dict[str, int], adapted: Sequence[str], rank: int, scale: float, draw):
        super().__init__()
        self.rows, self.scale = rows, scale
        down = {name: draw((rank, inputs), 1 / math.sqrt(inputs)) for name in adapted}
        self.down = nn.ParameterDict(down)
        self.up = nn.ParameterDict({name: down[name].new_zeros(rows[name], rank) for name in adapted})

    def forward(self, weight: Tensor) -> Tensor:
        if not isinstance(weight, nn.Parameter):  # just made of codes, and nobody else's
            first = 0
            for name, rows in self.rows.items():
                if name in self.down:
                    weight = _AddProduct.apply(weight, self.up[name], self.down[name], first, self.scale)
                first += rows
            return weight
        if list(self.down) == list(self.rows):
            change = [self.up[name] @ self.down[name] for name in self.rows]
            return torch.add(weight, torch.cat(change) if len(change) > 1 else change[0], alpha=self.scale)
        slices = weight.split(list(self.rows.values()))
        return torch.cat(
            [
                torch.add(part, self.up[name] @ self.down[name], alpha=self.scale) if name in self.down else part
                for name, part in zip(self.rows, slices, strict=True)
            ]
        )


class _Rows(nn.Module):
    """An embedding or a head in which some rows are trained and replace its own."""

    def __init__(self, weight: Tensor, token_ids: Sequence[int], dtype: torch.dtype):
        super().__init__()
        ids = torch.tensor(token_ids, device=weight.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.rows = nn.Parameter(weight.detach()[ids].to(dtype, copy=True))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.rows.dtype).index_copy(0, cast("Tensor", self.token_ids), self.rows)


def _drawing(seed: int, device: torch.device, dtype: torch.dtype) -> Callable[[tuple[int, int], float], Tensor]:
    """What draws matrices uniformly within a bound, from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, bound: torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound).to(device, dtype)


class LoraAdapter:
    """Adapters on a model, whose own parameters are frozen.

    rank, alpha  of every adapter
    targets      the projections that get one, in every layer, by the names in `projections`; None is all
    token_ids    tokens whose rows of the embedding, and of a head of its own, are trained as well; ascending
    dtype        of the adapters, and of the sums where the model's is not wider; None is the model's
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
        known, shapes, matrices = projections(model.config), model.config.layer_shapes(), {}
        targets = [name for names in known.values() for name in names] if targets is None else targets
        for stacked in MATRICES:
            sizes = {target: rows for target, (_, rows) in known[stacked].items()}
            if adapted := [target for target in sizes if target in targets]:
                matrices[stacked] = (shapes[stacked][1], sizes, adapted)
        largest = max(min(sizes[name], inputs) for inputs, sizes, adapted in matrices.values() for name in adapted)
        if rank > largest:
            raise UserError(
                f"--lora-rank: expected at most {largest}, the smaller side of the matrices that get an adapter, "
                f"found {rank}; --lora-rank none trains all parameters"
            )
        self.model, self.rank, self.alpha, self.targets = model, rank, alpha, tuple(targets)
        self.token_ids = tuple(token_ids)
        dtype = dtype or model.embed_tokens.dtype
        draw = _drawing(seed, model.embed_tokens.device, dtype)
        model.requires_grad_(False)
        for layer in model.layers:
            for stacked, (inputs, sizes, adapted) in matrices.items():
                low_rank = _LowRankSum(inputs, sizes, adapted, rank, alpha / rank, draw)
                parametrize.register_parametrization(layer, stacked, low_rank, unsafe=True)
        for table in self._tables:
            rows = _Rows(getattr(model, table), token_ids, dtype)
            parametrize.register_parametrization(model, table, rows, unsafe=True)

    @property
    def _tables(self) -> tuple[str, ...]:
        """The parameters of the model some rows of which are trained."""
        if not self.token_ids:
            return ()
        return ("embed_tokens",) if self.model.lm_head is None else ("embed_tokens", "lm_head")

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of every A, (rank, in), and B, (out, rank): `layers.0.q.down` and `layers.0.q.up`; and of
        the rows of tokens, `embed_tokens.rows` and `lm_head.rows`."""
        for index, layer in enumerate(self.model.layers):
            for stacked in MATRICES:
                if not parametrize.is_parametrized(layer, stacked):
                    continue
                low_rank = layer.parametrizations[stacked][-1]  # type: ignore[index]
                if not isinstance(low_rank, _LowRankSum):  # a matrix that is quantized, and no target
                    continue
                for name in low_rank.down:
                    yield f"layers.{index}.{name}.down", low_rank.down[name]
                    yield f"layers.{index}.{name}.up", low_rank.up[name]
        for table in self._tables:
            yield f"{table}.rows", cast("_Rows", self.model.parametrizations[table][0]).rows  # type: ignore[index]

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Set the adapters by the names of `parameters`."""
        for name, parameter in self.parameters():
            parameter.copy_(values[name])

    def save(self, folder: Path, base: str, tokens: int | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them, beside the path of the base.

        Rows of ids from `tokens` on, which PEFT's model has not, are left out.
        """
        tensors, config = {}, self.model.config
        family = FAMILIES[config.model_type]
        modules = {name: module for names in projections(config).values() for name, (module, _) in names.items()}
        saved_ids = [token for token in self.token_ids if tokens is None or token < tokens]
        for name, parameter in self.parameters():
            value = parameter.detach().to("cpu", torch.float32)
            if name.endswith(".rows"):
                module = "lm_head" if name.startswith("lm_head") else embedding_name(config).removesuffix(".weight")
                tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"] = value[: len(saved_ids)]
                continue
            _, index, target, side = name.split(".")
            if side == "up" and target in ("q", "k", "qkv") and not config.learned_positions:
                turned = sum(config.stacked_rows["qkv"][:2]) if target == "qkv" else len(value)
                value = torch.cat([pairs_apart(value[:turned], config), value[turned:]])
            letter = "A" if side == "down" else "B"
            module = f"{family.prefix}{family.layers}.{index}.{modules[target]}"
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = value.contiguous()
        names = {"embed_tokens": family.tables["embed_tokens"], "lm_head": "lm_head"}
        self._write(
            folder,
            base,
            tensors,
            list(dict.fromkeys(modules[name].split(".")[-1] for name in self.targets)),
            {names[table]: saved_ids for table in self._tables if saved_ids},
            family.transposed,
        )

    def _write(
        self,
        folder: Path,
        base: str,
        tensors: dict[str, Tensor],
        modules: list[str],
        token_ids: dict[str, list[int]],
        transposed: bool = False,
    ) -> None:
        peft_config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": modules,
        }
        if transposed:
            peft_config["fan_in_fan_out"] = True
        if token_ids:
            peft_config["trainable_token_indices"] = token_ids
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / "adapter_config.json", "w") as handle:
            json.dump(peft_config, handle, indent=2)
        write_tensors(folder / "adapter_model.safetensors", tensors)


class LinearAdapter(LoraAdapter):
    """Adapters on the linear modules of a model that transformers computes, but for its head; not on experts that are
    one tensor. Parameters as those of `LoraAdapter`, but for the targets, which are paths of modules."""

    def __init__(
        self,
        model: TransformersModel,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        token_ids: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ):
        paths = {one: name for name, one in model.module.named_modules()}
        named = {name: one for one, name in paths.items() if isinstance(one, nn.Linear) and one is not model.head}
        self._linears = {name: named[name] for name in (named if targets is None else targets)}
        largest = max((min(linear.weight.shape) for linear in self._linears.values()), default=0)
        if rank > largest:
            raise UserError(
                f"--lora-rank: expected at most {largest}, the smaller side of the linear modules of this "
                f"{model.config.model_type!r}, found {rank}; --lora-rank none trains all parameters"
            )
        self.model, self.rank, self.alpha, self.targets = model, rank, alpha, tuple(self._linears)
        self.token_ids = tuple(token_ids)
        dtype = dtype or model.embed_tokens.dtype
        draw = _drawing(seed, model.embed_tokens.device, dtype)
        model.requires_grad_(False)
        for linear in self._linears.values():
            rows, inputs = linear.weight.shape
            low_rank = _LowRankSum(inputs, {"weight": rows}, ["weight"], rank, alpha / rank, draw)
            parametrize.register_parametrization(linear, "weight", low_rank, unsafe=True)
        self._trained_rows: dict[str, nn.Parameter] = {}  # by the path of the table
        tables = [(table, table.weight) for table in model.tables if token_ids]
        for table, weight in tables:
            trained = _Rows(weight, token_ids, dtype)
            if table is not tables[0][0] and weight is tables[0][1]:  # tied: both have the same rows
                trained.rows = self._trained_rows[paths[tables[0][0]]]
            else:
                self._trained_rows[paths[table]] = trained.rows
            parametrize.register_parametrization(table, "weight", trained, unsafe=True)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of every A, `PATH.down`, and B, `PATH.up`; and of the rows of tokens, `PATH.rows`."""
        for name, linear in self._linears.items():
            low_rank = cast("_LowRankSum", linear.parametrizations["weight"][-1])  # type: ignore[index]
            yield f"{name}.down", low_rank.down["weight"]
            yield f"{name}.up", low_rank.up["weight"]
        for name, rows in self._trained_rows.items():
            yield f"{name}.rows", rows

    def save(self, folder: Path, base: str, tokens: int | None = None) -> None:
        """Write the adapter as `LoraAdapter.save`."""
        ends = {"down": "lora_A.weight", "up": "lora_B.weight", "rows": "token_adapter.trainable_tokens_delta"}
        saved_ids = [token for token in self.token_ids if tokens is None or token < tokens]
        tensors = {}
        for name, parameter in self.parameters():
            path, _, kind = name.rpartition(".")
            value = parameter.detach().to("cpu", torch.float32).contiguous()
            tensors[f"base_model.model.{path}.{ends[kind]}"] = value[: len(saved_ids)] if kind == "rows" else value
        token_ids = {path.split(".")[-1]: saved_ids for path in self._trained_rows if saved_ids}
        self._write(folder, base, tensors, list(self.targets), token_ids)
