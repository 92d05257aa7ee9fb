"""Figures of the kernels' compiled code for several GPUs, none of which is needed, and rules for the figures.

    python tests/kernels/lint.py --only "attention packed*" --target sm_90    # a table in Markdown
    python tests/kernels/lint.py --write                                      # writes the golden file of this Triton

`spills` are bytes of stack per thread on NVIDIA, registers on AMD; `shared` is bytes of shared memory or LDS; `matrix`
are tensor core instructions; `loads` and `stores` count instructions on global memory by width in bytes, and those of
the tensor memory accelerator (TMA). `loops` are the innermost loops with warp-group products (WGMMA): their shapes and
counts, products issued, waits, TMA loads, and accesses to local memory. `reallocations` of registers occur in
warp-specialized kernels: the cases "specialized".
A golden file has the figures of one version of Triton; exceptions.json lists the broken rules by name, with reasons.
Needs x86 or ARM Linux with Triton, no GPU, and no TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

FOLDER = Path(__file__).parent / "compiled"
# Tiles of sm_80 are also used on sm_86, 89 and 120, which have the least shared memory; an A100 has 166,912.
SHARED_BYTES = {"sm_90": 232_448, "sm_80": 101_376, "gfx942": 65_536}
MATRIX = {"sm_90": "HGMMA", "sm_80": "HMMA", "gfx942": "mfma"}
BACKWARD = ("grad_query", "grad_key_value", "backward")
MULTIPLY = ("attention_forward", "attention_grad_query", "attention_grad_key_value", "attention_decode",
            "linear_logsumexp")  # fmt: skip
REDUCE = ("attention_delta", "linear_logsumexp")  # reduce tiles to a few numbers
MERGE = ("attention_merge", "merge_splits")  # a few numbers per program, no tiles
# Smallest share of bytes in 128-bit loads or stores; the rest are bounds, log-sums and targets, single numbers per
# thread. If tiles were read 64 bits at a time, the share would be zero.
LEAST_WIDE = 0.6
# About 90 CPU seconds of cold compilation: the main kernels of bf16 training, for each kind of GPU.
REPRESENTATIVE = {
    "sm_90": ("attention packed 64 bfloat16", "attention causal 128 bfloat16", "attention packed 128 bfloat16",
              "attention packed grouped specialized 128 bfloat16", "decode 128 bfloat16",
              "loss and gradient 50257 bfloat16", "logprobs 1600 bfloat16"),
    "sm_80": ("attention packed 128 bfloat16", "loss and gradient 50257 bfloat16"),
    "gfx942": ("attention packed 128 bfloat16", "loss and gradient 50257 bfloat16"),
}  # fmt: skip


def cases() -> dict:
    from compile_cases import ATTENTION, LOSSES

    return ATTENTION | LOSSES


def figures(target: str, compiled) -> dict:
    """Return the figures of one compiled kernel."""
    common = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
    return common | (_of_amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _of_nvidia(compiled.asm["cubin"]))


def _of_nvidia(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    on_stack = bool(re.search(r"\b(LDL|STL)\b", sass))
    loads = [_bytes(x) for x in re.findall(r"\b(?:LDG|LDGSTS)(\.[A-Z0-9._]+)", sass)]
    found = {
        "registers": registers,
        "spills": max(stack, int(on_stack)),
        "matrix": _count(re.findall(r"\b(HGMMA|HMMA)\b", sass)),
        "loads": _count([*loads, *re.findall(r"\bU(TMA)LDG\b", sass)]),
        "stores": _count(_bytes(x) for x in re.findall(r"\bSTG(\.[A-Z0-9._]+)", sass)),
    }
    loops, reallocations = _loops(sass), len(re.findall(r"\bUSETMAXREG\b", sass))
    found |= {"reallocations": reallocations} if reallocations else {}
    return found | {"loops": loops} if loops else found


def _loops(sass: str) -> list[dict]:
    """Return figures of the innermost loops with warp-group products; a loop ends with a backward branch."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)]
    jumps = [(at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for at, text in code]
    spans = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    loops = []
    for first, last in spans:
        body = "\n".join(text for at, text in code if first <= at <= last)
        shapes = _count(re.findall(r"\bHGMMA\.(\d+x\d+x\d+)", body))
        if shapes and not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            counts = {
                "products": len(re.findall(r"\bWARPGROUP\.ARRIVE\b", body)),
                "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", body)),
                "tma": len(re.findall(r"\bUTMALDG\b", body)),
                "local": len(re.findall(r"\b(?:LDL|STL)\b", body)),
            }
            loops.append({"matrix": shapes} | counts)
    return loops


def _bytes(modifiers: str) -> int:
    words = modifiers.split(".")
    named = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((named[word] for word in words if word in named), 4)


def _of_amd(code: str) -> dict:
    def declared(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short_d16": 2, "ubyte": 1}
    widths |= {"short": 2, "short_d16_hi": 2, "byte": 1}

    def accesses(verb: str) -> dict[str, int]:
        return _count(widths[x] for x in re.findall(rf"\b(?:global|buffer)_{verb}_([a-z0-9_]+)", code) if x in widths)

    return {
        "registers": declared("vgpr_count"),
        "spills": declared("vgpr_spill_count") + declared("private_segment_fixed_size"),
        "matrix": _count(re.findall(r"\bv_(mfma)_", code)),
        "loads": accesses("load"),
        "stores": accesses("store"),
    }


def _count(found) -> dict[str, int]:
    counts: dict[str, int] = {}
    for x in found:
        counts[str(x)] = counts.get(str(x), 0) + 1
    return dict(sorted(counts.items()))


def broken_rules(name: str, figure: dict) -> set[str]:
    """Return the rules that the kernel named "TARGET CASE: KERNEL" breaks."""
    target, kernel, sixteen = name.split()[0], name.rpartition(": ")[2], "float32" not in name
    broken = set()
    if figure["shared"] > SHARED_BYTES[target]:
        broken.add("shared")
    loops = figure.get("loops", [])
    broken |= {"local" for loop in loops if loop["local"]}
    if "specialized" in name and kernel in MULTIPLY:
        # one loader and two multiplying groups, otherwise the specialization was lost; the groups wait for products
        if figure["warps"] != 12 or "reallocations" not in figure or len(loops) != 2:
            broken.add("specialized")
    elif loops and kernel in MULTIPLY:
        broken |= {"tma" for loop in loops if not loop["tma"]}
        # with two or more products, waits must overlap with the next product, or the tensor cores idle
        broken |= {"waits" for loop in loops if loop["products"] > 1 and loop["waits"] >= loop["products"]}
    strict = target.startswith("gfx") or kernel == "cross_entropy" or kernel.endswith(BACKWARD)
    if figure["spills"] and ("specialized" in name or (strict and not loops)):
        broken.add("spills")
    if kernel in MULTIPLY and sixteen and set(figure["matrix"]) != {MATRIX[target]}:
        broken.add("matrix")
    if kernel in MERGE or not sixteen:
        return broken
    for verb in ("loads", "stores"):
        if (kernel in REDUCE and verb == "stores") or (verb == "loads" and "TMA" in figure[verb]):
            continue  # writes a few numbers per token; reads a few besides TMA tiles
        total = sum(int(width) * count for width, count in figure[verb].items())
        if figure[verb].get("16", 0) * 16 < LEAST_WIDE * total:
            broken.add(verb)
    return broken


def compile_all(wanted: dict[str, list[str]]) -> dict[str, dict]:
    """Compile the requested cases of each target; return figures by "TARGET CASE: KERNEL"."""
    from llmkit.kernels.triton.launch import compiling_for

    found = {}
    for target, names in wanted.items():
        for name in names:
            with compiling_for(target) as kernels:
                cases()[name]()
            for kernel, compiled in kernels.items():
                found[f"{target} {name}: {kernel}"] = figures(target, compiled)
    return found


def table(found: dict[str, dict]) -> str:
    lines = [
        "| GPU | case | kernel | warps | registers | spills | shared | matrix | 128-bit loads, stores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, x in found.items():
        target, rest = name.split(" ", 1)
        case, kernel = rest.split(": ")
        matrix = ", ".join(f"{count} {which}" for which, count in x["matrix"].items()) or "-"
        wide = ", ".join(f"{x[verb].get('16', 0)} of {sum(x[verb].values())}" for verb in ("loads", "stores"))
        wide = f"{x['loads']['TMA']} TMA, {wide.partition(', ')[2]}" if "TMA" in x["loads"] else wide
        cells = (target, case, kernel, x["warps"], x["registers"], x["spills"], x["shared"], matrix, wide)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def golden_name(version: str) -> str:
    return f"triton-{'.'.join(version.split('.')[:2])}"


def golden_path(version: str) -> Path:
    return FOLDER / f"{golden_name(version)}.json"


def exceptions() -> dict[str, dict[str, str]]:
    """Return reasons by rule and by pattern of names; a pattern for one version starts with "triton-3.6 "."""
    return json.loads((FOLDER / "exceptions.json").read_text())


def excuses(pattern: str, name: str, triton_name: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(f"{triton_name} {name}", pattern)


def excused(name: str, triton_name: str) -> set[str]:
    """Return the rules that a kernel may break with the Triton of a `golden_name`."""
    return {rule for pattern, rules in exceptions().items() if excuses(pattern, name, triton_name) for rule in rules}


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", default=list(SHARED_BYTES), choices=SHARED_BYTES)
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="cases, as shells match names")
    parser.add_argument("--representative", action="store_true", help="the cases of `make test`")
    parser.add_argument("--golden", action="store_true", help="the cases that the golden file has")
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")
    parser.add_argument("--write", action="store_true", help="put the figures into the golden file of this Triton")
    options = parser.parse_args()
    if options.representative:
        wanted = {target: list(REPRESENTATIVE[target]) for target in options.target}
    elif options.golden:
        known = [
            name.partition(": ")[0].split(" ", 1) for name in json.loads(golden_path(triton.__version__).read_text())
        ]
        wanted = {target: sorted({case for on, case in known if on == target}) for target in options.target}
    else:
        names = [name for name in cases() if any(fnmatch(name, pattern) for pattern in options.only)]
        wanted = {target: names for target in options.target}
    found = compile_all(wanted)
    print(json.dumps({"triton": triton.__version__, "kernels": found}) if options.json else table(found))
    this = golden_name(triton.__version__)
    wrong = {name: rules for name, x in found.items() if (rules := broken_rules(name, x) - excused(name, this))}
    for name, rules in wrong.items():
        print(f"{name}: breaks {', '.join(sorted(rules))}: {found[name]}", file=sys.stderr)
    if options.write:
        path = golden_path(triton.__version__)
        known = json.loads(path.read_text()) if path.exists() else {}
        known = dict(sorted((known | found).items()))
        path.write_text("{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(x)}" for n, x in known.items()) + "\n}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
