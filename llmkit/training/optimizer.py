"""Muon for matrices and AdamW for the rest, over fp32 masters, and the `Schedule` of their learning rates.

Parameters of one shape are stacked, so that a step is a few batched operations whatever the depth: at 4 layers of
128 on a CPU, a step per parameter spends more time in dispatch than in arithmetic. The model may be a lower-precision
working copy (bfloat16); masters and moments stay fp32, and the copy is refreshed after each step. Of sharded
parameters (llmkit/training/distributed.py) each rank has the masters of its own rows.

Shapes: K parameters of a group, each M x N.
Sources: Muon, Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); the orthogonalisation's coefficients,
Polar Express, Amsel et al. 2025 (arXiv 2505.16932, algorithm 1); update scale sqrt(max(1, M/N)), as in
Bernstein 2025 "Deriving Muon"; decoupled weight decay, Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkit.io.progress import counted, say
from llmkit.kernels.linear import matmul_nn, matmul_nt
from llmkit.model.transformer import Transformer
from llmkit.training.distributed import (
    full_tensor,
    is_sharded,
    local,
    on_whole_matrices,
    part_of,
    world,
)
from llmkit.training.plan import Recipe

# Each row (a, b, c) is one odd polynomial a x + b x^3 + c x^5 of the singular values: the paper's optimal composition
# for values in [1e-3, 1]. The argument is divided by 1.01, so that rounding in bfloat16 cannot push a value past the
# interval, where the polynomials diverge (the paper's section 4.4).
_OPTIMAL = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _OPTIMAL)


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then constant, then linear decay: the factor on the learning rates at a progress in [0, 1].

    Warmup-stable-decay, Hu et al. 2024 (arXiv 2404.06395); linear decay to zero, Defazio et al. 2023
    (arXiv 2310.07831).
    """

    warmup_steps: int
    decay_fraction: float
    final_factor: float = 0.0

    def factor(self, step: int, progress: float) -> float:
        """Return the factor for update number `step` (from 0), which begins at `progress`."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = max(0.0, 1.0 - progress)
        if self.decay_fraction <= 0 or left >= self.decay_fraction:
            return warmup
        return warmup * (self.final_factor + (1 - self.final_factor) * left / self.decay_fraction)


def warn_of_long_warmup(warmup_steps: int, total_steps: int | None, quiet: bool) -> None:
    """Print a note if a run ends before its warm-up does."""
    if total_steps is not None and warmup_steps >= total_steps > 1:
        say(
            f"--warmup-steps {warmup_steps}: the run has {counted(total_steps, 'step')}, and never reaches the full "
            "learning rate",
            quiet,
        )


def orthogonalise(update_KMN: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by about 1 (the polar factor), in the dtype of the input.

    A zero matrix stays zero.
    """
    tall = update_KMN.size(-2) > update_KMN.size(-1)
    x_KMN = update_KMN.mT if tall else update_KMN
    x_KMN = x_KMN / (x_KMN.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    if x_KMN.dtype == torch.float32 and x_KMN.device.type == "cpu" and x_KMN.numel():
        # with oneDNN: torch's batched products use MKL, at half the rate on AMD (all matrices of a 17M model: 0.52 s
        # instead of 1.16 s)
        factors = []
        for x_MN in x_KMN:
            for a, b, c in POLAR_EXPRESS[:steps]:
                gram_MM = matmul_nt(x_MN, x_MN)
                polynomial_MM = matmul_nt(gram_MM, gram_MM).mul_(c).add_(gram_MM, alpha=b)  # a Gram matrix is symmetric
                x_MN = matmul_nn(polynomial_MM, x_MN).add_(x_MN, alpha=a)
            factors.append(x_MN)
        x_KMN = torch.stack(factors)
    else:
        for a, b, c in POLAR_EXPRESS[:steps]:
            gram_KMM = x_KMN @ x_KMN.mT
            polynomial_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
            x_KMN = torch.baddbmm(x_KMN, polynomial_KMM, x_KMN, beta=a)
    return x_KMN.mT if tall else x_KMN


@dataclass(frozen=True)
class GroupSettings:
    """Settings of one group of parameters. `kind` is "muon" or "adamw"; rates are at schedule factor 1."""

    kind: str
    learning_rate: float
    weight_decay: float = 0.0
    blocks: tuple[int, ...] = ()  # rows of the matrices that a fused parameter stacks; () is one matrix
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-10


class _Stack:
    """Parameters of one shape and one rule, as one tensor [K, *shape], or [K, own rows, ...] if they are sharded."""

    def __init__(self, names: list[str], parameters: list[nn.Parameter], settings: GroupSettings) -> None:
        self.names, self.parameters, self.settings = names, parameters, settings
        self.sharded = is_sharded(parameters[0])
        self.dtype = parameters[0].dtype
        self.master = torch.stack([local(p.detach()).float() for p in parameters])
        self.state = {"momentum": torch.zeros_like(self.master)}
        if settings.kind == "adamw":
            self.state["second_moment"] = torch.zeros_like(self.master)
        self.gradient: Tensor | None = None
        self.working = self.master
        if self.sharded:  # FSDP owns the memory of the working copies
            self._copies = [local(p.detach()) for p in parameters]
            return
        if self.dtype != torch.float32:
            # the working copies become views of one tensor, so that one copy_ refreshes them all
            self.working = self.master.to(self.dtype)
        for index, parameter in enumerate(parameters):
            parameter.data = self.working[index]

    def named(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter with its entry of `values` [K, ...]."""
        for name, parameter, value in zip(self.names, self.parameters, values, strict=True):
            yield name, part_of(value, parameter)

    def refresh(self) -> None:
        """Copy the masters to the working copies."""
        if self.sharded:
            torch._foreach_copy_(self._copies, list(self.master.unbind()))  # type: ignore[reportPrivateImportUsage]
        elif self.working is not self.master:
            self.working.copy_(self.master)

    def gather(self) -> None:
        """Move the parameters' gradients into the fp32 accumulator [K, *shape]."""
        if any(p.grad is None for p in self.parameters):
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        else:
            gradients = [p.grad for p in self.parameters]
        stacked = torch.stack([local(g) for g in gradients] if self.sharded else gradients)  # type: ignore[arg-type]
        for parameter in self.parameters:
            parameter.grad = None
        if self.gradient is None:
            self.gradient = stacked.float()
        else:
            self.gradient.add_(stacked)

    def step(self, factor: float, momentum: float, scale: Tensor | float, count: int) -> None:
        settings = self.settings
        assert self.gradient is not None
        rate, gradient_KMN = settings.learning_rate * factor, self.gradient.mul_(scale)
        if settings.kind == "muon":
            buffer_KMN = self.state["momentum"]
            buffer_KMN.lerp_(gradient_KMN, 1 - momentum)
            update_KMN = gradient_KMN.lerp_(buffer_KMN, momentum)  # Nesterov
            # bfloat16 suffices for the iteration (Jordan 2024) and is 4.5x faster on a CPU with avx512_bf16
            update_KMN = update_KMN.to(self.dtype)
            if self.sharded:
                direction_KMN = on_whole_matrices(update_KMN, self.parameters[0].shape[0], self._directions)
            else:
                direction_KMN = self._directions(update_KMN)
            if settings.weight_decay:
                self.master.mul_(1 - rate * settings.weight_decay)
            self.master.add_(direction_KMN.reshape(self.master.shape), alpha=-rate)
        else:
            torch._fused_adamw_(  # type: ignore[reportPrivateImportUsage]
                [self.master],
                [gradient_KMN],
                [self.state["momentum"]],
                [self.state["second_moment"]],
                [],
                [torch.tensor(float(count))],
                lr=rate,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                amsgrad=False,
                maximize=False,
            )
        self.refresh()
        self.gradient = None

    def _directions(self, update_KMN: Tensor) -> Tensor:
        blocks = self.settings.blocks or (update_KMN.shape[1],)
        if len(set(blocks)) > 1:
            return torch.cat([_direction(part) for part in update_KMN.split(blocks, dim=1)], dim=1)
        return _direction(update_KMN.reshape(-1, blocks[0], update_KMN.shape[2])).reshape(update_KMN.shape)


def _direction(update_KMN: Tensor) -> Tensor:
    rows, columns = update_KMN.shape[-2:]
    return orthogonalise(update_KMN) * max(1.0, rows / columns) ** 0.5


class Optimizer:
    """One optimizer for all stages.

        optimizer = Optimizer(named_parameters_with_settings)
        loss.backward(); optimizer.accumulate()      # once per micro-batch
        norm = optimizer.gradient_norm(targets)      # of the mean gradient
        optimizer.step(factor=0.5, scale=1 / targets)

    Raises ValueError for a muon group whose parameters are not matrices.
    """

    def __init__(self, groups: Iterable[tuple[str, nn.Parameter, GroupSettings]]) -> None:
        stacks: dict[tuple, tuple[list[str], list[nn.Parameter]]] = {}
        for name, parameter, settings in groups:
            if settings.kind == "muon" and parameter.ndim != 2:
                raise ValueError(f"{name}: Muon needs a matrix, found shape {tuple(parameter.shape)}")
            kind = settings, tuple(parameter.shape)
            names, parameters = stacks.setdefault(kind, ([], []))
            names.append(name)
            parameters.append(parameter)
        self.stacks = [_Stack(names, parameters, key[0]) for key, (names, parameters) in stacks.items()]
        self.count = 0

    def accumulate(self, last: bool = True) -> None:
        """Add the gradients of a backward pass to the fp32 accumulators and clear them.

        last: True for the last micro-batch of a step: then gradients are summed over the ranks, and those of sharded
        parameters, which wait for it, are added.
        """
        for stack in self.stacks:
            if not stack.sharded or last:
                stack.gather()
            if last and not stack.sharded and stack.gradient is not None:
                world().all_reduce(stack.gradient)

    def discard(self) -> None:
        """Drop the gradients accumulated so far."""
        for stack in self.stacks:
            stack.gradient = None
            for parameter in stack.parameters:
                parameter.grad = None

    def gradient_norm(self, divisor: float = 1.0) -> Tensor:
        """Return the 2-norm of all accumulated gradients over `divisor`, as an fp32 scalar."""
        norms = torch._foreach_norm(  # type: ignore[reportPrivateImportUsage]
            [stack.gradient for stack in self.stacks if stack.gradient is not None]
        )
        norm = torch.stack(norms).norm()
        if self.stacks[0].sharded:  # all stacks are sharded, or none
            norm = torch.tensor(world().sum(float(norm) ** 2)[0] ** 0.5)
        return norm / divisor

    def largest_weight(self) -> float:
        """Return the largest magnitude among this rank's masters; infinity if one is not finite."""
        bounds = [torch.stack(torch.aminmax(stack.master)) for stack in self.stacks if stack.master.numel()]
        largest = float(torch.stack(bounds).abs().max()) if bounds else 0.0
        return largest if math.isfinite(largest) else math.inf

    @torch.no_grad()
    def step(self, factor: float, momentum: float = 0.95, scale: Tensor | float = 1.0) -> None:
        """Update masters and working copies; gradients are multiplied by `scale` first (mean and clipping)."""
        self.count += 1
        for stack in self.stacks:
            stack.step(factor, momentum, scale, self.count)

    def masters(self) -> dict[str, Tensor]:
        """Return the fp32 master of each parameter by name (views); of sharded ones, this rank's rows."""
        return {name: value for stack in self.stacks for name, value in stack.named(stack.master)}

    def whole_masters(self) -> dict[str, Tensor]:
        """Return the fp32 master of each parameter by name, unsharded, on rank 0 and nothing elsewhere. Collective."""
        masters = {}
        for name, value in self.masters().items():
            full = full_tensor(value)
            if world().leads:
                masters[name] = full.cpu() if is_sharded(value) else full
        return masters

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for an exact resume: `master.NAME`, `momentum.NAME`, `second_moment.NAME`, `count`."""
        tensors = {f"master.{name}": value for name, value in self.masters().items()}
        for stack in self.stacks:
            for key, value in stack.state.items():
                tensors |= {f"{key}.{name}": part for name, part in stack.named(value)}
        tensors["count"] = torch.tensor(self.count, dtype=torch.int64)
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`. Raises KeyError or RuntimeError for a missing or wrongly shaped tensor."""
        own = self.state_dict()
        for name, value in own.items():
            if name != "count":
                value.copy_(tensors[name])
        self.count = int(tensors["count"])
        for stack in self.stacks:
            stack.refresh()


def build_optimizer(model: Transformer, recipe: Recipe) -> Optimizer:
    """Build Muon for the blocks' matrices, AdamW for embedding, head, gains and biases; or AdamW for all."""
    matrices = {name: blocks for name, _, blocks in model.matrices()}
    groups = []
    for name, parameter in model.named_parameters():
        if name in matrices:
            blocks = matrices[name] if recipe.optimizer == "muon" else ()
            settings = GroupSettings(recipe.optimizer, recipe.matrix_learning_rate, recipe.weight_decay, blocks=blocks)
        elif name == "embed_tokens":
            rate = recipe.head_learning_rate if model.lm_head is None else recipe.embedding_learning_rate
            settings = GroupSettings("adamw", rate)
        elif name == "lm_head":
            settings = GroupSettings("adamw", recipe.head_learning_rate)
        else:
            settings = GroupSettings("adamw", recipe.gain_learning_rate)
        groups.append((name, parameter, settings))
    return Optimizer(groups)


def float32_copy(model: Transformer, optimizer: Optimizer) -> Transformer | None:
    """Copy the model to the CPU with the optimizer's fp32 masters as parameters, for rank 0 to save.

    Collective; the other ranks get None.
    """
    masters = optimizer.whole_masters()
    if not masters:
        return None
    copy = Transformer(model.config)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(masters[name])
    return copy.eval()
