"""Rank and world size of this process, as torchrun sets them; without torchrun, 0 and 1.

Source: the variables of https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from llmkit.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One process of a job.

    rank, size  its number, from 0, among all processes; `local_rank` among those of its machine
    restarts    how often the whole job was started again after a failure
    job         what tells this job from others, the same in all processes and after a restart; None outside of one
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    job: str | None = None

    @property
    def leads(self) -> bool:
        """True if this process speaks and writes for all."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read torchrun's variables; without all of them, none count. Raises UserError for values that are no numbers."""
    if any(name not in environment for name in NEEDED):
        return Launch()
    names = {"LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0", **environment}
    try:
        rank, size, local_rank, restarts = (
            int(names[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
        )
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK: expected the numbers that torchrun sets: {error}") from None
    if not 0 <= rank < size:
        raise UserError(f"RANK {rank}, WORLD_SIZE {size}: expected a rank below the number of processes; use torchrun")
    address = f"{names['MASTER_ADDR']}:{names['MASTER_PORT']}"
    return Launch(rank, size, local_rank, restarts, f"{names.get('TORCHELASTIC_RUN_ID', 'none')}@{address}")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def launch() -> Launch:
    """This process."""
    return read_launch(os.environ)
