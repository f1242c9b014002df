"""What the standard study was to reach, set before it was run; the report says of each whether it did."""

import math
from collections.abc import Iterator, Sequence

from harlora.data.catalog import domain, title
from harlora.report.tables import PROTOCOL_TITLES, TITLES, Record

# Macro-F1 by domain, protocol and method.
MACRO_F1 = {
    ("uci", "subject"): {"qlora": 0.94},
    ("motionsense", "subject"): {"qlora": 0.89},
    ("uci", "paper"): {"full": 0.980, "lora": 0.980, "qlora": 0.978},
    ("motionsense", "paper"): {"full": 0.985, "lora": 0.985, "qlora": 0.985},
}
QLORA_BELOW_LORA = 0.003


def rows(members: Sequence[Record]) -> Iterator[list[str]]:
    """For the results of one dataset and protocol: the aim, what was reached, and the verdict.

    Nothing for another preset than the standard one.
    """
    first = members[0]
    if first["preset"] != "standard":
        return
    target, protocol = first["target"], first["config"]["protocol"]
    where = f"{title(target)}, {PROTOCOL_TITLES[protocol].partition(' (')[0]}"
    by_method = {record["config"]["method"]: record for record in members}
    f1 = {method: record["scores"]["macro_f1"] for method, record in by_method.items()}

    def row(what: str, reached: float, least: float) -> list[str]:
        missed = least - reached
        return [f"{where}: {what}", f"{reached:.5f}", "reached" if missed <= 0 else f"**missed by {missed:.5f}**"]

    for method, least in MACRO_F1.get((domain(target), protocol), {}).items():
        if method in f1:
            yield row(f"macro-F1 of {TITLES[method]} at least {least:.3f}", f1[method], least)
    if "lora" in f1 and "qlora" in f1:
        what = f"macro-F1 of QLoRA at most {QLORA_BELOW_LORA} below that of LoRA ({f1['lora']:.5f})"
        yield row(what, f1["qlora"], f1["lora"] - QLORA_BELOW_LORA)
    for method in ("lora", "qlora"):
        if method in f1 and "linear_probe" in f1:
            what = f"macro-F1 of {TITLES[method]} above that of the linear probe ({f1['linear_probe']:.5f})"
            yield row(what, f1[method], math.nextafter(f1["linear_probe"], 2.0))
