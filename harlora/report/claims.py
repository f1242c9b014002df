"""Whether what the sources say of their methods holds in our results, each against its control."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from harlora.data.catalog import title
from harlora.report.compare import compare
from harlora.report.tables import PROTOCOL_TITLES, Record, groups, pretraining
from harlora.train.experiment import Claim
from harlora.train.finetune import FinetuneConfig

HEADER = ("claim", "data", "here", "control", "difference", "95 % interval", "p", "holds")
_FREE = ("seed", "alpha", "by_rank")  # not what a run and its control must have in common
_EARLY = 4  # early_loss is that of the first of so many parts of the training

_MEASURES: Mapping[str, Callable[[Record], float]] = {
    "macro_f1": lambda record: record["scores"]["macro_f1"],
    "ece": lambda record: record["calibration"]["ece"],
    "loss": lambda record: record["history"][-1]["loss"],
    "early_loss": lambda record: statistics.fmean(
        epoch["loss"] for epoch in record["history"][: max(1, len(record["history"]) // _EARLY)]
    ),
    "saved": lambda record: record["bytes"]["saved"] / 1e6,
    "adapter_file": lambda record: record["adapter_file"] / 1e6,
}


def measured(record: Record, measure: str) -> float:
    """A value of a result, one of `harlora.train.experiment.MEASURES`; of bytes in MB."""
    how, _, rank = measure.rpartition("_")
    if how in record.get("by_rank", {}):
        found = record["by_rank"]
        return float(found[how][found["ranks"].index(int(rank))])
    return float(_MEASURES[measure](record) if measure in _MEASURES else record[measure])


def rows(claims: Sequence[Claim], records: Sequence[Record]) -> list[list[str]]:
    """A line, as `HEADER`, for each claim on each target and protocol whose results it is about."""
    lines = []
    for claim in claims:
        for members in groups(records):
            pairs = _pairs(claim, members)
            if pairs:
                lines.append(_row(claim, members[0], pairs))
                if len(lines) > 1 and any(line[0] == claim.says for line in lines[:-1]):
                    lines[-1][0] = ""  # said in the line above
    return lines


def _settings(record: Record) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(asdict(FinetuneConfig(**record["config"]))))
    return settings


def _pairs(claim: Claim, records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Results with the settings of the claim, each with its control, in which all else is the same."""
    named = {*claim.this, *claim.that, *_FREE} - {"seed"}
    usual = asdict(FinetuneConfig())

    def found(settings: Mapping[str, Any]) -> dict[str, Record]:
        chosen: dict[str, Record] = {}
        wanted = {**{key: usual[key] for key in named - {*_FREE}}, **settings}
        for record in records:
            has = _settings(record)
            if all(has[key] == value for key, value in json.loads(json.dumps(wanted)).items()):
                rest = {key: value for key, value in has.items() if key not in named}
                rest["pretraining"] = pretraining(record)
                # Of two results that differ in what was scored alone, that with more.
                key = json.dumps(rest, sort_keys=True)
                if key not in chosen or "by_rank" in record:
                    chosen[key] = record
        return chosen

    these, those = found(claim.this), found(claim.that)
    return [(these[key], those[key]) for key in these if key in those]


def _row(claim: Claim, first: Record, pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    ours = [measured(this, claim.at or claim.measure) for this, _ in pairs]
    theirs = [measured(that, claim.measure) for _, that in pairs]
    sign = 1 if claim.more else -1
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    gain = sign * statistics.fmean(differences)

    def holds(gain: float) -> bool:
        return gain >= -claim.within if claim.within else gain > 0

    kept = sum(holds(sign * difference) for difference in differences)
    interval, p, verdict = "", "", f"{'yes' if holds(gain) else '**no**'}, in {kept} of {len(pairs)}"
    if claim.measure == "macro_f1" and claim.at is None:
        compared = compare([this for this, _ in pairs], [that for _, that in pairs])
        if compared is not None:
            interval = f"{compared.low:+.4f} to {compared.high:+.4f}"
            p = "too few people" if compared.p is None else f"{compared.p:.3f}" if compared.p >= 0.001 else "< 0.001"
    protocol = PROTOCOL_TITLES[first["config"]["protocol"]].partition(" (")[0]
    synthetic = "SYNTHETIC data: " if first["synthetic"] else ""
    return [
        claim.says, f"{synthetic}{title(first['target'])}, {protocol}", _number(statistics.fmean(ours)),
        _number(statistics.fmean(theirs)), f"{statistics.fmean(differences):+.4f}", interval, p, verdict,
    ]  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
