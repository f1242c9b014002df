"""Adapting a pretrained encoder to one dataset, by one of several methods, and scoring it on what it has not seen."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora.data.augment import half_turns, rescale, rotate, small_rotations, warp_time
from harlora.data.catalog import in_a_pocket, people
from harlora.data.labels import VOCABULARY
from harlora.data.splits import PROTOCOLS, Split, fewer_labels, split
from harlora.data.windows import Normalizer, Windows
from harlora.errors import InputError
from harlora.files import load_tensors, save_tensors
from harlora.kernels.format import BLOCKSIZES, QUANT_TYPES
from harlora.models.mae import MAE, Classifier, Encoder, MAEConfig
from harlora.nn import (
    AdaptedLinear,
    QLoRALinear,
    adapted_layers,
    adapter_options,
    apply_adapter,
    apply_lora,
    apply_qlora,
    at_rank,
    gather_statistics,
    save_adapter,
)
from harlora.nn.adapter_files import WEIGHTS_FILE
from harlora.nn.adapters import ADAPTERS, LoRA
from harlora.nn.adapters.choose import changes
from harlora.nn.adapters.matryoshka import aurac
from harlora.nn.adapters.post import intruders
from harlora.nn.apply import matched, penalty, read_options, schedule
from harlora.train.capture import Capture, TrainingStep, captures
from harlora.train.federated import RIDGE, SERVERS, federate
from harlora.train.fit import Optimisation, Report, fit, make_optimizer, silent
from harlora.train.memory import held_bytes, matrix_bytes, step_bytes
from harlora.train.metrics import calibration, confusion, macro_f1, scores
from harlora.train.pretrain import Pretrained, thinned
from harlora.train.processes import Processes
from harlora.train.runs import Run, identify, open_run, provenance
from harlora.train.sampler import SAMPLERS, QualitySampler, Sampler, squared_gradient, standardised

CHECKPOINT = "classifier.safetensors"
# In a pocket a phone tilts and may be upside down; on a belt it hardly moves, and sitting is told from standing by its
# tilt. Where the same recordings are trained on and tested, every way it is carried and all paces have been seen.
_MOVED: Mapping[str, float] = {"warp": 0.85, "rescaled": 0.05}
_IN_A_POCKET: Mapping[str, float] = {"turned_deg": 15.0, "flipped": 0.3, **_MOVED}
_WORN_FIRMLY: Mapping[str, float] = {"turned_deg": 5.0, "flipped": 0.0, **_MOVED}
_AS_THEY_ARE: Mapping[str, float] = {"turned_deg": 0.0, "flipped": 0.0, "warp": 1.0, "rescaled": 0.0}
# On random windows of the same people more epochs help more than more patches; on new people they do not.
_SHORT: Mapping[str, Any] = {"epochs": 20, "dropped": 0.5}
_LONG: Mapping[str, Any] = {"epochs": 50, "dropped": 0.75}
SETTINGS = ("rank", "alpha", "rslora")  # options of many methods, which FinetuneConfig has by themselves
_GRADIENT_BATCHES = 8  # that methods which start from gradients see
_CAN_BE_CUT = ("lora", "matryoshka", "dylora")
TARGET_MODULES = ("q", "k", "v", "o", "fc1", "fc2")


@dataclass(frozen=True)
class Method:
    """What trains, and from what.

    title: what a reader knows it as. learning_rate: that the method is used with unless another is given.
    encoder: which of its own weights train. adapter: a method in `harlora.nn.adapters.ADAPTERS`, or None.
    four_bits: the adapted weights are in 4 bits. pretrained: or else random weights.
    on_target: trained on labels of the target; or else on those of the sources.
    """

    title: str
    learning_rate: float
    encoder: Literal["none", "biases", "last blocks", "all"] = "none"
    adapter: str | None = None
    four_bits: bool = False
    pretrained: bool = True
    on_target: bool = True

    @property
    def learns(self) -> bool:
        """Whether anything of the encoder trains, or beside its weights."""
        return self.encoder != "none" or self.adapter is not None

    @property
    def ranked(self) -> bool:
        """Whether its adapters have a rank."""
        return self.adapter is not None and "rank" in adapter_options(self.adapter)

    @property
    def about(self) -> str:
        """What its adapters are, and what its options mean."""
        return " ".join((ADAPTERS[self.adapter].__doc__ or "").split()) if self.adapter else ""

    @property
    def options(self) -> dict[str, Any]:
        """The names of its adapters' options, other than `SETTINGS`, with their defaults."""
        options = adapter_options(self.adapter) if self.adapter else {}
        return {name: default for name, default in options.items() if name not in SETTINGS}


# The best of those tried (docs/architecture.md, Training); others as LoRA.
_RATES = {"adalora": 4e-3, "ia3": 1e-2, "lora_xs": 5e-3, "lora_sb": 1e-2, "uni_lora": 1e-2}


def _adapter_methods() -> Iterator[tuple[str, Method]]:
    for name, kind in ADAPTERS.items():
        rate = _RATES.get(name, 2e-3)
        yield name, Method(kind.title, rate, adapter=name)
        yield f"q{name}", Method(f"Q{kind.title}", rate, adapter=name, four_bits=True)


METHODS: Mapping[str, Method] = {
    "zero_shot": Method("zero-shot", 2e-3, on_target=False),
    "linear_probe": Method("linear probe", 2e-3),
    "scratch": Method("from scratch", 1e-3, encoder="all", pretrained=False),
    "bitfit": Method("BitFit", 2e-3, encoder="biases"),
    "partial": Method("last blocks", 1e-3, encoder="last blocks"),
    "full": Method("full", 1e-3, encoder="all"),
    **dict(_adapter_methods()),  # LoRA and QLoRA first
}


@dataclass(frozen=True)
class FinetuneConfig:
    """How the encoder is adapted."""

    method: str = "qlora"
    """zero_shot, linear_probe, scratch, bitfit, partial, full, lora, qlora or another method of adapters. All
    have the same head; linear_probe and zero_shot train nothing else, bitfit the encoder's biases, partial its last
    blocks."""
    protocol: str = "subject"
    """subject: nobody is on both sides of the split; paper: windows at random."""
    rank: int = 8
    """Of the adapters of methods that have one."""
    options: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    """Of the method, beside rank, alpha and rslora, as `choose gradient`; listed above."""
    target_modules: tuple[str, ...] = TARGET_MODULES
    """The layers of every block that carry adapters."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some layers, for example `fc1 16 blocks.5.attention.q 4`; alpha follows, the scaling stays."""
    alpha: float = 16.0
    """The low-rank branch is scaled by alpha / rank."""
    adapter_dropout: float = 0.0
    """On the input of the low-rank branch."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    blocks: int = 2
    """How many of the last blocks partial trains."""
    train_norms: bool = True
    """Let LayerNorms, biases and the patch embedding train beside the adapters."""
    quant_type: str = "nf4"
    """nf4 or fp4, of weights in 4 bits, which methods have whose name begins with q."""
    blocksize: int = 64
    """Weights that share a scale in 4 bits: 32, 64, 128, ... 4096."""
    double_quant: bool = True
    """Store their scales in 8 bits."""
    epochs: int | None = None
    """Passes over the training windows; by default 20, or the paper's 50 with protocol paper unless the encoder is
    frozen."""
    batch_size: int = 128
    """Windows a step."""
    learning_rate: float = 0.0
    """The highest of the one-cycle schedule; 0 takes the method's own."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms have none."""
    averaged: int = 5
    """With ``validated``, an epoch is judged, once there are so many, by the mean macro-F1 of so many up to it."""
    patience: int = 10
    """With ``validated``, stop after so many epochs without a better mean."""
    label_smoothing: float = 0.1
    """Of the cross-entropy."""
    turned_deg: float | None = None
    """Training windows are turned about a random axis by about so many degrees; by default 15 for a dataset whose
    people carried the device in a pocket, otherwise 5, with protocol paper 0."""
    flipped: float | None = None
    """Share of training windows turned half about one of the device's axes, as a phone put in upside down; by default
    0.3 for a dataset whose people carried the device in a pocket, otherwise, and with protocol paper, 0."""
    warp: float | None = None
    """A random part of each training window, at least this share of it, is stretched to the whole; by default 0.85,
    with protocol paper 1."""
    rescaled: float | None = None
    """Standard deviation of a random factor on each sensor of a training window; by default 0.05, with protocol paper
    0."""
    dropped: float | None = None
    """Share of each training window's patches that is left out, drawn anew every time; all of them are scored. By
    default 0.5, or 0.75 with protocol paper, whose 50 epochs then take no longer. A frozen encoder, which could not
    learn to do with fewer, always gets all."""
    validated: bool = False
    """Hold 12 % back and keep the epoch that is best on them; else they train too, and the last epoch is kept."""
    label_fraction: float = 1.0
    """Share of the training windows that is used."""
    windows_per_class: int = 0
    """Use so many training windows of each class instead; 0 is off."""
    adapted_blocks: int = 0
    """Adapters in so many blocks alone; 0 is all."""
    adapted_blocks_by: Literal["change", "chance"] = "change"
    """Which they are: those that change what goes in the most (1 - CKA) on some training windows, without their labels;
    or any, to compare with."""
    by_rank: bool = False
    """Score the trained adapter at lower ranks too, cut and squeezed. For lora, matryoshka, dylora and theirs in 4
    bits."""
    sampled: float | None = None
    """Share of the training windows that an epoch takes, drawn anew each time; by default all, or half where they are
    drawn by what they teach."""
    sampler: Literal["uniform", "quality", "auto"] = "auto"
    """How they are drawn: any as likely as any other, or those rather that teach the most; auto is quality with
    tsqlora and qtsqlora, otherwise uniform."""
    quality: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """What counts as teaching: the weights of the gradient's norm, of the loss that fell and of the confidence that
    rose, and the temperature."""
    federated: Literal["no", "average", "fair"] = "no"
    """Each person of the training part is a client that trains on its own windows, a pass over them a round, a round
    an epoch; the server averages what they trained, or corrects the averages of adapters' factors so that their
    product is near that of the clients (fair: LoRA-FAIR). For lora and qlora."""
    mislabelled: float = 0.0
    """Share of the training windows that are given a wrong label, to see what a method makes of it."""
    max_windows: int = 0
    """At most so many windows of a dataset, drawn at random; 0 takes all."""
    test_people: tuple[str, ...] = ()
    """With protocol subject: who is tested, instead of the 30 % of the people that the seed draws."""
    seed: int = 0
    """Of the split and of everything random."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "quality", "test_people"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and TOML have lists
        method = METHODS.get(self.method)
        if method and method.adapter and self.options:
            with suppress(ValueError):  # `check` says so
                object.__setattr__(self, "options", read_options(method.adapter, self.options))

    def values(self) -> dict[str, Any]:
        """The settings as JSON values.

        Those that came later are left out where they have their default, so that runs keep their identity.
        """
        values = json.loads(json.dumps(asdict(self)))
        later = {name: values[name] for name in _LATER if getattr(self, name) == getattr(_DEFAULTS, name)}
        return {name: value for name, value in values.items() if name not in later}

    def takes_by_quality(self) -> bool:
        """Whether windows are drawn by what they teach."""
        return self.sampler == "quality" or (self.sampler == "auto" and METHODS[self.method].adapter == "tsqlora")

    def for_dataset(self, name: str, placement: str = "") -> "FinetuneConfig":
        """The settings with those filled in whose default depends on the dataset, the protocol or the method.

        placement: of a dataset that is not in the catalogue, as `Windows.placement`.
        """
        method = METHODS[self.method]
        schedule = _LONG if self.protocol == "paper" and method.learns else _SHORT
        usual = {**(_IN_A_POCKET if in_a_pocket(name, placement) else _WORN_FIRMLY), **schedule}
        if self.protocol == "paper":
            usual |= _AS_THEY_ARE
        filled = {key: value for key, value in usual.items() if getattr(self, key) is None}
        if self.takes_by_quality():
            filled |= {"sampler": "quality", "sampled": self.sampled or 0.5}
        return replace(self, **filled)

    def check(self) -> None:
        """Raise InputError unless every setting has a possible value."""
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; required one of {', '.join(METHODS)}")
        if self.protocol not in PROTOCOLS:
            raise InputError(f"unknown protocol {self.protocol!r}; required one of {', '.join(PROTOCOLS)}")
        for name in ("rank", "blocks", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2, which the head's BatchNorm needs, got {self.batch_size}")
        if not self.alpha > 0:
            raise InputError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.adapter_dropout < 1:
            raise InputError(f"adapter_dropout must be at least 0 and below 1, got {self.adapter_dropout}")
        if not 0 <= self.label_smoothing <= 1:
            raise InputError(f"label_smoothing must be from 0 to 1, got {self.label_smoothing}")
        if not 0 < self.label_fraction <= 1:
            raise InputError(f"label_fraction must be above 0 and at most 1, got {self.label_fraction}")
        self._check_options(METHODS[self.method].adapter)
        for name, rank in self.rank_pattern.items():
            if rank < 1:
                raise InputError(f"rank_pattern: {name} must be at least 1, got {rank}")
        unknown = sorted(set(self.target_modules) - set(TARGET_MODULES))
        if unknown or not self.target_modules:
            raise InputError(
                f"target_modules must be some of {', '.join(TARGET_MODULES)}, got {', '.join(unknown) or 'none'}"
            )
        if not 0 <= (self.dropped or 0) < 1:
            raise InputError(f"dropped must be at least 0 and below 1, got {self.dropped}")
        if not 0 <= (self.flipped or 0) <= 1:
            raise InputError(f"flipped must be from 0 to 1, got {self.flipped}")
        if self.warp is not None and not 0 < self.warp <= 1:
            raise InputError(f"warp must be above 0 and at most 1, got {self.warp}")
        if self.adapted_blocks_by not in ("change", "chance"):
            raise InputError(f"adapted_blocks_by must be change or chance, got {self.adapted_blocks_by!r}")
        if self.by_rank and METHODS[self.method].adapter not in _CAN_BE_CUT:
            raise InputError(f"by_rank is for {', '.join(_CAN_BE_CUT)} and theirs in 4 bits, got {self.method}")
        if self.sampled is not None and not 0 < self.sampled <= 1:
            raise InputError(f"sampled must be above 0 and at most 1, got {self.sampled}")
        if self.sampler not in ("auto", *SAMPLERS):
            raise InputError(f"sampler must be one of auto, {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if len(self.quality) != 4 or not self.quality[3] > 0:
            raise InputError(f"quality must be three weights and a temperature above 0, got {self.quality}")
        if self.federated not in ("no", *SERVERS):
            raise InputError(f"federated must be one of no, {', '.join(SERVERS)}, got {self.federated!r}")
        beside = self.validated or self.sampled is not None or self.takes_by_quality() or self.options
        if self.federated != "no" and (METHODS[self.method].adapter != "lora" or beside):
            raise InputError(
                "federated is for lora and qlora without options, validated, sampled and sampler, got "
                f"{self.method}; leave it out"
            )
        if not 0 <= self.mislabelled < 1:
            raise InputError(f"mislabelled must be at least 0 and below 1, got {self.mislabelled}")
        for name in (
            "turned_deg", "rescaled", "learning_rate", "weight_decay", "adapted_blocks",
            "windows_per_class", "max_windows", "seed",
        ):  # fmt: skip
            if not (getattr(self, name) or 0) >= 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        self.optimisation()
        if self.quant_type not in QUANT_TYPES or self.blocksize not in BLOCKSIZES:
            raise InputError(
                f"quant_type must be one of {QUANT_TYPES} and blocksize one of {BLOCKSIZES}, "
                f"got {self.quant_type!r} and {self.blocksize}"
            )

    def _check_options(self, adapter: str | None) -> None:
        beside = sorted(set(SETTINGS) & self.options.keys())
        if beside:
            raise InputError(f"options: {', '.join(beside)} must be set as settings of their own")
        if self.options and adapter is None:
            raise InputError(f"options: {self.method} has none, got {', '.join(self.options)}")
        if adapter is not None:
            try:
                read_options(adapter, self.options)
            except ValueError as error:
                raise InputError(f"options: {error}") from error

    def optimisation(self) -> Optimisation:
        """The training schedule.

        Raises: InputError if a value is not positive.
        """
        rate = self.learning_rate or METHODS[self.method].learning_rate
        epochs = self.for_dataset("").epochs
        assert epochs is not None
        return Optimisation(
            epochs, self.batch_size, rate, self.weight_decay, averaged=self.averaged, patience=self.patience
        )


_DEFAULTS = FinetuneConfig()
_LATER = (
    "options", "adapted_blocks", "adapted_blocks_by", "by_rank", "sampled", "sampler", "quality", "federated",
    "mislabelled", "test_people",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Samples:
    """Windows of one or several datasets with classes counted from 0, and which of them train and validate.

    origin: ``(n,)``, the dataset of each window; mean, std: ``(datasets, 1, channels)``, of each dataset.
    wrong: the windows that were given a wrong label, or None. people: ``(n,)``, whose each is, or None.
    """

    signals: Tensor
    classes: Tensor
    train: Tensor
    validation: Tensor
    origin: Tensor
    mean: Tensor
    std: Tensor
    wrong: Tensor | None = None
    people: Tensor | None = None

    def normalised(self, signals: Tensor, indices: Tensor) -> Tensor:
        """``signals``, changed or not, of the windows at ``indices``."""
        origin = self.origin[indices]
        return (signals - self.mean[origin]) / self.std[origin]


def _statistics(normalizers: Sequence[Normalizer]) -> tuple[Tensor, Tensor]:
    mean = torch.tensor([normalizer.mean for normalizer in normalizers])
    return mean[:, None], torch.tensor([normalizer.std for normalizer in normalizers])[:, None]


class Preview:
    """Some training windows, for what looks at them before training starts."""

    def __init__(self, samples: _Samples, config: FinetuneConfig) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(samples.train), generator=generator)[: _GRADIENT_BATCHES * config.batch_size]
        self._samples, self._config, self._chosen = samples, config, samples.train[order]

    def windows(self) -> Tensor:
        """Normalised, ``(n, window, channels)``, as many as a batch."""
        chosen = self._chosen[: self._config.batch_size]
        return self._samples.normalised(self._samples.signals[chosen], chosen)

    def losses(self, model: Classifier) -> Iterator[Tensor]:
        """Of the batches, one after the other."""
        model.eval()  # its head's BatchNorm must not learn from these
        for indices in self._chosen.split(self._config.batch_size):
            x = self._samples.normalised(self._samples.signals[indices], indices)
            truth = self._samples.classes[indices]
            logits = model(x)
            each = F.cross_entropy(logits, truth, label_smoothing=self._config.label_smoothing, reduction="none")
            if self._config.takes_by_quality():  # of Q there is the gradient's term before training
                weight, *_, temperature = self._config.quality
                yield each @ (weight * standardised(squared_gradient(logits, truth)) / temperature).softmax(dim=0)
            else:
                yield each.mean()
        model.train()


def build_classifier(
    config: FinetuneConfig,
    encoder: Encoder,
    classes: int,
    *,
    seen: Preview | None = None,
    paths: Sequence[str] | None = None,
) -> Classifier:
    """A copy of the encoder with a new head, and what the method adapts set to train.

    seen: windows for methods and settings that look at some before they start.
    paths: of the encoder's layers that carry adapters, of a classifier whose state is to be loaded, which chose them
        when it was new; what its adapters train is left as it is made.
    """
    method = METHODS[config.method]
    torch.manual_seed(config.seed)
    encoder = copy.deepcopy(encoder) if method.pretrained else MAE(encoder.config).encoder
    model = Classifier(encoder, classes)
    if method.encoder == "all":
        return model
    model.encoder.requires_grad_(False)
    if method.encoder == "biases":
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif method.encoder == "last blocks":
        for module in (*model.encoder.blocks[-config.blocks :], model.encoder.norm):
            module.requires_grad_(True)
    if method.adapter:
        _adapt(config, method, model, seen, paths)
    if method.adapter and config.train_norms:
        for name, parameter in model.encoder.named_parameters():
            if name.endswith("bias") or "norm" in name or name.startswith("patch_embed"):
                parameter.requires_grad_(True)
    return model


def _adapt(
    config: FinetuneConfig,
    method: Method,
    model: Classifier,
    seen: Preview | None,
    paths: Sequence[str] | None,
) -> None:
    assert method.adapter is not None
    start = paths is None
    targets: Sequence[str] = config.target_modules if paths is None else paths
    if start and config.adapted_blocks:
        targets = _in_some_blocks(config, model.encoder, seen)
    adapted = [path for path, _ in model.encoder.named_modules() if {path, path.rsplit(".", 1)[-1]} & set(targets)]
    for key in config.rank_pattern:
        if not any(matched({key: True}, path, False) for path in adapted):
            raise InputError(f"rank_pattern: {key!r} is no layer with an adapter; they are {', '.join(adapted)}")
    settings: dict[str, Any] = {"dropout": config.adapter_dropout, "rank_pattern": config.rank_pattern}
    four_bits: dict[str, Any] = {
        "quant_type": config.quant_type, "blocksize": config.blocksize, "double_quant": config.double_quant
    }  # fmt: skip
    grows = 0.5 if config.rslora else 1.0  # so that the scaling stays
    settings["alpha_pattern"] = {
        key: config.alpha * (rank / config.rank) ** grows for key, rank in config.rank_pattern.items()
    }
    if method.adapter == LoRA.name and not config.options:  # written as PEFT does
        settings |= {"rank": config.rank, "alpha": config.alpha, "rslora": config.rslora}
        if method.four_bits:
            apply_qlora(model.encoder, targets, **settings, **four_bits)
        else:
            apply_lora(model.encoder, targets, **settings)
        return
    kind = ADAPTERS[method.adapter]
    options = {name: getattr(config, name) for name in SETTINGS if name in adapter_options(method.adapter)}
    options |= config.options
    statistics = None
    if start and kind.needs_statistics(**options):
        if seen is None:
            raise InputError(f"{config.method} starts from gradients on labelled windows; finetune has them")
        statistics = gather_statistics(model.encoder, targets, seen.losses(model))
    try:
        apply_adapter(
            model.encoder,
            method.adapter,
            targets,
            quantize=method.four_bits,
            statistics=statistics,
            start=start,
            **settings,
            **four_bits,
            **options,
        )
    except ValueError as error:
        raise InputError(f"{config.method}: {error}") from error


def _in_some_blocks(config: FinetuneConfig, encoder: Encoder, seen: Preview | None) -> list[str]:
    """The paths of the target layers in the blocks that are adapted."""
    if config.adapted_blocks_by == "chance":
        order = torch.randperm(len(encoder.blocks), generator=torch.Generator().manual_seed(config.seed)).tolist()
    elif seen is None:
        raise InputError("adapted_blocks chooses by windows of the target; finetune has them")
    else:
        found = changes(list(encoder.blocks), lambda: encoder(seen.windows()))
        order = sorted(range(len(found)), key=lambda index: -found[index])
    chosen = {f"blocks.{index}." for index in order[: config.adapted_blocks]}
    return [
        path
        for path, _ in encoder.named_modules()
        if path.rpartition(".")[2] in config.target_modules and any(path.startswith(start) for start in chosen)
    ]


def _target_samples(
    config: FinetuneConfig, target: Windows, parts: Split, labels: tuple[str, ...], normalizer: Normalizer
) -> _Samples:
    index = {VOCABULARY.index(name): position for position, name in enumerate(labels)}
    per_class = config.windows_per_class or None
    train = fewer_labels(target, parts.train, fraction=config.label_fraction, per_class=per_class, seed=config.seed)
    classes = torch.tensor([index[int(label)] for label in target.labels])
    wrong = None
    if config.mislabelled:
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(train), generator=generator)[: round(config.mislabelled * len(train))]
        wrong = torch.from_numpy(train)[order]
        others = torch.randint(1, len(labels), (len(wrong),), generator=generator)
        classes[wrong] = (classes[wrong] + others) % len(labels)
    return _Samples(
        torch.from_numpy(target.signals),
        classes,
        torch.from_numpy(train),
        torch.from_numpy(parts.validation),
        torch.zeros(len(target), dtype=torch.int64),
        *_statistics([normalizer]),
        wrong,
        torch.from_numpy(target.subjects.astype(np.int64)),
    )


def _source_samples(sources: Sequence[Windows], labels: tuple[str, ...], config: FinetuneConfig) -> _Samples:
    """The windows of the sources whose label the target has too; with ``validated`` 12 % of the subjects validate."""
    index = {VOCABULARY.index(name): position for position, name in enumerate(labels)}
    signals, classes, train, validation, origin, offset = [], [], [], [], [], 0
    normalizers: list[Normalizer] = []
    for source in sources:
        kept = source.take(np.flatnonzero(np.isin(source.labels, list(index))))
        if not len(kept):
            continue
        held_back = split(kept, "subject", config.seed).validation if config.validated else np.array([], dtype=np.int64)
        signals.append(torch.from_numpy(kept.signals))
        classes.append(torch.tensor([index[int(label)] for label in kept.labels]))
        train.append(torch.from_numpy(np.setdiff1d(np.arange(len(kept)), held_back)) + offset)
        validation.append(torch.from_numpy(held_back) + offset)
        origin.append(torch.full((len(kept),), len(normalizers)))
        normalizers.append(Normalizer.fit(source.signals))
        offset += len(kept)
    if not signals:
        raise InputError(f"zero_shot: no source has windows of any of the target's labels {', '.join(labels)}")
    return _Samples(
        torch.cat(signals),
        torch.cat(classes),
        torch.cat(train),
        torch.cat(validation),
        torch.cat(origin),
        *_statistics(normalizers),
    )


@torch.no_grad()
def in_batches(function: Callable[..., Tensor], *inputs: Tensor, device: torch.device) -> Tensor:
    """``function`` of all rows of the inputs, 512 at a time on ``device``; on the CPU."""
    parts = zip(*(x.split(512) for x in inputs), strict=True)
    return torch.cat([function(*(x.to(device) for x in part)).cpu() for part in parts])


def finetune(
    config: FinetuneConfig,
    target: Windows,
    pretrained: Pretrained,
    out: Path,
    *,
    sources: Sequence[Windows] = (),
    device: torch.device,
    capture: Capture = "off",
    report: Report = silent,
) -> dict[str, Any]:
    """Adapt ``pretrained`` to ``target`` and return the scores on its test part with what it cost.

    A finished run under ``out`` is not repeated. The target is normalised with statistics of its training part, of
    which ``zero_shot`` sees nothing else; the epoch is chosen on the validation part. The run's folder keeps the
    classifier, the metrics and, for LoRA and QLoRA, the adapter in PEFT's format.

    sources: for ``zero_shot``, which learns from their labels alone.
    capture: as in `pretrain`.
    Raises: InputError if the encoder has seen the target's people, a file of the run is damaged, or ``capture`` is not
    possible.
    """
    config.check()
    config = config.for_dataset(target.dataset, target.placement)
    captured = captures(capture, device)
    adapter = METHODS[config.method].adapter
    if captured and (
        config.federated != "no" or config.takes_by_quality() or (adapter and not ADAPTERS[adapter].capturable)
    ):
        if capture == "on":
            raise InputError(f"capture: a step of {config.method} cannot be a CUDA graph; use auto or off")
        captured = False
    if Processes(device).count > 1:
        raise InputError(
            "torchrun: one adaptation is of one process, since its head's BatchNorm must see the whole batch; "
            "pretrain so, or carry out several adaptations at a time by `harlora run --on cores`"
        )
    for source in pretrained.sources:
        if pretrained.domain(source) == people(target):
            raise InputError(
                f"the encoder was pretrained on {source}, which has the people of {target.dataset}; required one "
                "pretrained on the other datasets"
            )
    if config.method == "zero_shot" and not sources:
        raise InputError("zero_shot learns from labels of the source datasets; give at least one")
    target = thinned(target, config.max_windows, config.seed)
    used = [thinned(source, config.max_windows, config.seed) for source in _used(config, sources)]
    signature = _signature(config, target, used, pretrained.identity, pretrained.encoder.config, device)
    with open_run(out, f"{config.method}-{target.dataset}-{config.protocol}", signature) as run:
        finished = run.metrics()
        return finished or _finetune(config, target, used, pretrained, run, device, captured, report)


def adaptation_identity(
    config: FinetuneConfig,
    target: Windows,
    sources: Sequence[Windows],
    pretraining: str,
    model: MAEConfig,
    device: torch.device,
) -> str:
    """The identity of the run that `finetune` makes or finds with these arguments.

    pretraining: the identity of the encoder that it begins from, whose sizes are ``model``.
    """
    config = config.for_dataset(target.dataset, target.placement)
    target = thinned(target, config.max_windows, config.seed)
    used = [thinned(source, config.max_windows, config.seed) for source in _used(config, sources)]
    return identify(_signature(config, target, used, pretraining, model, device))


def _used(config: FinetuneConfig, sources: Sequence[Windows]) -> Sequence[Windows]:
    return () if METHODS[config.method].on_target else sources


def _signature(
    config: FinetuneConfig,
    target: Windows,
    used: Sequence[Windows],
    pretraining: str,
    model: MAEConfig,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "kind": "finetune",
        "config": config.values(),
        "target": {target.dataset: target.fingerprint()},
        "sources": {source.dataset: source.fingerprint() for source in used},
        "pretrained": pretraining if METHODS[config.method].pretrained else None,
        "model": asdict(model),
        "device": device.type,
    }


def _finetune(
    config: FinetuneConfig,
    target: Windows,
    used: Sequence[Windows],
    pretrained: Pretrained,
    run: Run,
    device: torch.device,
    captured: bool,
    report: Report,
) -> dict[str, Any]:
    parts = split(target, config.protocol, config.seed, config.test_people)
    if not config.validated:
        parts = Split(np.sort(np.concatenate([parts.train, parts.validation])), parts.validation[:0], parts.test)
    labels = target.label_names()
    normalizer = Normalizer.fit(target.signals[parts.train])
    if config.method == "zero_shot":
        samples = _source_samples(used, labels, config)
    else:
        samples = _target_samples(config, target, parts, labels, normalizer)
    model = build_classifier(config, pretrained.encoder, len(labels), seen=Preview(samples, config)).to(device)
    trained = _train(config, model, samples, run.identity, run.state_file, device, captured, report)

    test = normalizer(target.signals[parts.test])
    truth = np.searchsorted([VOCABULARY.index(name) for name in labels], target.labels[parts.test])
    logits = in_batches(model, torch.from_numpy(test), device=device)
    predicted = logits.argmax(dim=1).numpy()
    lower = _at_lower_ranks(config, model, lambda: in_batches(model, torch.from_numpy(test), device=device), truth)
    people = target.subjects[parts.test]
    method = METHODS[config.method]
    paths = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in TARGET_MODULES]
    held, dense = matrix_bytes(model, paths)
    metrics = {
        "scores": scores(truth, predicted, labels),
        "calibration": calibration(logits.double().softmax(dim=1).numpy(), truth),
        **lower,
        # Of each person alone, so that methods can be compared person by person.
        "confusion_by_subject": {
            target.subject_names[who]: confusion(truth[people == who], predicted[people == who], len(labels))
            for who in np.unique(people)
        },
        "parameters": {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            # Of the 4-bit weights every code counts, not every byte.
            "total": sum(p.numel() for p in model.parameters())
            + sum(
                layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, QLoRALinear)
            ),
        },
        "bytes": {**trained.bytes, "matrices": held, "matrices_float32": dense},
        **_intruders(config, model, pretrained.encoder, paths),
        "seconds": trained.seconds,
        "windows": {
            "train": len(samples.train), "validation": len(samples.validation), "test": len(parts.test),
        },
        "test_subjects": [target.subject_names[i] for i in np.unique(people)],
        "best_epoch": trained.best_epoch,
        "history": trained.history,
        "config": config.values(),
        "learning_rate": trained.learning_rate,
        "captured": captured,
        # Of the windows drawn in training, the share that had been given a wrong label.
        **({} if trained.drawn_wrong is None else {"drawn_wrong": trained.drawn_wrong}),
        "target": target.dataset,
        **({"placement": target.placement} if target.placement else {}),
        "sources": list(pretrained.sources),
        "synthetic": target.dataset.startswith("synthetic"),
        "pretrained": {
            "identity": pretrained.identity,
            "config": asdict(pretrained.config),
            "loss": pretrained.loss,
            "seconds": pretrained.seconds,
        },
        "identity": run.identity,
        "provenance": provenance(device),
    }  # fmt: skip
    info = {
        "config": config.values(),
        "model": asdict(pretrained.encoder.config),
        "normalizer": asdict(normalizer),
        "labels": list(labels),
        "target": target.dataset,
        "adapted": [path for path, _ in adapted_layers(model.encoder)],
    }
    save_tensors(run.folder / CHECKPOINT, model.state_dict(), kind="classifier checkpoint", info=info)
    if method.adapter:
        save_adapter(model, run.folder / "adapter")
        # Whatever trained is in it: the head, and norms and biases with train_norms.
        metrics["adapter_file"] = (run.folder / "adapter" / WEIGHTS_FILE).stat().st_size
    run.finish(metrics)
    return metrics


def _at_lower_ranks(
    config: FinetuneConfig, model: Classifier, run: Callable[[], Tensor], truth: np.ndarray
) -> dict[str, Any]:
    """With ``by_rank`` the macro-F1 of the trained adapter at every power of 2 up to its rank, and the areas under it.

    run: gives the logits of the test part.
    """
    if not config.by_rank:
        return {}
    ranks = [*(2**k for k in range(config.rank.bit_length()) if 2**k < config.rank), config.rank]
    found: dict[str, Any] = {"ranks": ranks}
    for how, squeezed in (("cut", False), ("squeezed", True)):
        found[how] = []
        for rank in ranks:
            with at_rank(model.encoder, rank, squeezed=squeezed):
                found[how].append(macro_f1(truth, run().argmax(dim=1).numpy()))
    return {"by_rank": found, "aurac": aurac(found["cut"], ranks)}


def _intruders(config: FinetuneConfig, model: Classifier, before: Encoder, paths: Sequence[str]) -> dict[str, float]:
    """How many of the largest singular vectors of a changed matrix are like none that it had, the mean over those at
    ``paths``; nothing where no matrix changed or there was none before.
    """
    if not METHODS[config.method].pretrained:
        return {}
    counts = []
    own = dict(before.named_modules())
    for path in paths:
        layer: Any = model.get_submodule(path)
        if isinstance(layer, AdaptedLinear):  # not what 4 bits changed
            old, new = layer.base_weight().float(), layer.merge().weight.detach().float()
        else:
            old, new = own[path.removeprefix("encoder.")].weight.detach(), layer.weight.detach()
        old, new = old.cpu(), new.cpu()
        if not torch.equal(old, new):
            counts.append(len(intruders(old, new - old)))
    return {"intruders": sum(counts) / len(counts)} if counts else {}


@dataclass(frozen=True)
class _Trained:
    bytes: dict[str, int]
    seconds: float
    best_epoch: int
    history: list[dict[str, float]]
    learning_rate: float
    drawn_wrong: float | None


def _train(
    config: FinetuneConfig,
    model: Classifier,
    samples: _Samples,
    identity: str,
    state_file: Path,
    device: torch.device,
    captured: bool,
    report: Report,
) -> _Trained:
    classes = samples.classes
    inputs = samples.signals
    by_quality = config.takes_by_quality()
    adapting, raised = schedule(model), penalty(model)
    sampler: Sampler | None = None
    if by_quality:
        sampler = QualitySampler(samples.train, config.sampled or 1.0, config.quality)
    elif config.sampled is not None:
        sampler = Sampler(samples.train, config.sampled)
    tokens = model.encoder.config.tokens
    learns = any(p.requires_grad for p in model.encoder.parameters())
    kept = max(1, round((1 - (config.dropped or 0)) * tokens)) if learns else tokens

    def batch(indices: Tensor) -> tuple[Tensor, ...]:
        x = inputs[indices]
        if config.turned_deg:
            x = rotate(x, small_rotations(len(x), config.turned_deg))
        if config.flipped:
            chosen = torch.rand(len(x)) < config.flipped
            x[chosen] = rotate(x[chosen], half_turns(int(chosen.sum())))
        if config.warp is not None and config.warp < 1:
            x = warp_time(x, config.warp)
        if config.rescaled:
            x = rescale(x, config.rescaled)
        given = [samples.normalised(x, indices), classes[indices]]
        if kept < tokens:
            given.append(torch.rand(len(x), tokens).argsort(dim=1)[:, :kept])
        return (*given, indices) if by_quality else tuple(given)

    def loss(x: Tensor, truth: Tensor, *rest: Tensor) -> Tensor:
        logits = model(x, *rest[: kept < tokens])
        if by_quality and sampler is not None:
            sampler.observe(rest[-1], logits, truth)
        error = F.cross_entropy(logits, truth, label_smoothing=config.label_smoothing)
        return error if raised is None else error + raised()

    def validate() -> float:
        part = samples.validation
        predicted = in_batches(model, samples.normalised(inputs[part], part), device=device).argmax(dim=1)
        return macro_f1(classes[part].numpy(), predicted.numpy())

    settings = config.optimisation()
    common: dict[str, Any] = {
        "seed": config.seed, "identity": identity, "state_file": state_file, "report": report
    }  # fmt: skip
    if config.federated != "no":
        assert samples.people is not None
        whose = samples.people[samples.train]
        clients = [samples.train[whose == who] for who in whose.unique()]
        fitted = federate(
            model, batch, loss, clients, settings, ridge=RIDGE if config.federated == "fair" else None, **common
        )
    else:
        fitted = fit(
            model,
            batch,
            loss,
            samples.train,
            settings,
            capture=captured,
            schedule=adapting,
            sampler=sampler,
            validate=validate if len(samples.validation) else None,
            **common,
        )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    part = samples.train[: settings.batch_size]
    # Eager: a graph would hold as much for as long as it lives.
    size = _training_bytes(model, fitted.optimizer, loss, lambda: batch(part), settings)
    model.load_state_dict(state)  # the measured step is not part of the training
    model.eval()
    drawn_wrong = None
    if samples.wrong is not None:
        drawn = torch.ones(len(samples.train)) if sampler is None else sampler.drawn
        is_wrong = torch.isin(samples.train, samples.wrong)
        drawn_wrong = float(drawn[is_wrong].sum() / drawn.sum())
    return _Trained(size, fitted.seconds, fitted.best_epoch, fitted.history, settings.learning_rate, drawn_wrong)


def _training_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    batch: Callable[[], Sequence[Tensor]],
    settings: Optimisation,
) -> dict[str, int]:
    """What ``model`` holds and one step of its training allocates."""
    model.train()
    if not optimizer.state:  # of a run that was stopped after its last step; its state is no work of a step
        TrainingStep(model, loss, optimizer, clip_norm=settings.clip_norm)(*batch())
    optimizer.zero_grad()
    step = step_bytes(model, optimizer, loss, batch, clip_norm=settings.clip_norm)
    held = held_bytes(model, optimizer)  # with the gradients of that step
    optimizer.zero_grad()
    return held | step


def method_bytes(
    config: FinetuneConfig, device: torch.device, *, encoder: MAEConfig | None = None, classes: int = 6
) -> dict[str, int]:
    """What ``config.method`` holds in training, as `held_bytes` and `step_bytes` have it, on windows that are random.

    encoder: sizes of the model.
    Raises: InputError as `FinetuneConfig.check`, or if the batch has fewer than two windows.
    """
    config.check()
    if config.batch_size < 2:
        raise InputError(f"batch_size must be at least 2 (the head has a BatchNorm), got {config.batch_size}")
    sizes = encoder or MAEConfig()
    drawn = (torch.randn(64, sizes.window, sizes.channels), torch.randint(classes, (64,)), torch.arange(64))
    samples = _Samples(
        *drawn, drawn[2][:0], torch.zeros(64, dtype=torch.int64), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    )
    model = build_classifier(config, Encoder(sizes), classes, seen=Preview(samples, config)).to(device)
    shape = (sizes.window, sizes.channels)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(config.batch_size, *shape), torch.randint(classes, (config.batch_size,))

    def loss(x: Tensor, truth: Tensor) -> Tensor:
        error = F.cross_entropy(model(x), truth, label_smoothing=config.label_smoothing)
        return error if raised is None else error + raised()

    settings = config.optimisation()
    raised = penalty(model)
    optimizer = make_optimizer(model, settings)
    model.train()
    # The first step compiles kernels, compares them with the reference and makes the optimiser's state.
    TrainingStep(model, loss, optimizer, clip_norm=settings.clip_norm)(*batch())
    return _training_bytes(model, optimizer, loss, batch, settings)


def load_checkpoint(file: Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier in a checkpoint that `finetune` wrote, in evaluation mode, and what the file says of it.

    The latter has config, model, normalizer and target, and labels in the order of the logits.
    Raises: InputError if the file is missing, damaged or not such a checkpoint.
    """
    remedy = f"give the {CHECKPOINT} of a `harlora finetune` run"
    tensors, info = load_tensors(file, kind="classifier checkpoint", remedy=remedy)
    config = FinetuneConfig(**info["config"])
    model = build_classifier(
        config,
        Encoder(MAEConfig(**info["model"])),
        len(info["labels"]),
        paths=info.get("adapted", config.target_modules),
    )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{file}: is a checkpoint of another model ({error}); {remedy}") from error
    return model.eval(), info


def load_classifier(file: Path) -> tuple[Classifier, Normalizer, tuple[str, ...]]:
    """The classifier in a checkpoint that `finetune` wrote, its normaliser and its labels.

    Raises: as `load_checkpoint`.
    """
    model, info = load_checkpoint(file)
    normalizer = Normalizer(tuple(info["normalizer"]["mean"]), tuple(info["normalizer"]["std"]))
    return model, normalizer, tuple(info["labels"])
