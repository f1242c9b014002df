"""What the standard study was to reach, set before it was run; the report says of each whether it did."""

import math
import statistics
from collections.abc import Iterator, Sequence

from harlora.data.catalog import domain, title
from harlora.report.paper import SCORES
from harlora.report.tables import PROTOCOL_TITLES, TITLES, Record, as_preset, groups, plain, pooled, trained_on
from harlora.train.experiment import PRESETS

# Macro-F1 by domain, protocol and method.
MACRO_F1 = {
    ("uci", "subject"): {"qlora": 0.96},
    ("motionsense", "subject"): {"qlora": 0.92},
    ("uci", "paper"): {"full": 0.984, "lora": 0.984, "qlora": 0.984},
    ("motionsense", "paper"): {"full": 0.988, "lora": 0.988, "qlora": 0.988},
}
BELOW_FULL = 0.002
LOW_RANK, HIGH_RANK, LOST_TO_RANK = 8, 64, 0.01
TIMES_FASTER, EPOCHS = 5, 50  # QLoRA on a CPU than the paper's, at its number of epochs
_RANK = PRESETS["standard"].finetune.rank


def rows(records: Sequence[Record]) -> Iterator[list[str]]:
    """The aim, what was reached, and the verdict, of the results of the standard preset on real recordings."""
    real = [record for record in records if record["preset"] == "standard" and not record["synthetic"]]
    for members, runs in zip(groups(pooled(real)), groups(real), strict=True):
        first = members[0]
        where = f"{title(first['target'])}, {PROTOCOL_TITLES[first['config']['protocol']].partition(' (')[0]}"
        for what, reached, least in (*_scores(members), *_ranks(runs)):
            verdict = "reached" if reached >= least else f"**missed by {least - reached:.4f}**"
            yield [f"{where}: {what}", f"{reached:.4f}", verdict]
        for what, seconds, most in _times(members):
            verdict = "reached" if seconds <= most else f"**missed by {seconds - most:.0f} s**"
            yield [f"{where}: {what}", f"{seconds:.0f} s", verdict]


def _f1(record: Record) -> float:
    score: float = record["scores"]["macro_f1"]
    return score


def _scores(members: Sequence[Record]) -> Iterator[tuple[str, float, float]]:
    """Of one target and protocol: the aim, the score and the least that it was to be."""
    target, protocol = members[0]["target"], members[0]["config"]["protocol"]
    f1 = {record["config"]["method"]: _f1(record) for record in plain(members)}
    for method, least in MACRO_F1.get((domain(target), protocol), {}).items():
        if method in f1:
            yield f"macro-F1 of {TITLES[method]} at least {least:.3f}", f1[method], least
    for method in ("lora", "qlora"):
        name = TITLES[method]
        if protocol == "paper" and {method, "full"} <= f1.keys():
            what = f"macro-F1 of {name} at most {BELOW_FULL} below that of full fine-tuning"
            yield f"{what} ({f1['full']:.4f})", f1[method], f1["full"] - BELOW_FULL
        yield from _above_probe(members, method)


def _ranks(runs: Sequence[Record]) -> Iterator[tuple[str, float, float]]:
    """As `_scores`, what a low rank loses to a high one on the same splits."""
    for method in ("lora", "qlora"):
        found: dict[int, dict[int, float]] = {LOW_RANK: {}, HIGH_RANK: {}}
        for run in runs:
            config = run["config"]
            if config["method"] == method and config["rank"] in found and as_preset(run):
                found[config["rank"]][config["seed"]] = _f1(run)
        seeds = found[LOW_RANK].keys() & found[HIGH_RANK].keys()
        if seeds:
            low, high = (statistics.fmean(found[rank][seed] for seed in seeds) for rank in (LOW_RANK, HIGH_RANK))
            what = f"macro-F1 of {TITLES[method]} with rank {LOW_RANK} at most {LOST_TO_RANK} below that with rank"
            yield f"{what} {HIGH_RANK} ({high:.4f})", low, high - LOST_TO_RANK


def _above_probe(members: Sequence[Record], method: str) -> Iterator[tuple[str, float, float]]:
    """The least that a method is above the linear probe, with all labels and, if there are such results, with fewer."""
    found: dict[bool, list[tuple[float, str]]] = {}
    labels = ("label_fraction", "windows_per_class")
    for probe in members:
        if probe["config"]["method"] != "linear_probe" or not as_preset(probe, *labels):
            continue
        for record in members:
            config = record["config"]
            same = all(config[name] == probe["config"][name] for name in labels)
            if config["method"] == method and config["rank"] == _RANK and same and as_preset(record, *labels):
                fewer = config["label_fraction"] < 1 or config["windows_per_class"] > 0
                found.setdefault(fewer, []).append((_f1(record) - _f1(probe), trained_on(record)))
    for fewer, gains in sorted(found.items()):
        gain, where = min(gains)
        which = f", closest of {len(gains)} with fewer labels: {where}" if fewer else ""
        yield f"macro-F1 of {TITLES[method]} less that of the linear probe above 0{which}", gain, math.nextafter(0.0, 1)


def _times(members: Sequence[Record]) -> Iterator[tuple[str, float, float]]:
    """Seconds of fine-tuning on a CPU with the paper's number of epochs, and the most that they were to be."""
    theirs = SCORES.get(domain(members[0]["target"]), {}).get("qlora")
    for record in members:
        config = record["config"]
        whole = as_preset(record) and config["epochs"] == EPOCHS and config["rank"] == _RANK
        alone = record["provenance"]["threads"] > 1  # those of one thread ran beside each other
        on_cpu = alone and record["provenance"].get("device_type") == "cpu"
        if theirs and whole and on_cpu and (config["method"], config["protocol"]) == ("qlora", "paper"):
            what = f"QLoRA on a CPU, {EPOCHS} epochs, in a {TIMES_FASTER}th of the paper's {theirs.seconds} s"
            yield what, record["seconds"], theirs.seconds / TIMES_FASTER
