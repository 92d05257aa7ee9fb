"""Low-rank adapters: W + alpha / rank * B A in place of W, for any of a layer's projections.

    adapter = LoraAdapter(model, rank=16, alpha=32, targets=("q", "v"), seed=0)
    train(adapter.parameters())
    adapter.merge()

The sum is made once a forward pass, for a whole matrix: rank times fewer products than the batch's, and the layer runs
the kernels that it always runs. What is saved is the optimizer's state and the masters, not the gradient of W, which
lives for a moment in each layer. Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1: A is drawn, B is zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmkit.errors import UserError
from llmkit.io.files import atomic_file
from llmkit.model.folder import write_tensors
from llmkit.model.transformer import Transformer
from llmkit.model.weights import pairs_apart

# parameter of a layer: (name of a target, its module in a Hugging Face model) of each of the matrices that it stacks
STACKED = {
    "qkv": (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj")),
    "out": (("o", "self_attn.o_proj"),),
    "gate_up": (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj")),
    "down": (("down", "mlp.down_proj"),),
}
TARGETS = tuple(name for projections in STACKED.values() for name, _ in projections)
MODULES = dict(part for projections in STACKED.values() for part in projections)
PEFT_TABLES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


class _LowRankSum(nn.Module):
    """Adds to a stacked parameter a low-rank product for each adapted matrix of it."""

    def __init__(self, weight: Tensor, rows: dict[str, int], adapted: Sequence[str], rank: int, scale: float, draw):
        super().__init__()
        self.rows, self.scale = rows, scale
        options = {"dtype": weight.dtype, "device": weight.device}
        bound = 1 / math.sqrt(weight.shape[1])
        self.down = nn.ParameterDict({name: draw((rank, weight.shape[1]), bound).to(**options) for name in adapted})
        self.up = nn.ParameterDict({name: torch.zeros(rows[name], rank, **options) for name in adapted})

    def forward(self, weight: Tensor) -> Tensor:
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

    def __init__(self, weight: Tensor, token_ids: Sequence[int]):
        super().__init__()
        ids = torch.tensor(token_ids, device=weight.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.rows = nn.Parameter(weight.detach()[ids].clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, cast("Tensor", self.token_ids), self.rows)


class LoraAdapter:
    """Adapters on a model, whose own parameters are frozen.

    rank, alpha  of every adapter
    targets      among TARGETS: the projections that get one, in every layer
    token_ids    tokens whose rows of the embedding, and of a head of its own, are trained as well; ascending
    """

    def __init__(
        self,
        model: Transformer,
        rank: int,
        alpha: float,
        targets: Sequence[str] = TARGETS,
        seed: int = 0,
        token_ids: Sequence[int] = (),
    ):
        matrices = []
        for name, weight, rows in model.matrices():
            _, index, stacked = name.split(".")
            sizes = dict(zip((target for target, _ in STACKED[stacked]), rows, strict=True))
            adapted = [target for target in sizes if target in targets]
            matrices += [(model.layers[int(index)], stacked, weight, sizes, adapted)] if adapted else []
        largest = max(
            min(sizes[name], weight.shape[1]) for _, _, weight, sizes, adapted in matrices for name in adapted
        )
        if rank > largest:
            raise UserError(
                f"--lora-rank: expected at most {largest}, the smaller side of the matrices that get an adapter, "
                f"found {rank}; --lora-rank none trains all parameters"
            )
        self.model, self.rank, self.alpha, self.targets = model, rank, alpha, tuple(targets)
        self.token_ids = tuple(token_ids)
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, int], bound: float) -> Tensor:
            return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)

        model.requires_grad_(False)
        for layer, stacked, weight, sizes, adapted in matrices:
            low_rank = _LowRankSum(weight, sizes, adapted, rank, alpha / rank, draw)
            parametrize.register_parametrization(layer, stacked, low_rank, unsafe=True)
        for table in self._tables:
            parametrize.register_parametrization(model, table, _Rows(getattr(model, table), token_ids), unsafe=True)

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
            for stacked in STACKED:
                if not parametrize.is_parametrized(layer, stacked):
                    continue
                low_rank = cast("_LowRankSum", layer.parametrizations[stacked][0])  # type: ignore[index]
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

    def merge(self) -> Transformer:
        """Make the sums the weights of a plain model, and return it."""
        for layer in self.model.layers:
            for stacked in STACKED:
                if parametrize.is_parametrized(layer, stacked):
                    parametrize.remove_parametrizations(layer, stacked, leave_parametrized=True)
        for table in self._tables:
            parametrize.remove_parametrizations(self.model, table, leave_parametrized=True)
        return self.model.requires_grad_(True)

    def save(self, folder: Path, base: str, tokens: int | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them, beside the path of the base.

        Rows of ids from `tokens` on, which PEFT's model has not, are left out.
        """
        tensors = {}
        saved_ids = [token for token in self.token_ids if tokens is None or token < tokens]
        for name, parameter in self.parameters():
            value = parameter.detach().to("cpu", torch.float32)
            if name.endswith(".rows"):
                module = PEFT_TABLES[name.removesuffix(".rows")]
                tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"] = value[: len(saved_ids)]
                continue
            _, index, target, side = name.split(".")
            if side == "up" and target in ("q", "k"):
                value = pairs_apart(value, self.model.config.head_dim)
            letter = "A" if side == "down" else "B"
            tensors[f"base_model.model.model.layers.{index}.{MODULES[target]}.lora_{letter}.weight"] = (
                value.contiguous()
            )
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [MODULES[name].split(".")[1] for name in self.targets],
        }
        if saved_ids:
            config["trainable_token_indices"] = {table: saved_ids for table in self._tables}
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / "adapter_config.json", "w") as handle:
            json.dump(config, handle, indent=2)
        write_tensors(folder / "adapter_model.safetensors", tensors)
