"""litgpt's pretraining (`litgpt.pretrain.setup`, which its command calls) on a file of tokens.

    litgpt-python benchmarks/peers/litgpt_trainer.py --tokens tokens.bin --precision bf16-mixed --eager --fused

Its loop is unchanged and prints a line per step. The model is a Llama of the given shape; rows come from a map-style
dataset in the main process, as in the script for transformers' Trainer. By default litgpt compiles the model, and uses
torch's AdamW without `fused` on a CPU; `--eager` disables torch.compile with torch's own switch, `--fused` selects the
fused AdamW: a careful user would try both.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", required=True, help="raw uint16 token ids")
parser.add_argument("--out", default="litgpt_out")
parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed", "bf16-true"))
parser.add_argument("--eager", action="store_true", help="without torch.compile")
parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
parser.add_argument("--untied", action="store_true", help="separate output head")
for name in ("layers", "dim", "heads", "ffn", "vocab", "block", "batch", "steps"):
    parser.add_argument(f"--{name}", type=int, required=True)
arguments = parser.parse_args()
if arguments.eager:
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # read at torch's import

import numpy as np  # noqa: E402
import torch  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.config import Config  # noqa: E402
from litgpt.data import DataModule  # noqa: E402
from litgpt.pretrain import setup  # noqa: E402


class FusedAdamW(torch.optim.AdamW):
    """AdamW whose signature does not name `fused`, which litgpt would set to False on a CPU."""

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr=lr, fused=True)


class Rows(torch.utils.data.Dataset):
    """Windows of the context plus one token, at the same positions as in the Trainer's script."""

    def __init__(self, tokens: np.ndarray, block: int, count: int) -> None:
        self.tokens, self.block, self.count = tokens, block, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        start = (index * 7919) % (len(self.tokens) - self.block - 1)
        return torch.from_numpy(self.tokens[start : start + self.block + 1].astype(np.int64))


class TokenFile(DataModule):
    """litgpt's data interface."""

    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size, self.block = batch_size, max_seq_length or arguments.block

    def _loader(self, count: int) -> torch.utils.data.DataLoader:
        rows = Rows(np.fromfile(arguments.tokens, dtype=np.uint16), self.block, count)
        return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(10**6)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(2 * self.batch_size)


if __name__ == "__main__":
    sys.argv[1:] = ["tiny"]  # litgpt parses the command line again when it saves
    setup(
        model_name="tiny",
        model_config=Config(
            name="tiny",
            block_size=arguments.block,
            n_layer=arguments.layers,
            n_embd=arguments.dim,
            n_head=arguments.heads,
            vocab_size=arguments.vocab,
            padded_vocab_size=arguments.vocab,
            intermediate_size=arguments.ffn,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
        ),
        out_dir=Path(arguments.out),
        precision=arguments.precision,
        data=TokenFile(),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=arguments.batch,
            micro_batch_size=arguments.batch,
            max_tokens=arguments.steps * arguments.batch * arguments.block,
            max_norm=1.0,
            min_lr=1e-4,
            lr_warmup_steps=10,
            tie_embeddings=not arguments.untied,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
        optimizer="__main__.FusedAdamW" if arguments.fused else "AdamW",
        devices=1,
        logger_name="csv",
    )
