"""The part of the report that answers the question of one experiment: tables, curves, differences, LaTeX."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harlora.data.catalog import domain, title
from harlora.data.splits import TEST_FRACTION
from harlora.files import write_text
from harlora.report import advice, claims, plots
from harlora.report.compare import adjusted, compare
from harlora.report.paper import LABEL_SHARE_ACCURACY, RANK_MACRO_F1, SCORES
from harlora.report.tables import (
    PROTOCOL_TITLES,
    TITLES,
    Record,
    groups,
    heading,
    held,
    markdown,
    megabytes,
    method_title,
    order,
    pooled,
    preset_of,
    pretraining,
    scaling,
    score_text,
    timed,
)
from harlora.train.experiment import PRESETS, Experiment
from harlora.train.finetune import METHODS

_NOT_COLUMNS = ("method", "protocol", "seed", "alpha", "by_rank")
_SCALING = "alpha / rank"


def section(experiment: Experiment, records: Sequence[Record], images: Path, out: Path) -> str:
    """The section of one experiment in the page ``out``; empty unless most of its runs are among ``records``.

    Its tables are also written as LaTeX, to the folder ``tables`` beside the page.
    """
    chosen: list[Any] = experiment.select(records)
    planned = _planned(experiment, chosen)
    if not chosen or 2 * len(chosen) <= planned:
        return ""
    lines = [f"## {experiment.title}", ""]
    if experiment.about:
        lines += [experiment.about, ""]
    lines += _settings(chosen)
    lines += _encoders(chosen)
    if len(chosen) < planned:
        lines += [f"**So far {len(chosen)} of {planned} runs.**", ""]
    found = claims.rows(experiment.claims, chosen)
    if found:
        lines += [markdown(claims.HEADER, found)]
    for members in groups(chosen) if set(experiment.show) - {"claims"} else ():
        lines += [by_setting(experiment.name, members, experiment.x, images, out, experiment.show)]
        differences = _differences(members)
        if differences:
            lines += [markdown(_DIFFERENCES, differences)]
    if "advice" in experiment.show:
        lines += _advice(chosen)
    return "\n".join(lines)


def _advice(records: Sequence[Record]) -> list[str]:
    """Which method to choose, for each protocol."""
    lines = []
    for protocol, what in PROTOCOL_TITLES.items():
        same = [members for members in groups(records) if members[0]["config"]["protocol"] == protocol]
        shown = {members[0]["target"]: pooled(members) for members in same}
        said, rows = advice.rows({name: list(zip(_names(all_), all_, strict=True)) for name, all_ in shown.items()})
        if rows:
            lines += [f"### Which to choose, {what}", "", said, "", markdown(advice.HEADER, rows)]
    return lines


def unfinished(experiments: Sequence[Experiment], records: Sequence[Record]) -> str:
    """A section that lists the experiments which `section` leaves out; empty if there are none."""
    lines = []
    for experiment in experiments:
        chosen = experiment.select(records)
        planned = _planned(experiment, chosen)
        if not chosen or 2 * len(chosen) <= planned:
            lines.append(f"- {experiment.title}: {len(chosen)} of {planned or 'its'} runs")
    return "\n".join(["## Not yet", "", *lines, ""]) if lines else ""


def _planned(experiment: Experiment, chosen: Sequence[Mapping[str, Any]]) -> int:
    """How many runs there will be; where targets are not named, on those that results are of."""
    return experiment.count() * len(experiment.targets or {record["target"] for record in chosen})


def _settings(records: Sequence[Record]) -> list[str]:
    """What all runs have in common and the preset has not; what varies is in the tables."""
    found = []
    all_, usual = [_settings_of(record) for record in records], [_usual(record) for record in records]
    for key, value in all_[0].items():
        if all(settings.get(key) == value for settings in all_) and all(preset.get(key) != value for preset in usual):
            found.append(f"{key} {_value(value)}")
    return [f"Settings of all runs: {', '.join(found)}.", ""] if found else []


def _encoders(records: Sequence[Record]) -> list[str]:
    """A remark where results on one dataset begin from encoders that differ though they have the same settings."""
    losses: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if METHODS[record["config"]["method"]].pretrained:
            losses.setdefault((record["target"], record["pretrained"]["identity"]), []).append(
                record["pretrained"]["loss"]
            )
    lines = []
    for (target, _), found in losses.items():
        fewest = min(found.count(loss) for loss in set(found))
        if fewest < len(found):
            lines.append(
                f"{title(target)}: {fewest} of {len(found)} runs begin from an encoder that was pretrained another "
                "time with the same settings and data; it differs by rounding."
            )
    return [*lines, ""] if lines else []


def by_setting(
    name: str, members: Sequence[Record], x: str | None, images: Path, out: Path, show: Sequence[str] = ("scores",)
) -> str:
    """Table of the results of one target and protocol, pooled over seeds, also as LaTeX; and their curve by ``x``."""
    first, shown = members[0], pooled(members)
    name = f"{name}-{first['target']}-{first['config']['protocol']}"
    header, rows = table(shown, show)
    write_text(out.parent / "tables" / f"{name}.tex", latex(header, rows, heading(members)))
    lines = [f"### {_title(members)}", "", markdown(header, rows)]
    if "pareto" in show:
        shown.sort(key=order)
        plots.pareto(shown, _names(shown), images / f"{name}-pareto.png")
        lines += [f"![{heading(members)}]({(images / f'{name}-pareto.png').relative_to(out.parent).as_posix()})", ""]
    if x:
        plots.curve(shown, x, images / f"{name}.png", reference=_reference(x, first))
        lines += [f"![{heading(members)}]({(images / f'{name}.png').relative_to(out.parent).as_posix()})", ""]
    return "\n".join(lines)


def _title(members: Sequence[Record]) -> str:
    first = members[0]
    synthetic = "SYNTHETIC data: " if first["synthetic"] else ""
    return f"{synthetic}{title(first['target'])}, {PROTOCOL_TITLES[first['config']['protocol']]}"


def _varied(records: Sequence[Record]) -> list[str]:
    """The settings in which the results differ, beside method, protocol and seed, and what methods do by default."""
    all_ = [_settings_of(record) for record in records]
    usual = [_usual(record) for record in records]
    return [
        key
        for key in dict.fromkeys(key for settings in all_ for key in settings)
        if len({str(settings.get(key)) for settings in all_}) > 1
        and any(settings.get(key) != preset.get(key) for settings, preset in zip(all_, usual, strict=True))
    ]


def _names(records: Sequence[Record]) -> list[str]:
    """Each record's method, with what tells it from others of that method."""
    varied = [key for key in _varied(records) if key != "rank"]
    names = []
    for record in records:
        settings = _settings_of(record)
        told = [f"{key.replace('_', ' ')} {_value(value)}" for key in varied if (value := settings.get(key))]
        names.append(", ".join([method_title(record), *told]))
    return names


def _settings_of(record: Record) -> dict[str, Any]:
    """Every setting of a result beside method, protocol and seeds: of fine-tuning, and of pretraining."""
    return _flat(record["config"], pretraining(record))


def _usual(record: Record) -> dict[str, Any]:
    """As `_settings_of`, what the preset has."""
    return _flat(preset_of(record).values(), asdict(PRESETS[record["preset"]].pretrain))


def _flat(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if key not in _NOT_COLUMNS}
    if METHODS[config["method"]].ranked:
        found[_SCALING] = scaling(config)
    if METHODS[config["method"]].pretrained:
        model = before.get("model", {})
        found |= {f"pretrain.{key}": value for key, value in before.items() if key not in ("seed", "model")}
        found |= {f"pretrain.model.{key}": value for key, value in model.items()}
    return found


_COLUMNS: Mapping[str, Mapping[str, Callable[[Record], str]]] = {
    "scores": {
        "accuracy": lambda record: score_text(record, "accuracy"),
        "macro-F1": lambda record: score_text(record, "macro_f1"),
        "the paper's": lambda record: paper(record),
    },
    "calibration": {
        name: lambda record, key=key: f"{record['calibration'][key]:.3f}" if key in record["calibration"] else ""  # type: ignore[misc]
        for name, key in (("ECE", "ece"), ("MCE", "mce"), ("ACE", "ace"), ("Brier", "brier"))
    },
    "cost": {
        "trainable": lambda record: f"{record['parameters']['trainable']:,}",
        "held, MB": lambda record: megabytes(held(record)),
        "file, MB": lambda record: megabytes(record["adapter_file"]) if "adapter_file" in record else "",
    },
}


def table(records: Sequence[Record], show: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of results that are pooled over their seeds; ``show`` as in `Experiment`."""
    varied = [key for key in _varied(records) if key != "rank"]  # rank stands with the method
    columns: dict[str, Callable[[Record], str]] = {"method": method_title}
    columns |= {key: lambda record, key=key: _value(_settings_of(record).get(key)) for key in varied}  # type: ignore[misc]
    for part in show:
        columns |= _COLUMNS.get(part, {})
    if "cost" in show:
        seconds = timed(records)
        columns["seconds"] = lambda record: "" if (spent := seconds(record)) is None else f"{spent:.0f}"
    columns["seeds"] = lambda record: str(len(record.get("seeds", (0,))))
    told = [(*order(record), *(_rank(_settings_of(record).get(key)) for key in varied)) for record in records]
    ordered = [record for _, record in sorted(zip(told, records, strict=True), key=lambda pair: pair[0])]
    rows = [[cell(record) for cell in columns.values()] for record in ordered]
    filled = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    header = list(columns)
    return [header[number] for number in filled], [[row[number] for number in filled] for row in rows]


def _rank(value: Any) -> tuple[int, float, str]:
    """For sorting: numbers by size, others as they are written."""
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, _value(value))


def _value(value: Any) -> str:
    if value is None:  # not set, or a setting that the record's version did not have
        return "–"
    if isinstance(value, dict):
        return " ".join(f"{key}={entry}" for key, entry in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def paper(record: Record) -> str:
    """What the paper has for such a run: macro-F1, or accuracy where it has that alone; empty if it has none."""
    config, whose = record["config"], domain(record["target"])
    if config["protocol"] != "paper" or record["synthetic"] or config["windows_per_class"]:
        return ""
    method = config["method"]
    share = record["windows"]["train"] / record["windows"]["test"] * TEST_FRACTION
    if config["label_fraction"] < 1:
        near = [
            accuracy
            for known, accuracy in LABEL_SHARE_ACCURACY.get(method, {}).items()
            if whose == "uci" and abs(known - share) <= 0.03
        ]
        return f"accuracy {near[0]:.3f}" if near else ""
    if method == "lora" and whose == "uci" and config["rank"] in RANK_MACRO_F1:
        return f"{RANK_MACRO_F1[config['rank']]:.3f}"
    if METHODS[method].ranked and config["rank"] != preset_of(record).rank:
        return ""  # theirs is of one rank
    theirs = SCORES.get(whose, {}).get(method)
    return "" if theirs is None else f"{theirs.macro_f1:.3f}"


def _reference(x: str, first: Record) -> dict[float, float]:
    """The paper's curve by ``x``, if it has one for this target."""
    ours = first["config"]["protocol"] == "paper" and domain(first["target"]) == "uci"
    return (
        {float(rank): score for rank, score in RANK_MACRO_F1.items()}
        if ours and x == "rank" and not first["synthetic"]
        else {}
    )


_DIFFERENCES = ("macro-F1, person by person", "people", "difference", "95 % interval", "p, adjusted")

_MOST_IN_PAIRS = 4


def _differences(members: Sequence[Record]) -> list[list[str]]:
    """Methods against each other where nothing but the method (and its own settings) differs.

    Every pair of up to four methods; of more, QLoRA (or the last) against each. p is adjusted for the rows together.
    """
    methods: dict[str, list[Record]] = {}
    for record in members:
        methods.setdefault(record["config"]["method"], []).append(record)
    if any(len(pooled(same)) > 1 for same in methods.values()):
        return []
    names = [name for name in reversed(TITLES) if name in methods]
    pairs = list(itertools.combinations(names, 2))
    if len(names) > _MOST_IN_PAIRS:
        chosen = "qlora" if "qlora" in names else names[0]
        pairs = [(chosen, other) for other in names if other != chosen]
    found = {pair: compare(*(methods[name] for name in pair)) for pair in pairs}
    known = {pair: comparison for pair, comparison in found.items() if comparison is not None}
    return [
        [
            f"{TITLES[one]} less {TITLES[other]}", str(comparison.people), f"{comparison.difference:+.4f}",
            f"{comparison.low:+.4f} to {comparison.high:+.4f}" if comparison.people > 1 else "one person",
            "too few people" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001",
        ]
        for ((one, other), comparison), p in zip(known.items(), adjusted(known.values()), strict=True)
    ]  # fmt: skip


def latex(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table for LaTeX with the package booktabs; the first column is text, the others are numbers."""
    lines = [
        "% Written by harlora; needs \\usepackage{booktabs}.",
        "\\begin{table}",
        f"\\caption{{{tex(caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "\\toprule",
        " & ".join(map(tex, header)) + " \\\\",
        "\\midrule",
        *(" & ".join(map(tex, row)) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


_TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$", "×": r"$\times$",
}  # fmt: skip


def tex(text: str) -> str:
    """``text`` with every character that LaTeX would read otherwise written as it wants it."""
    return "".join(_TEX.get(character, character) for character in text)
