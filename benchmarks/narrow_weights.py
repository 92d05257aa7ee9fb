"""Quality of low-precision weights: bits per byte of held-out text for each --dtype of `sample` on a CPU, and each
--quantize of `sft`.

    python benchmarks/narrow_weights.py base/ english.val.jsonl.gz --tokens 50000

The decoder of `llmkit sample`, with its weights in that --dtype, predicts the first tokens of every document, up to the
model's context. All variants see the same tokens. "int8, head half" has the head (with tied embeddings, also the
embedding) in half precision. "--quantize" rounds only the matrices of the layers, and computes in float32. KL is from
the float32 model, in nats per token; the difference is the largest of any logit.
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
    parser.add_argument("--tokens", type=int, default=50_000, help="number of tokens to predict")
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

    contenders = {
        "float32": ("dense", "dense", None), "half": ("half", "half", None), "int8, head half": ("int8", "half", None),
        "int8": ("int8", "int8", None), "--quantize int8": ("dense", "dense", "int8"),
        "--quantize nf4": ("dense", "dense", "nf4"),
    }  # fmt: skip
    print(f"{arguments.model}: {model.config.parameter_count:,} parameters; {count:,} tokens, {size:,} bytes")
    print(f"{'':18}{'bits/byte':>10} {'more':>8} {'same best':>10} {'KL':>9} {'difference':>11}")
    first, whole = math.nan, decode.Decoder(model, 1)
    for name, (weights, head, quantize) in contenders.items():
        variant = model if quantize is None else load_model(arguments.model, quantize=quantize)
        decoder = decode.Decoder(variant, 1, weights)
        decoder._product = decode._product(model.head_weight, None, head)
        total, alike, divergence, difference = 0.0, 0, 0.0, 0.0
        with torch.inference_mode():
            for ids in texts:
                pieces = (next(one.logits_in_pieces(ids[:-1], len(ids)))[1] for one in (whole, decoder))
                exact, logits = (piece[:, : tokenizer.vocab_size] for piece in pieces)
                total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
                alike += int((logits.argmax(-1) == exact.argmax(-1)).sum())
                exact_logprobs, logprobs = exact.log_softmax(-1), logits.log_softmax(-1)
                divergence += float((exact_logprobs.exp() * (exact_logprobs - logprobs)).sum())
                difference = max(difference, float((logits - exact).abs().max()))
        bits = total / math.log(2) / size
        first = bits if name == "float32" else first
        print(
            f"{name:18}{bits:10.5f} {100 * (bits / first - 1):+7.3f}% {100 * alike / count:9.2f}% "
            f"{divergence / count:9.5f} {difference:11.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
