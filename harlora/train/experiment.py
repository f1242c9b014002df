"""Experiments as data: a TOML file says which runs there are, a plan lists them, each once."""

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin

from harlora.data.catalog import available, dataset, require_apart
from harlora.errors import InputError
from harlora.models.mae import MAEConfig
from harlora.train.finetune import METHODS, FinetuneConfig
from harlora.train.pretrain import PretrainConfig


@dataclass(frozen=True)
class Preset:
    """Sizes and schedules of a whole study."""

    pretrain: PretrainConfig
    finetune: FinetuneConfig


PRESETS = {
    # Both stages on a part of the windows and half the tokens: shows every step within minutes, not the best scores.
    "quick": Preset(
        PretrainConfig(
            model=MAEConfig(patch_size=16),
            epochs=5,
            batch_size=128,
            max_windows=1200,
        ),
        FinetuneConfig(
            epochs=5,
            max_windows=1500,
        ),
    ),
    "standard": Preset(PretrainConfig(), FinetuneConfig()),
}

# What a claim can be about; of `AT_RANK` with a rank, as cut_4, the macro-F1 of an adapter cut or squeezed to it.
MEASURES = (
    "macro_f1", "ece", "aurac", "loss", "early_loss", "drawn_wrong", "intruders", "adapter_file", "saved", "seconds",
)  # fmt: skip
AT_RANK = ("cut", "squeezed")
SHOWN = ("scores", "cost")
_ALSO_SHOWN = ("calibration", "pareto", "advice", "claims")
_ADAPTER = (
    "options", "rank", "alpha", "adapter_dropout", "rslora", "train_norms", "target_modules", "rank_pattern",
    "adapted_blocks", "adapted_blocks_by",
)  # fmt: skip
_RANKED = ("rank", "alpha", "rank_pattern")
_QUANTISED = ("quant_type", "blocksize", "double_quant")
_LABELS = ("label_fraction", "windows_per_class")


@dataclass(frozen=True)
class Adaptation:
    """One run of a plan: a dataset, how it is adapted to, and the pretraining that this begins from."""

    preset: str
    target: str
    sources: tuple[str, ...]
    pretrain: PretrainConfig
    finetune: FinetuneConfig

    @property
    def title(self) -> str:
        """What a reader calls it."""
        config = self.finetune
        return f"{self.target}, {config.protocol}, {config.method}, seed {config.seed}"


@dataclass(frozen=True)
class Claim:
    """That runs with some settings have more, or less, of something than those with others and all else the same.

    says: for a reader. this, that: settings of fine-tuning. more, less: one of `MEASURES`, the other None.
    within: how far ``this`` may be on the wrong side. at: what of ``this`` is measured, if not the same.
    """

    says: str
    this: Mapping[str, Any]
    that: Mapping[str, Any]
    more: str | None = None
    less: str | None = None
    within: float = 0.0
    at: str | None = None

    @property
    def measure(self) -> str:
        """What is compared."""
        return self.more or self.less or ""

    def check(self) -> None:
        """Raise InputError unless its settings and what it measures exist."""
        if (self.more is None) == (self.less is None):
            raise InputError(f"claim {self.says!r}: required one of more and less")
        for name in (self.measure, self.at or self.measure):
            if name.rpartition("_")[0] not in AT_RANK and name not in MEASURES:
                raise InputError(
                    f"claim {self.says!r}: can be about {', '.join(MEASURES)}, and of {' and '.join(AT_RANK)} with a "
                    f"rank, such as cut_4; got {name!r}"
                )
        for settings in (self.this, self.that):
            _changed(FinetuneConfig(), settings)


@dataclass(frozen=True)
class Experiment:
    """Which runs answer one question.

    preset: settings of every run that nothing else sets. targets, sources: names of datasets; empty for all that are
    found. runs: products of settings, one after the other, each setting with its values; a key beginning with
    ``pretrain.`` is one of pretraining, with ``pretrain.model.`` of the model.
    x: the setting that the report draws the scores by, or None for a table. show: what its tables have.
    place: of its section on the page, lower ones first. claims: what the report is to say of them, whether they hold.
    """

    name: str
    title: str
    about: str = ""
    preset: str = "standard"
    targets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    runs: tuple[Mapping[str, tuple[Any, ...]], ...] = field(default_factory=lambda: ({},))
    x: str | None = None
    show: tuple[str, ...] = SHOWN
    place: int = 100
    claims: tuple[Claim, ...] = ()

    def check(self) -> None:
        """Raise InputError unless every setting exists and has a possible value."""
        if self.preset not in PRESETS:
            raise InputError(f"unknown preset {self.preset!r}; required one of {', '.join(PRESETS)}")
        unknown = sorted(set(self.show) - {*SHOWN, *_ALSO_SHOWN})
        if unknown or not self.show:
            raise InputError(
                f"show must be some of {', '.join((*SHOWN, *_ALSO_SHOWN))}; got {', '.join(unknown) or 'none'}"
            )
        if self.x is not None and self.x not in PRESETS[self.preset].finetune.values():
            raise InputError(f"x must be a setting of fine-tuning, got {self.x!r}")
        if any("seed" in grid for grid in self.runs):
            raise InputError("seed is no setting of a run; write seeds = [0, 1, 2] at the top of the file")
        for before, config in self.configurations(0):
            before.check()
            config.check()
        for claim in self.claims:
            claim.check()

    def configurations(self, seed: int) -> Iterator[tuple[PretrainConfig, FinetuneConfig]]:
        """The configuration of every run on one target, each once."""
        base = PRESETS[self.preset]
        seen: list[tuple[PretrainConfig, FinetuneConfig]] = []
        for grid in self.runs:
            for values in itertools.product(*grid.values()):
                settings = dict(zip(grid, values, strict=True))
                model = {key.removeprefix(_MODEL): settings.pop(key) for key in grid if key.startswith(_MODEL)}
                before = {key.removeprefix(_BEFORE): settings.pop(key) for key in settings.copy() if "." in key}
                if "rank" in settings and "alpha" not in settings and not settings.get("rslora"):
                    # The same scaling at every rank, unless it is to follow the rank.
                    settings["alpha"] = base.finetune.alpha / base.finetune.rank * settings["rank"]
                pair = (
                    replace(
                        _changed(base.pretrain, {"seed": seed, **before}), model=_changed(base.pretrain.model, model)
                    ),
                    _plain(_changed(base.finetune, {**settings, "seed": seed}), base.finetune),
                )
                if pair not in seen:
                    seen.append(pair)
                    yield pair

    def plan(self, root: Path) -> list[Adaptation]:
        """Every run, each once; those that begin from the same pretraining follow each other.

        root: the folder with the datasets.
        Raises: InputError as `check`, if a dataset is unknown, two sources are the same people, or none is left.
        """
        self.check()
        found = [entry.name for entry in available(root)]
        sources = [dataset(name, root) for name in self.sources or found]
        together: dict[tuple[str, PretrainConfig], list[Adaptation]] = {}
        for target in [dataset(name, root) for name in self.targets or found]:
            whose = {source.name: source.domain for source in sources if source.domain != target.domain}
            require_apart(whose)
            others = tuple(whose)
            if not others:
                raise InputError(
                    f"leaving out {target.name} leaves no dataset to pretrain on; give at least two datasets of "
                    "different people"
                )
            for seed in self.seeds:
                for before, config in self.configurations(seed):
                    task = Adaptation(self.preset, target.name, others, before, config)
                    together.setdefault((target.name, before), []).append(task)
        return list(itertools.chain.from_iterable(together.values()))

    def count(self) -> int:
        """How many runs there are on each target."""
        return sum(len(list(self.configurations(seed))) for seed in self.seeds)

    def select(self, records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those of a study's results that are runs of this experiment, on whatever data.

        A result says nothing of the data that are found where the report is made, so sources are not compared.
        """

        def key(before: PretrainConfig, config: FinetuneConfig) -> tuple[PretrainConfig | MAEConfig, FinetuneConfig]:
            return before if METHODS[config.method].pretrained else before.model, config

        planned = {seed: list(self.configurations(seed)) for seed in self.seeds}
        chosen = []
        for record in records:
            try:
                config = FinetuneConfig(**record["config"])
                settings = record["pretrained"]["config"]
                pair = key(PretrainConfig(**{**settings, "model": MAEConfig(**settings["model"])}), config)
            except (KeyError, TypeError):  # of another version, with other settings
                continue
            target = record["target"]
            if record["preset"] != self.preset or (self.targets and target not in self.targets):
                continue
            placement = record.get("placement", "")
            plans = planned.get(config.seed, [])
            wanted = [key(before, tuning.for_dataset(target, placement)) for before, tuning in plans]
            if pair in wanted:
                chosen.append(record)
        return chosen


_BEFORE, _MODEL = "pretrain.", "pretrain.model."
_KINDS = {PretrainConfig: "pretraining", FinetuneConfig: "fine-tuning", MAEConfig: "the model"}


def _changed(config: Any, settings: Mapping[str, Any]) -> Any:
    kinds: dict[str, Any] = {entry.name: entry.type for entry in fields(config) if entry.name != "model"}
    checked = {}
    for key, value in settings.items():
        if key not in kinds:
            kind = _KINDS[type(config)]
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else f"required one of {', '.join(kinds)}"
            raise InputError(f"{key!r} is no setting of {kind}; {hint}")
        expected = kinds[key]
        for number in (float, int):
            expected = number if expected == number | None else expected
        checked[key] = float(value) if expected is float and type(value) is int else value
        if expected in (int, float, bool, str) and type(checked[key]) is not expected:
            raise InputError(f"{key} must be of type {expected.__name__}, got {value!r}")
        if get_origin(expected) is tuple and not isinstance(value, list | tuple):
            raise InputError(
                f'{key} must be a list of values, got {value!r}; in a file a list within a list, [["…", "…"]], since '
                "a list alone is several runs"
            )
    return replace(config, **checked)


def _plain(config: FinetuneConfig, base: FinetuneConfig) -> FinetuneConfig:
    """``config`` with the preset's values where its method does not look, so that equal runs are one run."""
    if config.method not in METHODS:
        return config  # `check` says so
    method = METHODS[config.method]
    unused: tuple[str, ...] = () if method.adapter else _ADAPTER
    unused += () if method.ranked else _RANKED
    unused += () if method.four_bits else _QUANTISED
    unused += () if method.on_target else _LABELS
    unused += () if method.encoder == "last blocks" else ("blocks",)
    return replace(config, **{name: getattr(base, name) for name in unused})


_KEYS = ("title", "about", "preset", "targets", "sources", "seeds", "x", "show", "place", "set", "runs", "claims")


def load_experiment(file: Path) -> Experiment:
    """The experiment in a TOML file.

    Keys: those of `Experiment`; ``set``, a table of settings for all runs; ``runs``, an array of tables, each a product
    of settings with one value or a list of them; ``claims``, an array of tables with the keys of `Claim`. Settings of
    pretraining are in a table ``pretrain`` within the first two, the model's in ``pretrain.model``.
    Raises: InputError that names the file and the key if it is not such a file.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file; give a TOML file such as those in experiments/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file}: not a TOML file ({error}); correct it") from error
    for key in content:
        if key not in _KEYS:
            raise InputError(f"{file}: unknown key {key!r}; required some of {', '.join(_KEYS)}")
    if not isinstance(content.get("title"), str):
        raise InputError(f"{file}: title must be a line of text, got {content.get('title')!r}")
    common = _grid(file, "set", content.pop("set", {}))
    grids = content.pop("runs", [{}])
    if not isinstance(grids, list):
        raise InputError(f"{file}: runs must be an array of tables, [[runs]], got {grids!r}")
    for key, kind, what in (
        ("targets", str, "names"), ("sources", str, "names"), ("show", str, "names"), ("seeds", int, "whole numbers"),
    ):  # fmt: skip
        if key in content:
            given = content[key]
            if not isinstance(given, list) or not given or not all(type(value) is kind for value in given):
                raise InputError(f"{file}: {key} must be a list of {what}, got {given!r}")
            content[key] = tuple(given)
    for key in ("about", "preset", "x"):
        if not isinstance(content.get(key, ""), str):
            raise InputError(f"{file}: {key} must be text, got {content[key]!r}")
    if type(content.get("place", 0)) is not int:
        raise InputError(f"{file}: place must be a whole number, got {content['place']!r}")
    if "about" in content:
        content["about"] = content["about"].strip()
    runs = tuple({**common, **_grid(file, "runs", grid)} for grid in grids)
    given = content.pop("claims", [])
    if not isinstance(given, list) or not all(isinstance(claim, dict) for claim in given):
        raise InputError(f"{file}: claims must be an array of tables, [[claims]], got {given!r}")
    try:
        experiment = Experiment(name=file.stem, **content, runs=runs, claims=tuple(Claim(**claim) for claim in given))
        experiment.check()
    except (InputError, TypeError) as error:
        raise InputError(f"{file}: {error}") from error
    return experiment


def _grid(file: Path, key: str, table: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(table, dict):
        raise InputError(f"{file}: {key} must be a table of settings, got {table!r}")
    settings = {name: value for name, value in table.items() if name != "pretrain"}
    before = table.get("pretrain", {})
    model = before.get("model", {}) if isinstance(before, dict) else {}
    for name, part in (("pretrain", before), ("pretrain.model", model)):
        if not isinstance(part, dict):
            raise InputError(f"{file}: {name} must be a table of settings, got {part!r}")
        settings |= {f"{name}.{each}": value for each, value in part.items() if each != "model"}
    # A list is several values; a setting that is itself a list is written as a list in a list.
    return {name: tuple(value) if isinstance(value, list) else (value,) for name, value in settings.items()}
