"""The table of a study's results, for the terminal and for Markdown."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from harlora.data.splits import TEST_FRACTION
from harlora.errors import InputError
from harlora.report.paper import MEMORY_MB
from harlora.train.experiment import PRESETS
from harlora.train.finetune import METHODS, FinetuneConfig

Record = dict[str, Any]

TITLES = {name: method.title for name, method in METHODS.items()}
COLUMNS = (
    "method", "accuracy", "macro-F1", "precision", "recall", "trainable", "frozen", "trained", "optimiser", "held",
    "step peak", "epoch", "seconds",
)  # fmt: skip
LEGEND = (
    "trainable = parameters; bytes are in MB (10⁶); held = frozen + trained + gradients + optimiser; step peak = the "
    "most that one training step allocates beside weights and optimiser: gradients and, mostly, activations; epoch = "
    "the one whose weights were kept, of those trained."
)
PROTOCOL_TITLES = {
    "subject": "new people (subject split)",
    "paper": "random windows (the paper's split)",
}


def method_title(record: Record) -> str:
    """The method as a reader knows it, with its rank if it has one."""
    return titled(record["config"]["method"], record["config"]["rank"])


def titled(method: str, rank: int) -> str:
    """As `method_title`."""
    return f"{TITLES[method]} r={rank}" if METHODS[method].ranked else TITLES[method]


def held(record: Record) -> int:
    """Bytes held through training: frozen and trained parameters, gradients and optimiser state."""
    return sum(record["bytes"][key] for key in ("frozen", "trainable", "gradients", "optimizer"))


def total(record: Record) -> int:
    """Bytes at the fullest moment of a training step: what stays between steps and what one step allocates.

    The gradients are made within the step and count there.
    """
    return sum(record["bytes"][key] for key in ("frozen", "trainable", "optimizer", "step_peak"))


def megabytes(count: int) -> str:
    """Millions of bytes, two decimals."""
    return f"{count / 1e6:.2f}"


_WEIGHTS = ("packed", "scales", "dense", "adapters", "other_trained")
_HELD = (*_WEIGHTS, "gradients", "optimizer")
_CATEGORIES = {
    "packed": "weights in 4 bits",
    "scales": "their scales and code tables",
    "dense": "dense frozen weights, buffers",
    "adapters": "adapters",
    "other_trained": "other trained parameters",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "saved": "saved activations",
    "working": "peak working memory",
    "batch": "the batch",
    "step_peak": "most in one step",
}
MEMORY_LEGEND = (
    "In MB (10⁶ bytes), counted on the tensors and traced through torch's allocator. Saved activations: what backward "
    "needs of forward. Working memory: all else that a step allocates beside gradients and the batch, such as "
    "temporary tensors; the most at once. Most in one step: activations, working memory, gradients and batch "
    "together, at the fullest moment. "
    "The paper's buffers are what its QLoRA dequantises into; how its memory was measured is not said."
)


def has_memory(size: Mapping[str, int]) -> bool:
    """Whether the bytes of a record are told by category; older records have totals alone."""
    return _CATEGORIES.keys() <= size.keys()


def memory(columns: Sequence[tuple[str, str, Mapping[str, int]]]) -> tuple[list[str], list[list[str]]]:
    """A table of memory in training, its header and lines: categories below each other, methods side by side.

    columns: of each the method, its title, and bytes as `harlora.train.finetune.method_bytes` has them.
    """
    sizes = [size for *_, size in columns]
    by_method = {method: size for method, _, size in columns}

    def line(name: str, counts: Iterable[int]) -> list[str]:
        return [name, *map(megabytes, counts)]

    def summed(name: str, keys: Sequence[str]) -> list[str]:
        return line(name, (sum(size[key] for key in keys) for size in sizes))

    def paper(name: str, part: int) -> list[str]:
        theirs = [MEMORY_MB.get(method) for method, *_ in columns]
        return [name, *("" if mb is None else f"{mb[part]:.2f}" for mb in theirs)]

    def share(name: str, method: str) -> Iterator[list[str]]:
        if method in by_method:
            whole = sum(by_method[method][key] for key in _HELD)
            yield [name, *(f"{sum(size[key] for key in _HELD) / whole:.3f}" for size in sizes)]

    lines = [line(_CATEGORIES[key], (size[key] for size in sizes)) for key in _HELD]
    lines.insert(len(_WEIGHTS), summed("all weights", _WEIGHTS))
    lines.insert(len(_WEIGHTS) + 1, paper("all weights in the paper", 0))
    lines.append(summed("held without activations", _HELD))
    lines += share("… as a share of LoRA's", "lora")
    lines += share("… as a share of full fine-tuning's", "full")
    lines += [line(_CATEGORIES[key], (size[key] for size in sizes)) for key in ("saved", "working")]
    lines.append(paper("buffers in the paper", 2))
    lines += [line(_CATEGORIES[key], (size[key] for size in sizes)) for key in ("batch", "step_peak")]
    lines.append(summed("all at the fullest moment", (*_WEIGHTS, "optimizer", "step_peak")))
    return ["MB", *(title for _, title, _ in columns)], lines


_SCORES = ("accuracy", "macro_f1", "precision", "recall")


def pooled(records: Iterable[Record]) -> list[Record]:
    """Results that differ in the seed alone as one: means, ``spread`` (standard deviations), confusion summed.

    Seconds are the mean of those with the most threads.
    Raises: InputError if two results of one seed differ in nothing but the seed of their pretraining.
    """
    found: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=order):
        config, seed = record["config"], record["config"]["seed"]
        same = [
            {key: value for key, value in entry.items() if key != "seed"} for entry in (config, pretraining(record))
        ]
        device = record["provenance"].get("device_type")
        key = json.dumps([record["target"], record["sources"], device, *same], sort_keys=True)
        there = found.setdefault(key, {}).setdefault(seed, record)
        if there is not record:
            raise InputError(
                f"two results of {record['target']}, {config['protocol']}, {method_title(record)}, seed {seed}, have "
                f"the same settings: {there['identity']} and {record['identity']}. Their data differ, or the seed of "
                "their pretraining; move one to a folder of its own"
            )
    return [
        _pool([*members.values()]) if len(members) > 1 else next(iter(members.values())) for members in found.values()
    ]


def pretraining(record: Record) -> dict[str, Any]:
    """How the encoder of a result was pretrained; empty if it does not say."""
    return dict(record["pretrained"].get("config", {}))


def _pool(members: Sequence[Record]) -> Record:
    first = members[0]
    values = {key: [member["scores"][key] for member in members] for key in _SCORES}
    rows = zip(*(member["scores"]["confusion"] for member in members), strict=True)
    confusion = [[sum(cells) for cells in zip(*same, strict=True)] for same in rows]
    means = {key: statistics.fmean(several) for key, several in values.items()}
    calibrated = [member["calibration"] for member in members if "calibration" in member]
    most = max(map(threads, members))  # the others ran beside each other
    kinds = [kind for kind in ("ece", "mce", "ace", "brier") if all(kind in entry for entry in calibrated)]
    return {
        **first,
        **({"calibration": {k: statistics.fmean(c[k] for c in calibrated) for k in kinds}} if calibrated else {}),
        "seeds": tuple(member["config"]["seed"] for member in members),
        "scores": {**first["scores"], **means, "confusion": confusion},
        "spread": {key: statistics.stdev(several) for key, several in values.items()},
        "seconds": statistics.fmean(member["seconds"] for member in members if threads(member) == most),
        "provenance": {**first["provenance"], "threads": most},
        "epochs": tuple(statistics.fmean(counts) for counts in zip(*map(epochs, members), strict=True)),
    }


def threads(record: Record) -> int:
    """With how many CPU threads it was trained."""
    count: int = record["provenance"]["threads"]
    return count


def timed(records: Sequence[Record]) -> Callable[[Record], float | None]:
    """Gives the seconds of those of ``records`` whose device and number of threads most of them have, else None."""

    def way(record: Record) -> tuple[str | None, int]:
        return record["provenance"].get("device_type"), threads(record)

    ways = Counter(map(way, records))
    usual = max(ways, key=lambda one: (ways[one], one[1]), default=None)
    return lambda record: record["seconds"] if way(record) == usual else None


def epochs(record: Record) -> tuple[float, float]:
    """The epoch whose weights were kept, and how many were trained before training stopped."""
    found: tuple[float, float] = record.get("epochs") or (record["best_epoch"], len(record["history"]))
    return found


def scaling(config: Mapping[str, Any]) -> float:
    """What the low-rank branch is multiplied by, of a fine-tuning configuration."""
    return float(config["alpha"] / config["rank"])


def preset_of(record: Record) -> FinetuneConfig:
    """The settings that the record's preset has for its method, protocol and dataset."""
    config = record["config"]
    usual = replace(PRESETS[record["preset"]].finetune, method=config["method"], protocol=config["protocol"])
    return usual.for_dataset(record["target"], record.get("placement", ""))


def as_preset(record: Record, *free: str) -> bool:
    """Whether training was as the record's preset has it, whatever its method, protocol, rank, seeds and ``free``.

    With another rank alpha is another, so that the scaling is the preset's.
    """
    config = record["config"]
    before, usual = pretraining(record), asdict(PRESETS[record["preset"]].pretrain)
    if any(before[name] != value for name, value in usual.items() if name in before and name != "seed"):
        return False
    preset = preset_of(record).values()
    if METHODS[config["method"]].ranked and scaling(config) != scaling(preset):
        return False
    any_value = {"method", "protocol", "rank", "alpha", "seed", *free}
    if config.keys() - preset.keys() - any_value:  # settings that are left out where they have their default
        return False
    return all(config[name] == value for name, value in preset.items() if name in config and name not in any_value)


def plain(records: Iterable[Record]) -> list[Record]:
    """Results with the preset's settings and, of several ranks, rank 8 or else the lowest: those of the main tables.

    Of adapters LoRA and QLoRA; experiments have tables of the others.
    """
    chosen = []
    for members in groups(record for record in records if as_preset(record)):
        for method in (name for name, entry in METHODS.items() if entry.adapter in (None, "lora")):
            same = [record for record in members if record["config"]["method"] == method]
            ranks = {record["config"]["rank"] for record in same}
            rank = 8 if 8 in ranks else min(ranks, default=0)
            chosen += [record for record in same if record["config"]["rank"] == rank]
    return chosen


def comparable(records: Iterable[Record]) -> list[Record]:
    """Of each target and protocol the results of the most seeds: on other splits a method may score otherwise.

    records: pooled over seeds.
    """
    chosen = []
    for members in groups(records):
        seeds = [len(record.get("seeds", (0,))) for record in members]
        chosen += [record for record, count in zip(members, seeds, strict=True) if count == max(seeds)]
    return chosen


def score_text(record: Record, key: str) -> str:
    """A score with three decimals, and its standard deviation over seeds if there are several."""
    spread = record.get("spread")
    return f"{record['scores'][key]:.3f}" + (f" ± {spread[key]:.3f}" if spread else "")


def row(record: Record) -> list[str]:
    """One line of the table, in the order of `COLUMNS`."""
    size = record["bytes"]
    return [
        method_title(record),
        *(score_text(record, key) for key in _SCORES),
        f"{record['parameters']['trainable']:,}",
        *(megabytes(size[key]) for key in ("frozen", "trainable", "optimizer")),
        megabytes(held(record)),
        megabytes(size["step_peak"]),
        "{:.0f} of {:.0f}".format(*epochs(record)),
        f"{record['seconds']:.0f}",
    ]


def trained_on(record: Record) -> str:
    """How many of the labels a result is trained on; the test part is a fixed share of all windows."""
    count = record["config"]["windows_per_class"]
    share = record["windows"]["train"] / record["windows"]["test"] * TEST_FRACTION
    return f"{count} window{'s' * (count > 1)} a class" if count else f"{share:.0%} of all windows"


def order(record: Record) -> tuple[Any, ...]:
    """For sorting: target, subject before paper, methods as listed, then rank, labels and seed."""
    config = record["config"]
    return (
        record["target"],
        list(PROTOCOL_TITLES).index(config["protocol"]),
        list(METHODS).index(config["method"]),
        config["rank"],
        -config["label_fraction"],
        config["windows_per_class"],
        config["seed"],
    )


def heading(records: Sequence[Record]) -> str:
    """What a group of results of one target and protocol is about."""
    first = records[0]
    synthetic = "SYNTHETIC data: " if first["synthetic"] else ""
    return (
        f"{synthetic}{first['target']}, {PROTOCOL_TITLES[first['config']['protocol']]}; "
        f"pretrained on {', '.join(first['sources'])}"
    )


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Results by target, protocol and sources, sorted."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in sorted(records, key=order):
        key = record["target"], record["config"]["protocol"], *record["sources"]
        found.setdefault(key, []).append(record)
    return list(found.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"
