"""Writes the tables of a result of cpu.py into a document, between its markers: python bench/tables.py RESULT.json FILE

The markers are <!-- cpu --> and <!-- /cpu -->, each on a line of its own.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harlora.files import write_text

Row = dict[str, Any]
MARKED = re.compile(r"(<!-- cpu -->\n).*?(<!-- /cpu -->)", re.DOTALL)


def tables(result: Row) -> str:
    """Every ratio of the result with its target, memory and ceilings, in Markdown."""
    facts, rates = result["provenance"], result["ceilings"]
    flags = ", ".join(flag for flag in facts["cpu_flags"] if flag != "fma")
    fma = f"{rates['fma_float32_gflops']:.0f} GFLOP/s of float32 FMA, " if rates["fma_float32_gflops"] else ""
    parts = [
        f"Measured with `{facts['command']}` at commit {facts['commit'][:7]}{' (changed)' if facts['dirty'] else ''}: "
        f"{facts['device']} ({flags}), {facts['threads']} threads, kernels: {result['kernels']['H']}; torch "
        f"{facts['versions']['torch']}, bitsandbytes {facts['versions']['bitsandbytes']} (product in "
        f"{result['kernels']['P']}), peft {facts['versions']['peft']}. Others took {facts['taken_by_others']:.1%} of "
        f"the cores meanwhile. Ceilings: {fma}{rates['mm_float32_gflops']:.0f} GFLOP/s in `torch.mm`, "
        f"{rates['copy_gb_s']:.0f} GB/s copied."
    ]
    layers = [row for row in result["rows"] if row["case"] == "layer"]
    counts = sorted({row["rows"] for row in layers})
    shapes = list(dict.fromkeys((row["in_features"], row["out_features"]) for row in layers))
    for of, over, what in (
        ("H", "P", "One layer forward: times faster than bitsandbytes + PEFT"),
        ("H16", "P", "The same in bfloat16, as bitsandbytes computes"),
        ("H8", "P", "The same in 8 bits"),
        ("H", "D", "Times faster than float32 + PEFT"),
    ):
        body = [
            [f"{shape[0]}→{shape[1]}", *(cell(result, of, over, rows=count, shape=shape) for count in counts)]
            for shape in shapes
        ]
        parts.append(markdown([what, *(f"M = {count}" for count in counts)], body))
    body = []
    for case in ("encoder", "step"):
        for model, windows in dict.fromkeys((r["model"], r["windows"]) for r in result["rows"] if r["case"] == case):
            name = f"{case}, {windows} windows, model {model}"
            body.append(
                [name, *(cell(result, of, over, case=case, model=model, windows=windows)
                         for of, over in (("H", "P"), ("H16", "P"), ("H8", "P"), ("H", "D"), ("H", "F")))]
            )  # fmt: skip
    heads = ["whole model", "over bitsandbytes + PEFT", "the same in bfloat16", "in 8 bits", "over float32 + PEFT",
             "over float32, no adapter"]  # fmt: skip
    parts.append(markdown(heads, body))
    memory = []
    for row in result["rows"]:
        if row["case"] == "memory" and row["status"] == "ok":
            extra = max(row["extra_native_bytes"] or 0, row["extra_torch_bytes"] or 0)
            memory.append(f"{row['competitor']}, M = {row['rows']}: {extra / 2**20:.1f} MiB")
    parts.append(
        "Peak memory of one step through a 4096×4096 layer beyond inputs, outputs, gradients and t (H harlora, P "
        "bitsandbytes + PEFT): " + "; ".join(memory) + "."
    )
    judged = [entry["reached"] for entry in (*result["ratios"], *result["rows"]) if entry.get("reached") is not None]
    parts.append(f"**Bold**: the project's own target is missed. {sum(judged)} of {len(judged)} targets are reached.")
    return "\n\n".join(parts) + "\n"


def cell(result: Row, of: str, over: str, *, shape: tuple[int, int] | None = None, **facts: Any) -> str:
    """The ratio, bold where its target is missed; with the time of `of` where it is a whole model's."""
    if shape is not None:
        facts |= {"case": "layer", "in_features": shape[0], "out_features": shape[1]}
    for entry in result["ratios"]:
        if entry["of"] == of and entry["over"] == over and all(entry.get(k) == v for k, v in facts.items()):
            if entry["ratio"] is None:
                return "no result"
            text = f"{entry['ratio']:.2f}"
            return f"**{text}**" if entry["reached"] is False else text
    return "–"


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *body))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    made = tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    document = Path(sys.argv[2])
    text = document.read_text(encoding="utf-8")
    if not MARKED.search(text):
        sys.exit(f"{document} has no <!-- cpu --> … <!-- /cpu -->")
    write_text(document, MARKED.sub(lambda match: f"{match[1]}{made}{match[2]}", text))
