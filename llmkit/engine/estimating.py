"""What a training would take on GPUs that are not here: memory, tokens a second, time and price, by arithmetic.

Nothing is measured. The products are assumed to run at `SHARE` of a GPU's peak, and what is sent at the rates of the
data sheets, behind the computing where that takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmkit.engine.planning import MICRO_BATCH_TOKENS, Plan
from llmkit.errors import UserError
from llmkit.progress import duration, quantity

SHARE = 0.4  # of the peak: single GPUs reach 0.4 to 0.5 on models of 124M to 1.5B
ROOM = 0.9  # of a GPU's memory; the rest is fragments, buffers of nccl and CUDA itself


@dataclass(frozen=True)
class Gpu:
    """flops: bf16 products a second, dense; memory: bytes; link, network: bytes a second to and from a GPU of the same
    machine, and of another one, where each GPU has its own network card as in NVIDIA's DGX."""

    flops: float
    memory: float
    link: float
    network: float


# NVIDIA's data sheets of the SXM boards
GPUS = {
    "a100": Gpu(312e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 180e9, 900e9, 50e9),
}


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU and whether they fit; seconds of a step for computing and for sending; tokens a second and
    seconds of the whole training; its GPU hours."""

    bytes: float
    fits: bool
    computing: float
    sending: float
    tokens_per_second: float
    seconds: float
    gpu_hours: float

    def lines(self, price: float | None) -> list[str]:
        """For people; `price` of a GPU hour."""
        hours = f"{self.gpu_hours:,.1f} GPU hours"
        cost = "" if price is None else f", {self.gpu_hours * price:,.0f} at {price:g} an hour"
        return [
            f"about {self.bytes / 1e9:.1f} GB on each GPU{'' if self.fits else ': more than it has'}",
            f"a step computes for {self.computing:.3g} s, at {SHARE:.0%} of the peak, and sends for "
            f"{self.sending:.3g} s meanwhile",
            f"{quantity(self.tokens_per_second)} tokens/s, {duration(self.seconds)} of training, {hours}{cost}; "
            "computed, not measured",
        ]


def estimate(plan: Plan, kind: str, nodes: int, gpus: int, micro_batch_rows: int | None = None) -> Estimate:
    """What a plan takes on `nodes` machines of so many GPUs of a kind of `GPUS`. Raises UserError for fewer rows in a
    batch than GPUs."""
    gpu, devices = GPUS[kind], nodes * gpus
    if plan.batch_rows < devices:
        raise UserError(f"--batch-tokens: {plan.batch_rows} rows in a batch are fewer than {devices} GPUs; give more")
    rows = micro_batch_rows or max(1, MICRO_BATCH_TOKENS["cuda"] // plan.sequence_length)
    plan = replace(plan, micro_batch_rows=min(rows, plan.batch_rows))
    own_rows = -(-plan.batch_rows // devices)
    # rows are divided as evenly as can be: a step takes as long as the largest share
    step_flops = own_rows * plan.sequence_length * plan.model.flops_per_token(plan.sequence_length)
    computing = step_flops / (SHARE * gpu.flops)
    micro_batches = -(-own_rows // plan.micro_batch_rows)
    # bf16 weights before forward and before backward of each micro-batch, fp32 gradients once, and for Muon bf16
    # updates there and back, of a process's own rows
    parameters = plan.model.parameter_count
    sent = parameters * (4 * micro_batches + 4 + 4 / devices)
    within, between = (devices - 1) / devices / gpu.link, (nodes - 1) / nodes / (gpus * gpu.network)
    sending = sent * max(within, between)
    step = max(computing, sending)
    # gradients of several micro-batches wait, whole and in fp32, for the last
    size = plan.training_bytes(devices) + (4 * parameters if devices > 1 and micro_batches > 1 else 0)
    return Estimate(
        bytes=size,
        fits=size < ROOM * gpu.memory,
        computing=computing,
        sending=sending,
        tokens_per_second=plan.batch_tokens / step,
        seconds=plan.total_steps * step,
        gpu_hours=plan.total_steps * step * devices / 3600,
    )
