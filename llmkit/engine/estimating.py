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
    """Bytes on each GPU and whether they fit; seconds of a step for computing, for sending meanwhile, and for summing
    what GPUs that divide a layer have of it; tokens a second and seconds of the whole training; its GPU hours."""

    bytes: float
    fits: bool
    computing: float
    sending: float
    summing: float
    tokens_per_second: float
    seconds: float
    gpu_hours: float

    def lines(self, price: float | None) -> list[str]:
        """For people; `price` of a GPU hour."""
        hours = f"{self.gpu_hours:,.1f} GPU hours"
        cost = "" if price is None else f", {self.gpu_hours * price:,.0f} at {price:g} an hour"
        sums = f", and waits {self.summing:.3g} s for the sums of divided layers" if self.summing else ""
        return [
            f"about {self.bytes / 1e9:.1f} GB on each GPU{'' if self.fits else ': more than it has'}",
            f"a step computes for {self.computing:.3g} s, at {SHARE:.0%} of the peak, and sends for "
            f"{self.sending:.3g} s meanwhile{sums}",
            f"{quantity(self.tokens_per_second)} tokens/s, {duration(self.seconds)} of training, {hours}{cost}; "
            "computed, not measured",
        ]


def estimate(
    plan: Plan, kind: str, nodes: int, gpus: int, micro_batch_rows: int | None = None, tensor: int = 1
) -> Estimate:
    """What a plan takes on `nodes` machines of so many GPUs of a kind of `GPUS`, `tensor` of which divide each layer.

    Raises UserError for fewer rows in a batch than there are shares of it, and where the GPUs of a layer would not be
    of one machine.
    """
    gpu, devices = GPUS[kind], nodes * gpus
    if gpus % tensor:
        raise UserError(
            f"--tensor-parallel: expected a number that divides the {gpus} GPUs of a machine, found {tensor}"
        )
    shares = devices // tensor
    if plan.batch_rows < shares:
        who = f"{devices} GPUs" if tensor == 1 else f"{shares} groups of {tensor} GPUs"
        raise UserError(f"--batch-tokens: {plan.batch_rows} rows in a batch are fewer than {who}; give more")
    rows = micro_batch_rows or max(1, MICRO_BATCH_TOKENS["cuda"] // plan.sequence_length)
    plan = replace(plan, micro_batch_rows=min(rows, plan.batch_rows))
    own_tokens = -(-plan.batch_rows // shares) * plan.sequence_length
    # rows are divided as evenly as can be: a step takes as long as the largest share; each GPU computes the whole head
    head = 6 * plan.model.vocab_size * plan.model.hidden_size
    step_flops = own_tokens * (head + (plan.model.flops_per_token(plan.sequence_length) - head) / tensor)
    computing = step_flops / (SHARE * gpu.flops)
    micro_batches = -(-own_tokens // (plan.micro_batch_rows * plan.sequence_length))
    # bf16 weights before forward and before backward of each micro-batch, fp32 gradients once, and for Muon bf16
    # updates there and back, of a process's own rows
    parameters = plan.model.parameter_count
    sent = parameters * (4 * micro_batches + 4 + 4 / devices)
    within, between = (shares - 1) / shares / tensor / gpu.link, (nodes - 1) / nodes / (gpus * gpu.network)
    sending = sent * max(within, between)
    # bf16 sums after attention and feed-forward, and before them in backward; each goes out and comes back but for an
    # own part
    sums = own_tokens * plan.model.num_hidden_layers * 4 * plan.model.hidden_size * 2
    summing = sums * 2 * (tensor - 1) / tensor / gpu.link
    step = max(computing, sending) + summing
    # gradients of several micro-batches wait, whole and in fp32, for the last
    waiting = 4 * parameters / tensor if shares > 1 and micro_batches > 1 else 0
    size = plan.training_bytes(devices, tensor) + waiting
    return Estimate(
        bytes=size,
        fits=size < ROOM * gpu.memory,
        computing=computing,
        sending=sending,
        summing=summing,
        tokens_per_second=plan.batch_tokens / step,
        seconds=plan.total_steps * step,
        gpu_hours=plan.total_steps * step * devices / 3600,
    )
