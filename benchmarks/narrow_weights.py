"""What narrow weights cost in quality: bits per byte of held-out text, by each --dtype of `sample` on a CPU.

    python benchmarks/narrow_weights.py base/ english.val.jsonl.gz --tokens 50000

Every document's first tokens, up to the model's context, are read by the decoder of `llmkit sample` with its weights as
that --dtype holds them; each token is predicted from those before it. All see the same tokens. "int8, head half" has
the head, which is the embedding in tied models, in half precision.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("documents", nargs="+", help="JSONL with `text`, plain or gzip")
    parser.add_argument("--tokens", type=int, default=50_000, help="to be predicted")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    from llmkit.generation import decode
    from llmkit.io.jsonl import read_documents
    from llmkit.model.folder import load_model
    from llmkit.tokenizer.encoding import load_tokenizer

    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    context = model.config.max_position_embeddings
    texts, count, size = [], 0, 0
    for row in read_documents(arguments.documents):
        ids = tokenizer.encode_prompt(row.value["text"])[:context]
        texts.append(ids)
        count += len(ids) - 1
        size += len(tokenizer.decode(ids[1:]).encode())
        if count >= arguments.tokens:
            break

    contenders = {"float32": ("dense", "dense"), "half": ("half", "half"), "int8, head half": ("int8", "half"),
                  "int8": ("int8", "int8")}  # fmt: skip
    print(f"{arguments.model}: {model.config.parameter_count:,} parameters; {count:,} tokens, {size:,} bytes")
    print(f"{'':18}{'bits/byte':>10} {'more':>8} {'same best':>10}")
    first, best = math.nan, []
    for name, (weights, head) in contenders.items():
        decoder = decode.Decoder(model, 1, weights)
        decoder._product = decode._product(model.head_weight, None, head)
        total, choices = 0.0, []
        with torch.inference_mode():
            for ids in texts:
                logits = decoder.logits(ids[:-1])[:, : tokenizer.vocab_size]
                total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
                choices.append(logits.argmax(-1))
        bits = total / math.log(2) / size
        first, best = (bits, choices) if name == "float32" else (first, best)
        alike = sum(int((a == b).sum()) for a, b in zip(choices, best, strict=True)) / count
        print(f"{name:18}{bits:10.5f} {100 * (bits / first - 1):+7.3f}% {100 * alike:9.2f}%", flush=True)


if __name__ == "__main__":
    main()
