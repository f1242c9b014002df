"""Self-supervised pretraining of the masked autoencoder on unlabelled windows of several datasets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harlora.data.augment import random_rotations, rescale, rotate
from harlora.data.catalog import domain, people, require_apart
from harlora.data.windows import CHANNELS, WINDOW, Normalizer, Windows
from harlora.errors import InputError
from harlora.files import load_tensors, save_tensors
from harlora.models.mae import MAE, Encoder, MAEConfig
from harlora.train.capture import Capture, captures
from harlora.train.fit import Optimisation, Report, fit, silent
from harlora.train.processes import Processes
from harlora.train.runs import Run, identify, provenance

CHECKPOINT = "encoder.safetensors"
DECODER = "decoder.safetensors"


@dataclass(frozen=True)
class PretrainConfig:
    """How the encoder is pretrained."""

    model: MAEConfig = field(default_factory=lambda: MAEConfig(heads=3, ffn=384))
    epochs: int = 40
    """Passes over all windows of all sources."""
    batch_size: int = 128
    """Windows a step."""
    learning_rate: float = 1e-3
    """The highest of the one-cycle schedule."""
    weight_decay: float = 0.05
    """Of matrices; biases and norms have none."""
    rotated: float = 0.5
    """Share of the windows that are turned at random, as if the device sat another way."""
    rescaled: float = 0.1
    """Standard deviation of a random factor on each sensor."""
    max_windows: int = 0
    """At most so many windows of each dataset, drawn at random; 0 takes all."""
    seed: int = 0
    """Of everything random."""

    def check(self) -> None:
        """Raise InputError unless every setting has a possible value."""
        self.optimisation()
        try:
            self.model.check()
        except ValueError as error:
            raise InputError(str(error)) from error
        for name, size in (("window", WINDOW), ("channels", len(CHANNELS))):
            if getattr(self.model, name) != size:
                raise InputError(f"model.{name} must be {size}, as of all datasets, got {getattr(self.model, name)}")
        if not 0 <= self.rotated <= 1:
            raise InputError(f"rotated must be from 0 to 1, got {self.rotated}")
        for name in ("weight_decay", "rescaled", "max_windows", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")

    def optimisation(self) -> Optimisation:
        """The training schedule.

        Raises: InputError if a value is not positive.
        """
        return Optimisation(self.epochs, self.batch_size, self.learning_rate, self.weight_decay)


@dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder and what it was made from.

    identity: a hash of its configuration and data. config: how it was pretrained. sources: the datasets it has seen.
    domains: of each source, whose people they are; a source that is not named here is as the catalogue says.
    """

    encoder: Encoder
    identity: str
    config: PretrainConfig
    sources: tuple[str, ...]
    loss: float
    seconds: float
    domains: Mapping[str, str] = field(default_factory=dict)

    def domain(self, source: str) -> str:
        """Whose people a source is."""
        return self.domains.get(source) or domain(source)


def thinned(windows: Windows, most: int, seed: int) -> Windows:
    """At most ``most`` windows, drawn at random; all of them if ``most`` is 0."""
    if not most or len(windows) <= most:
        return windows
    chosen = np.random.default_rng([seed, 11]).permutation(len(windows))[:most]
    return windows.take(np.sort(chosen))


def pretrain(
    config: PretrainConfig,
    sources: Sequence[Windows],
    out: Path,
    *,
    device: torch.device,
    capture: Capture = "off",
    report: Report = silent,
) -> Path:
    """The checkpoint of an encoder pretrained on ``sources``, made anew only if ``out`` does not have it.

    The loss is that of `MAE`; its masked patches are drawn anew for every window and epoch. Each dataset is
    normalised with its own statistics.

    Where ``torchrun`` has started several processes, each calls this and takes its share of every batch.

    capture: the steps into a CUDA graph, as `captures` says; like the number of processes no part of the run's
        identity, since it changes the result by rounding alone.
    Raises: InputError if there is no source, two are the same people, a file of the run is damaged, ``capture`` is not
    possible, or the batch cannot be shared out evenly.
    """
    captured = captures(capture, device)
    if not sources:
        raise InputError("pretraining requires at least one source dataset, got none")
    require_apart({windows.dataset: people(windows) for windows in sources})
    config.check()
    processes = Processes(device)
    processes.check(config.batch_size)
    if captured and processes.count > 1:
        if capture == "on":
            raise InputError("capture: steps of several processes are not captured; use auto or off")
        captured = False
    parts = [thinned(windows, config.max_windows, config.seed) for windows in sources]
    with processes.open_run(out, "pretrain", _signature(config, parts, device)) as run:
        file = run.folder / CHECKPOINT
        if run.metrics() is None or not file.exists():
            _pretrain(config, parts, run, device, captured, report, processes)
    return file


def pretraining_identity(config: PretrainConfig, sources: Sequence[Windows], device: torch.device) -> str:
    """The identity of the run that `pretrain` makes or finds with these arguments."""
    parts = [thinned(windows, config.max_windows, config.seed) for windows in sources]
    return identify(_signature(config, parts, device))


def _signature(config: PretrainConfig, parts: Sequence[Windows], device: torch.device) -> dict[str, Any]:
    # What the catalogue does not know decides who may be a target later, so it is part of the run's identity.
    own = {part.dataset: people(part) for part in parts if people(part) != domain(part.dataset)}
    return {
        "kind": "pretrain",
        "config": asdict(config),
        "sources": {part.dataset: part.fingerprint() for part in parts},
        "device": device.type,
        **({"domains": own} if own else {}),
    }


def _pretrain(
    config: PretrainConfig,
    parts: Sequence[Windows],
    run: Run,
    device: torch.device,
    captured: bool,
    report: Report,
    processes: Processes,
) -> None:
    torch.manual_seed(config.seed)
    model = MAE(config.model).to(device)
    joined = processes.joined(model)
    signals = torch.from_numpy(np.concatenate([part.signals for part in parts]))
    normalizers = [Normalizer.fit(part.signals) for part in parts]
    origin = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    mean = torch.tensor([normalizer.mean for normalizer in normalizers])[:, None]  # (sources, 1, channels)
    std = torch.tensor([normalizer.std for normalizer in normalizers])[:, None]

    def batch(indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = signals[indices]
        if config.rotated:
            turned = torch.rand(len(x)) < config.rotated
            x[turned] = rotate(x[turned], random_rotations(int(turned.sum())))
        if config.rescaled:
            x = rescale(x, config.rescaled)
        order = torch.rand(len(x), config.model.tokens).argsort(dim=1)
        return processes.share((x - mean[origin[indices]]) / std[origin[indices]], order)

    def loss(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = joined(x, order)[0]
        return value

    fitted = fit(
        model,
        batch,
        loss,
        torch.arange(len(signals)),
        config.optimisation(),
        seed=config.seed,
        identity=run.identity,
        state_file=run.state_file,
        capture=captured,
        processes=processes,
        report=report,
    )
    if not processes.is_first:
        return
    info = {
        "identity": run.identity,
        "model": asdict(config.model),
        "config": {key: value for key, value in asdict(config).items() if key != "model"},
        "sources": [part.dataset for part in parts],
        "domains": {part.dataset: people(part) for part in parts},
        "loss": fitted.history[-1]["loss"],
        "seconds": fitted.seconds,
    }
    save_tensors(run.folder / DECODER, model.decoder.state_dict(), kind="decoder checkpoint", info=info)
    save_tensors(run.folder / CHECKPOINT, model.encoder.state_dict(), kind="encoder checkpoint", info=info)
    run.finish(
        {
            **info,
            "history": fitted.history,
            "captured": captured,
            "processes": processes.count,
            "provenance": provenance(device),
        }
    )


def load_pretrained(file: Path) -> Pretrained:
    """The encoder in a checkpoint that `pretrain` wrote.

    Raises: InputError if the file is missing, damaged or not such a checkpoint.
    """
    remedy = "give the encoder.safetensors of a `harlora pretrain` run"
    tensors, info = load_tensors(file, kind="encoder checkpoint", remedy=remedy)
    encoder = Encoder(MAEConfig(**info["model"]))
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{file}: is a checkpoint of another model ({error}); {remedy}") from error
    return Pretrained(
        encoder=encoder,
        identity=info["identity"],
        config=PretrainConfig(model=encoder.config, **info["config"]),
        sources=tuple(info["sources"]),
        loss=info["loss"],
        seconds=info["seconds"],
        domains=info.get("domains", {}),
    )


def load_mae(file: Path) -> MAE:
    """The autoencoder as it was pretrained: the encoder in a checkpoint, and the decoder in the file beside it.

    Raises: InputError as `load_pretrained`, or if the decoder is missing, damaged or another encoder's.
    """
    pretrained = load_pretrained(file)
    remedy = "pretrain again, by a version that keeps the decoder"
    tensors, info = load_tensors(file.with_name(DECODER), kind="decoder checkpoint", remedy=remedy)
    if info["identity"] != pretrained.identity:
        raise InputError(f"{file.with_name(DECODER)}: is of another encoder than {file.name}; {remedy}")
    model = MAE(pretrained.encoder.config)
    model.encoder = pretrained.encoder
    model.decoder.load_state_dict(tensors)
    return model.eval()
