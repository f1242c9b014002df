"""The table of a study's results, for the terminal and for Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from harlora.train.finetune import METHODS

Record = dict[str, Any]

TITLES = {
    "zero_shot": "zero-shot",
    "linear_probe": "linear probe",
    "scratch": "from scratch",
    "full": "full",
    "lora": "LoRA",
    "qlora": "QLoRA",
}
COLUMNS = (
    "method", "accuracy", "macro-F1", "precision", "recall", "trainable", "frozen", "trained", "optimiser", "held",
    "step peak", "seconds",
)  # fmt: skip
PROTOCOL_TITLES = {
    "subject": "new people (subject split)",
    "paper": "random windows (the paper's split)",
}


def method_title(record: Record) -> str:
    """The method as a reader knows it, with its rank if it has one."""
    config = record["config"]
    title = TITLES[config["method"]]
    return f"{title} r={config['rank']}" if METHODS[config["method"]].adapter else title


def held(record: Record) -> int:
    """Bytes held through training: frozen and trained parameters, gradients and optimiser state."""
    return sum(record["bytes"][key] for key in ("frozen", "trainable", "gradients", "optimizer"))


def megabytes(count: int) -> str:
    """Millions of bytes, two decimals."""
    return f"{count / 1e6:.2f}"


def row(record: Record) -> list[str]:
    """One line of the table, in the order of `COLUMNS`."""
    score, size = record["scores"], record["bytes"]
    return [
        method_title(record),
        *(f"{score[key]:.3f}" for key in ("accuracy", "macro_f1", "precision", "recall")),
        f"{record['parameters']['trainable']:,}",
        *(megabytes(size[key]) for key in ("frozen", "trainable", "optimizer")),
        megabytes(held(record)),
        megabytes(size["step_peak"]),
        f"{record['seconds']:.0f}",
    ]


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
    """Results by target and protocol, sorted."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=order):
        found.setdefault((record["target"], record["config"]["protocol"]), []).append(record)
    return list(found.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"
