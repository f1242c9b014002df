"""``docs/results.md`` and its pictures, built from the results JSON alone."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harlora.data.catalog import domain, title
from harlora.errors import InputError
from harlora.files import write_text
from harlora.report import aims, plots
from harlora.report.experiments import by_setting, section, unfinished
from harlora.report.paper import MEMORY_MB, PARAMETERS, SCORES
from harlora.report.tables import (
    COLUMNS,
    LEGEND,
    MEMORY_LEGEND,
    PROTOCOL_TITLES,
    TITLES,
    Record,
    as_preset,
    comparable,
    groups,
    has_memory,
    heading,
    held,
    markdown,
    megabytes,
    memory,
    method_title,
    plain,
    pooled,
    row,
    score_text,
    total,
)  # fmt: skip
from harlora.train.experiment import Experiment
from harlora.train.finetune import METHODS


def read_results(folder: Path) -> list[Record]:
    """Every result in ``folder``.

    Raises: InputError if there is none, or a file is not a result of `harlora lodo`.
    """
    records = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            for key in ("scores", "bytes", "config", "target", "provenance", "synthetic", "preset"):
                record[key]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{file}: not a result of `harlora lodo` ({error!r}); move it away") from error
        records.append(record)
    if not records:
        raise InputError(f"{folder}: has no results JSON; run `harlora lodo` first, or name the folder it wrote to")
    return records


def build_report(
    results: Path,
    out: Path,
    readme: Path | None = None,
    experiments: Sequence[Experiment] = (),
    records: Sequence[Record] = (),
) -> Path:
    """Write the report on the results in a folder to ``out``, its pictures to ``images`` beside it.

    experiments: each has a section of its own, instead of one for every target and split; other results are left out.
    readme: a file in which the lines between ``<!-- results -->`` and ``<!-- /results -->`` become the headline table.
    records: those results of the folder that the report is to be on; by default all.
    Raises: InputError as `read_results` and `pooled`, if none is of the experiments, or ``readme`` has no such lines.
    """
    records = records or read_results(results)
    if experiments:
        chosen = [id(record) for experiment in experiments for record in experiment.select(records)]
        records = [record for record in records if id(record) in chosen]
        if not records:
            names = ", ".join(experiment.name for experiment in experiments)
            raise InputError(f"{results}: has no results of the experiments {names}; `harlora run` makes them")
    shown = pooled(records)
    main = plain(shown)
    if readme is not None:
        _fill(readme, main)
    images = out.parent / "images"
    parts = [_opening(main, len(records), results)]
    if experiments:
        ordered = sorted(experiments, key=lambda experiment: experiment.place)
        parts += [section(experiment, records, images, out) for experiment in ordered]
        parts.append(unfinished(ordered, records))
    else:
        parts += [_section(members, images, out) for members in groups(main)]
    parts.append(_bytes_section(main, images, out))
    parts.append(_aims(records))
    if not experiments:
        parts.append(_sweeps(shown, images, out))
    parts.append(_how(records))
    write_text(out, "\n".join(part for part in parts if part))
    return out


_BEGIN, _END = "<!-- results -->", "<!-- /results -->"


def _fill(readme: Path, records: Sequence[Record]) -> None:
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise InputError(f"{readme}: has no lines {_BEGIN} and {_END} to put the results between")
    write_text(readme, f"{before}{_BEGIN}\n{_headline(records)}{_END}{after}")


def _headline(records: Sequence[Record]) -> str:
    """The macro-F1 of every method on new people, and what is held for it in training."""
    chosen = _of_most_seeds(groups(comparable(records)))
    methods = [m for m in TITLES if any(r["config"]["method"] == m for g in chosen for r in g)]
    rows = []
    for members in chosen:
        by_method = {record["config"]["method"]: record for record in members}
        rows.append([_title(members), *(_score(by_method.get(method), "macro_f1") for method in methods)])
    if chosen:
        by_method = {record["config"]["method"]: record for record in chosen[0]}
        sizes = [megabytes(held(by_method[m])) if m in by_method else "" for m in methods]
        rows.append(["MB held in training", *sizes])
    return markdown(["macro-F1 on new people", *(TITLES[m] for m in methods)], rows)


def _of_most_seeds(all_: Sequence[list[Record]]) -> list[list[Record]]:
    """Of groups of results those on new people with the most seeds: others are of fewer people, or not done yet."""
    chosen = [members for members in all_ if _protocol(members) == "subject"]
    seeds = [max(len(record.get("seeds", (0,))) for record in members) for members in chosen]
    return [members for members, count in zip(chosen, seeds, strict=True) if count == max(seeds)]


def _link(text: str, image: Path, out: Path) -> str:
    return f"![{text}]({image.relative_to(out.parent).as_posix()})\n"


def _opening(records: Sequence[Record], files: int, results: Path) -> str:
    synthetic = any(record["synthetic"] for record in records)
    title = "# Results on SYNTHETIC data" if synthetic else "# Results"
    lines = [
        title,
        "",
        f"Leave one dataset out: the encoder is pretrained on the other datasets without labels, then adapted to the "
        f"one left out. Built by `harlora report` from the {files} JSON files in "
        f"`{results.as_posix()}`; nothing here is typed by hand.",
        "",
    ]
    if synthetic:
        lines += ["**The recordings are made up. These numbers say nothing about people.**", ""]
    if any(_protocol(members) == "subject" for members in groups(records)):
        lines += [
            "The headline is the **subject split**: nobody is on both sides. The paper splits windows at random, so "
            "overlapping windows of the same people are on both sides; that saturates and says little about a new "
            "person.",
            "",
        ]
        lines += [_headline(records)]
    return "\n".join(lines)


def _protocol(members: Sequence[Record]) -> str:
    protocol: str = members[0]["config"]["protocol"]
    return protocol


def _title(members: Sequence[Record]) -> str:
    return title(members[0]["target"])


def _score(record: Record | None, key: str) -> str:
    return "" if record is None else score_text(record, key)


def _section(members: Sequence[Record], images: Path, out: Path) -> str:
    first = members[0]
    target, protocol = first["target"], _protocol(members)
    name = f"confusion-{target}-{protocol}.png"
    plots.confusion(members, images / name)
    windows = first["windows"]
    tested = "" if protocol == "paper" else f" of {len(first['test_subjects'])} people"
    lines = [
        f"## {_title(members)}: {PROTOCOL_TITLES[protocol]}",
        "",
        ("SYNTHETIC data. " if first["synthetic"] else "")
        + f"Pretrained on {', '.join(first['sources'])}. Tested on {windows['test']:,} windows{tested}. "
        f"Columns: {LEGEND}",
        "",
        markdown(COLUMNS, [row(record) for record in members]),
    ]
    paper = SCORES.get(domain(target), {})
    if protocol == "paper" and paper and not first["synthetic"]:
        rows = []
        for record in members:
            method = record["config"]["method"]
            if method in paper:
                theirs, score = paper[method], record["scores"]
                rows.append(
                    [
                        method_title(record), score_text(record, "accuracy"), f"{theirs.accuracy:.3f}",
                        score_text(record, "macro_f1"), f"{theirs.macro_f1:.3f}",
                        f"{score['macro_f1'] - theirs.macro_f1:+.3f}", f"{record['seconds']:.0f}", str(theirs.seconds),
                    ]
                )  # fmt: skip
        header = ["method", "accuracy", "paper", "macro-F1", "paper", "difference", "seconds", "paper"]
        other = "other sources and machine, adapters of a rank that it does not say"
        lines += [f"Beside the paper's figures ({other}):", "", markdown(header, rows)]
    lines += [_link(heading(members), images / name, out)]
    return "\n".join(lines)


def _bytes_section(records: Sequence[Record], images: Path, out: Path) -> str:
    chosen = _of_most_seeds(groups(records)) or groups(records)
    if not chosen:
        return ""
    panels = [(_title(members), comparable(members)) for members in chosen]
    plots.by_bytes(panels, images / "macro-f1-by-bytes.png")
    members = chosen[0]
    rows = []
    for record in members:
        size = record["bytes"]
        theirs = MEMORY_MB.get(record["config"]["method"])
        counts = PARAMETERS.get(record["config"]["method"])
        rows.append(
            [
                method_title(record),
                megabytes(size["matrices"]),
                f"{size['matrices'] / size['matrices_float32']:.3f}",
                megabytes(held(record)),
                megabytes(size["step_peak"]),
                megabytes(total(record)),
                "" if theirs is None else " / ".join(f"{value:.2f}" for value in theirs),
                f"{record['parameters']['trainable']:,} of {record['parameters']['total']:,}",
                "" if counts is None else f"{counts[0]:,} of {counts[1]:,}",
            ]
        )
    header = [
        "method", "encoder matrices", "share of float32", "held", "step peak", "total at the peak",
        "paper: total / trained / buffer", "trained parameters", "paper",
    ]  # fmt: skip
    return "\n".join(
        [
            "## Memory",
            "",
            f"Counted on the tensors and measured on one training step of {members[0]['config']['batch_size']} "
            f"windows, {_title(members)}; MB. Gradients are made within the step and counted once in the total. The "
            "paper's QLoRA held 6.22 MB and needed 4.82 MB of buffers on top, more than its LoRA.",
            "",
            markdown(header, rows),
            *_categories(members),
            _link("Macro-F1 by bytes held in training", images / "macro-f1-by-bytes.png", out),
        ]
    )


def _categories(members: Sequence[Record]) -> list[str]:
    """The memory by category of the records that have it."""
    columns = [(r["config"]["method"], method_title(r), r["bytes"]) for r in members if has_memory(r["bytes"])]
    return [f"By what it is for. {MEMORY_LEGEND}", "", markdown(*memory(columns))] if columns else []


def _aims(records: Sequence[Record]) -> str:
    rows = list(aims.rows(records))
    if not rows:
        return ""
    missed = sum(row[-1] != "reached" for row in rows)
    said = "All were reached." if not missed else f"Missed: {missed} of {len(rows)}."
    said += " How the recipe was found, and on which splits, is in [architecture](architecture.md#training)."
    fewest = min(record["windows"]["test"] for record in records)
    return (
        f"## Aims\n\nSet before the study was run. {said} One window of the smallest test part ({fewest:,} windows) is "
        f"worth {1 / fewest:.5f} of accuracy.\n\n{markdown(['aim', 'reached', ''], rows)}"
    )


_SWEPT = {"rank": "Rank", "label_fraction": "Fewer labels", "windows_per_class": "A few windows of each class"}


def _sweeps(records: Sequence[Record], images: Path, out: Path) -> str:
    """Scores by rank and by the number of labels, where these were varied."""
    parts: list[str] = []
    for x, what in _SWEPT.items():
        for members in groups(r for r in records if as_preset(r, x) and (x != "windows_per_class" or r["config"][x])):
            values = {r["config"][x] for r in members if METHODS[r["config"]["method"]].ranked or x != "rank"}
            if len(values) > (x != "windows_per_class"):  # which the main tables have none of
                parts += [f"## {what}", "", by_setting(f"by-{x}", members, x, images, out)]
    return "\n".join(parts)


def _how(records: Sequence[Record]) -> str:
    origin = [record["provenance"] for record in records]
    usual = [record for record in records if as_preset(record)] or records
    configs = [record["config"] for record in usual]
    lines = [
        "## How these were made",
        "",
        f"- Command: {_listed(['`' + o['command'] + '`' for o in origin])}",
        f"- Commit: {_listed([o['commit'] or 'unknown' for o in origin])}"
        + (" (with uncommitted changes)" if any(o["dirty"] for o in origin) else ""),
        f"- Machine: {_listed([o['device'] for o in origin])}, {_listed([o['threads'] for o in origin])} threads; "
        f"torch {_listed([o['versions']['torch'] for o in origin])}",
        f"- Seeds: {_listed([r['config']['seed'] for r in records])}."
        + (
            " One seed gives no spread; small differences between methods can be chance."
            if len({r["config"]["seed"] for r in records}) == 1
            else " Scores with ± are means and standard deviations over seeds; the others are of one seed."
        ),
        f"- Fine-tuning, where nothing else is said: batch {_listed(c['batch_size'] for c in configs)}, "
        f"learning rates {_rates(usual)}; "
        + (
            "the epoch that is kept is chosen on a validation part that is neither trained on nor tested on."
            if all(c.get("validated", True) for c in configs)  # as all were before it was a setting
            else "all but the test part is trained on, and the last epoch is kept."
        ),
        *_recipes(usual),
        f"- Pretraining: {_listed([round(r['pretrained']['seconds']) for r in records])} s an encoder, once for each "
        "target, shared by its runs and not part of the seconds above.",
        "- LoRA and QLoRA train the adapters, the head, LayerNorms, biases and the patch embedding."
        if all(c["train_norms"] for c in configs)
        else "- LoRA and QLoRA train the adapters and the head.",
        "- linear probe and zero-shot train the same head as every method on the mean token of the frozen encoder; "
        "zero-shot learns from the sources' labels that the target has too, and never sees a label of the target.",
        "",
    ]
    return "\n".join(lines)


def _recipes(records: Sequence[Record]) -> list[str]:
    """How long was trained, and on what of the windows, protocol by protocol."""
    lines = []
    for protocol, what in PROTOCOL_TITLES.items():
        same = [record for record in records if record["config"]["protocol"] == protocol]
        epochs = {
            learns: _listed(r["config"]["epochs"] for r in same if METHODS[r["config"]["method"]].learns is learns)
            for learns in (True, False)
        }
        said = [f"{epochs[True]} epochs"] if epochs[True] else []
        said += [f"{epochs[False]} with a frozen encoder"] if epochs[False] not in ("", epochs[True]) else []
        # Older records do not say how windows were changed.
        changed = {
            r["target"]: r["config"] for r in same if "flipped" in r["config"] and METHODS[r["config"]["method"]].learns
        }
        for target, config in sorted(changed.items()):
            half = f", {config['flipped']:.0%} of them half about an axis of the device" if config["flipped"] else ""
            turned = f"turned by about {config['turned_deg']:g}°{half}" if config["turned_deg"] else "as they are"
            said.append(f"windows of {title(target)} {turned}, {config['dropped']:.0%} of their patches left out")
        if said:
            lines.append(f"- For {what}: {'; '.join(said)}.")
    return lines


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def _rates(records: Sequence[Record]) -> str:
    rates: dict[str, set[float]] = {}
    for record in records:
        rates.setdefault(TITLES[record["config"]["method"]], set()).add(record["learning_rate"])
    return ", ".join(f"{name} {'/'.join(f'{rate:g}' for rate in sorted(values))}" for name, values in rates.items())
