"""A finetuned classifier outside of harlora: as an ONNX model or a ``torch.export`` program, checked before it counts.

What is exported takes raw windows: normalisation is part of it. Adapters are merged into float32 weights, or the 4-bit
weights stay in 4 bits with the adapters beside them. For ONNX Runtime that is its operator
``com.microsoft.MatMulBnb4``, which has the codes, packing and blocks of this format (`harlora.kernels.format`), so that
no weight changes.
"""

import copy
import hashlib
import importlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora import __version__
from harlora.data.catalog import known, load_windows
from harlora.data.windows import CHANNELS, RATE_HZ, Normalizer
from harlora.errors import InputError
from harlora.files import read_json, replacing, write_json
from harlora.kernels.reference import scales
from harlora.models.mae import Classifier
from harlora.nn import QLoRALinear, apply_qlora, merge_adapters
from harlora.nn.adapters import Gain, LowRank
from harlora.train.finetune import TARGET_MODULES, load_checkpoint
from harlora.train.fit import Report, silent
from harlora.train.runs import provenance

FORMATS: Mapping[str, str] = {
    "onnx": "classifier.onnx",
    "onnx-4bit": "classifier-4bit.onnx",
    "torch": "classifier.pt2",
    "torch-4bit": "classifier-4bit.pt2",
}
REPORT = "export.json"
METADATA_FILE = "harlora.json"  # within a .pt2
UNITS = "accel in m/s^2 with gravity, gyro in rad/s"
# The most that logits may differ, relative to the largest of them (at least 1): rounding in another order gives about
# 1e-6, one wrong scale of a weight more than this.
LOGIT_BOUND = 1e-4
EQUAL_LABELS = 0.99  # at least; of windows that lie between two labels rounding decides
BATCHES = (1, 64)
_CHECKED = 256  # windows
_LIBRARIES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
_BNB4_QUANT_TYPES = {"fp4": 0, "nf4": 1}
_BNB4_BLOCKSIZE = 256  # the largest that ONNX Runtime's CPU provider implements
_STEPS = 4
_TIMED_S = 1.5  # at least, of each size of batch

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # windows in, logits and probabilities out


class Deployed(nn.Module):
    """Logits and probabilities of raw windows: ``classifier((windows - mean) / std)``, and their softmax.

    windows: ``(batch, window, 6)``, float32; m/s² with gravity, then rad/s, at 50 Hz.
    logits, probabilities: ``(batch, classes)``, float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier, normalizer: Normalizer) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(normalizer.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(normalizer.std, dtype=torch.float32))
        self.eval().requires_grad_(False)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier((windows - self.mean) / self.std)
        return logits, logits.softmax(dim=-1)


class _Bnb4Linear(nn.Module):
    """A `QLoRALinear` as the ONNX exporter is to see it: MatMulBnb4, the adapter as two products beside it and factors
    before and behind, the bias.

    MatMulBnb4 multiplies by the transpose of a weight (N, K) that is packed as in this format. It has no 8-bit scales,
    so these are decoded, and no blocks beyond 256, so larger ones become several with the same scale.

    Source: microsoft/onnxruntime, docs/ContribOperators.md and contrib_ops/cpu/quantization/matmul_bnb4.cc.
    """

    packed: Tensor
    absmax: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    inputs: Tensor | None
    outputs: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QLoRALinear) -> None:
        super().__init__()
        quantized = layer.quantized_weight()
        blocksize = min(layer.blocksize, _BNB4_BLOCKSIZE)
        blocks = -(-layer.in_features * layer.out_features // blocksize)
        absmax = scales(quantized.absmax, quantized.nested_absmax, quantized.nested_offset)
        absmax = absmax.repeat_interleave(layer.blocksize // blocksize)[:blocks]
        self.register_buffer("packed", quantized.packed.reshape(-1).clone())
        self.register_buffer("absmax", absmax.clone())
        self.attributes: dict[str, Any] = {
            "K": layer.in_features,
            "N": layer.out_features,
            "block_size": blocksize,
            "quant_type": _BNB4_QUANT_TYPES[layer.quant_type],
        }
        delta, gain = _change(layer)
        bias: Tensor | None = layer.bias
        if bias is not None and gain.of_bias and gain.outputs is not None:
            bias = bias * gain.outputs
        parts = {
            "lora_A": None if delta is None else delta.A,
            "lora_B": None if delta is None else delta.B * delta.scale,
            "inputs": gain.inputs,
            "outputs": gain.outputs,
            "bias": bias,
        }
        for name, part in parts.items():
            self.register_buffer(name, None if part is None else part.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = x * self.inputs
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (x, self.packed, self.absmax),
            attrs=self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )
        assert isinstance(y, Tensor)
        if self.lora_A is not None and self.lora_B is not None:
            y = y + F.linear(F.linear(x, self.lora_A), self.lora_B)
        if self.outputs is not None:
            y = y * self.outputs
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def _change(layer: QLoRALinear) -> tuple[LowRank | None, Gain]:
    """What the layer's adapter makes of its weight."""
    if layer.adapter is None:
        adapted = layer.lora_A is not None and layer.lora_B is not None
        return (LowRank(layer.lora_A, layer.lora_B, layer.scaling) if adapted else None), Gain()  # type: ignore[arg-type]
    delta = layer.adapter.delta(layer)
    return delta, layer.adapter.gain(layer, delta) or Gain()


def export(
    file: Path,
    out: Path,
    form: str,
    *,
    data: Path,
    merge: bool = False,
    threads: int = 1,
    report: Report = silent,
) -> dict[str, Any]:
    """Write the classifier of the checkpoint ``file`` to the folder ``out``, and return what its export.json says.

    The file is read back and compared with the checkpoint's model before it takes its name. The comparison uses
    windows of the dataset that the classifier was trained for, where that is under ``data``, or else random ones.

    form: one of `FORMATS`.
    merge: of a 4-bit form: merge the adapters and quantise the sum anew, which changes the classifier.
    threads: of both models, while compared and timed.
    Raises: InputError if an argument cannot be used, a library is missing, the checkpoint is missing or damaged, or
    what was exported disagrees with its model; ``out`` is then as it was.
    """
    _check(form, out, merge, threads)
    report(0, _STEPS, "reading")
    model, info = load_checkpoint(file)
    normalizer = Normalizer(tuple(info["normalizer"]["mean"]), tuple(info["normalizer"]["std"]))
    original = Deployed(model, normalizer)
    wanted = original
    if merge:
        wanted = Deployed(_requantized(model, info["config"]), normalizer)
    layers = _quantized_layers(wanted)
    if form.endswith("4bit") and not layers:
        raise InputError(
            f"--format {form}: {file} was finetuned by {info['config']['method']} and has no 4-bit layers; use "
            f"--format {form.removesuffix('-4bit')}, or --merge, which quantises its encoder and changes its results"
        )
    windows, source = _windows(info["target"], data, model.encoder.config.window)
    metadata = _metadata(file, info, form, merge)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot make the folder ({error}); choose another") from error
    with _threads(threads), replacing(out / FORMATS[form]) as temporary:
        report(1, _STEPS, "exporting")
        weights = _write(form, wanted, temporary, metadata)
        report(2, _STEPS, "comparing")
        run, reference = _load(form, temporary, threads), _eager(wanted)
        checked = _compare(reference, run, windows)
        _require(checked, form)
        changed = _compare(_eager(original), run, windows) if merge else None
        report(3, _STEPS, "timing")
        latency = [
            {"batch": batch, **_latency({"pytorch": _eager(original), "exported": run}, _batch(windows, batch))}
            for batch in BATCHES
        ]
        size = temporary.stat().st_size
    in_4bit = len(layers) if form.endswith("4bit") else 0
    result = {
        "format": form,
        "file": FORMATS[form],
        "metadata": metadata,
        "bytes": {
            "checkpoint": file.stat().st_size,
            "file": size,
            "weights_pytorch": _nbytes(original),
            "weights": weights,
        },
        "layers": {"4bit": in_4bit, "float32": _linear_layers(wanted) - in_4bit},
        "check": {"windows": source, "logit_bound": LOGIT_BOUND, "equal_labels_bound": EQUAL_LABELS, **checked},
        "changed_by_merge": changed,
        "latency_ms": latency,
        "threads": threads,
        "provenance": {**provenance(torch.device("cpu")), "threads": threads},
        "libraries": {name: version(name) for name in _LIBRARIES[form.partition("-")[0]]},
    }
    write_json(out / REPORT, result)
    report(_STEPS, _STEPS, "")
    return result


def _check(form: str, out: Path, merge: bool, threads: int) -> None:
    if form not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if merge and not form.endswith("4bit"):
        raise InputError(
            f"--merge requires --format onnx-4bit or torch-4bit, got {form}, which has the adapters merged anyway"
        )
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    if (out / REPORT).exists():
        other = read_json(out / REPORT, "choose another folder with --out").get("format")
        if other != form:
            raise InputError(f"--out {out} has an export in the format {other}, got {form}; choose another folder")
    for name in _LIBRARIES[form.partition("-")[0]]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"--format {form} requires {name}, which cannot be imported ({error}); install harlora with its extra "
                "export: pip install --no-build-isolation '.[export]' in the source folder"
            ) from error


def _requantized(model: Classifier, config: Mapping[str, Any]) -> Classifier:
    """A copy with the adapters merged and the encoder's matrices quantised, with float32 scales."""
    merged = merge_adapters(copy.deepcopy(model))
    apply_qlora(
        merged.encoder, TARGET_MODULES, rank=0, quant_type=config["quant_type"], blocksize=config["blocksize"],
    )  # fmt: skip
    return merged


def _quantized_layers(module: nn.Module) -> list[str]:
    return [path for path, layer in module.named_modules() if isinstance(layer, QLoRALinear)]


def _linear_layers(module: nn.Module) -> int:
    return sum(hasattr(layer, "in_features") for layer in module.modules())


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))


def _metadata(file: Path, info: Mapping[str, Any], form: str, merge: bool) -> dict[str, str]:
    """What the file itself says of how to use it and where it comes from."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {
        "labels": json.dumps(info["labels"]),
        "channels": json.dumps(CHANNELS),
        "units": UNITS,
        "rate_hz": f"{RATE_HZ:g}",
        "window": str(info["model"]["window"]),
        "target": info["target"],
        "config": json.dumps(info["config"]),
        "format": form,
        "requantized": json.dumps(merge),
        "checkpoint_sha256": digest,
        "harlora": __version__,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _windows(target: str, data: Path, window: int) -> tuple[np.ndarray, str]:
    """Raw windows to compare on, ``(n, window, 6)``, float32, and where they are from."""
    random = np.random.default_rng(0)
    entry = known(data).get(target)
    if entry is not None and (entry.is_synthetic or entry.find(data) is not None):
        signals = load_windows(target, data, window=window).signals
        chosen = random.permutation(len(signals))[:_CHECKED]
        return signals[chosen], f"{len(chosen)} of {target}"
    gravity = random.standard_normal((_CHECKED, 1, 3))
    gravity *= 9.81 / np.linalg.norm(gravity, axis=2, keepdims=True)
    signals = random.standard_normal((_CHECKED, window, 6)) * [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    signals[:, :, :3] += gravity
    return signals.astype(np.float32), f"{_CHECKED} random, since {target} was not found"


def _batch(windows: np.ndarray, size: int) -> np.ndarray:
    return windows[np.arange(size) % len(windows)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own code, and about libraries that nothing here needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(form: str, module: Deployed, path: Path, metadata: Mapping[str, str]) -> int:
    """Write ``module`` to ``path`` and return the bytes of its weights there."""
    module = copy.deepcopy(module)
    if form == "onnx-4bit":
        for name in _quantized_layers(module):
            layer = module.get_submodule(name)
            assert isinstance(layer, QLoRALinear)
            module.set_submodule(name, _Bnb4Linear(layer))
    if form != "torch-4bit":
        merge_adapters(module)
    config = module.classifier.encoder.config
    # Two windows, since an axis of one would be taken for fixed.
    example = torch.zeros(2, config.window, config.channels)
    batch = {"windows": {0: torch.export.Dim("batch", min=1)}}
    with _quiet():
        if form.startswith("torch"):
            program = torch.export.export(module, (example,), dynamic_shapes=batch)
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # has paths of this machine
            with path.open("wb") as opened:  # given a path, the archive is called as the temporary file
                torch.export.save(program, opened, extra_files={METADATA_FILE: json.dumps(dict(metadata))})
            tensors = [*program.state_dict.values(), *program.constants.values()]
            return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        from onnx_ir.passes import common

        exported = torch.onnx.export(
            module, (example,), dynamo=True, dynamic_shapes=batch, input_names=["windows"],
            output_names=["logits", "probabilities"], verbose=False,
        )  # fmt: skip
        assert exported is not None
        # Nodes carry stack traces, which have paths of this machine and would be most of a small file.
        common.ClearMetadataAndDocStringPass()(exported.model)
        exported.model.metadata_props.update(metadata)
        exported.save(path, external_data=False)
        values = (value.const_value for value in exported.model.graph.initializers.values())
        return sum(value.nbytes for value in values if value is not None)


def _load(form: str, path: Path, threads: int) -> Run:
    """What the file at ``path``, which was just written here, computes."""
    if form.startswith("torch"):
        with _quiet(), path.open("rb") as opened:
            return _eager(torch.export.load(opened).module())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait in a loop would slow the other model down, which runs in turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = session.run(["logits", "probabilities"], {"windows": windows})
        return logits, probabilities

    return run


def _eager(module: nn.Module) -> Run:
    @torch.inference_mode()
    def run(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = module(torch.from_numpy(windows))
        return logits.numpy(), probabilities.numpy()

    return run


def _compare(reference: Run, run: Run, windows: np.ndarray) -> dict[str, float]:
    """How far ``run`` is from ``reference``, over all windows at once and over the first as a batch of one."""
    expected, expected_shares = reference(windows)
    found, shares = run(windows)
    first, _ = run(windows[:1])
    return {
        "max_logit": float(np.abs(expected).max()),
        "max_logit_error": float(max(np.abs(found - expected).max(), np.abs(first - expected[:1]).max())),
        "max_probability_error": float(np.abs(shares - expected_shares).max()),
        "equal_labels": float((found.argmax(axis=1) == expected.argmax(axis=1)).mean()),
    }


def _require(checked: Mapping[str, float], form: str) -> None:
    """Raise InputError unless what was exported agrees with its model."""
    bound = LOGIT_BOUND * max(1.0, checked["max_logit"])
    # Written so that NaN fails.
    if not (
        checked["max_logit_error"] <= bound
        and checked["max_probability_error"] <= LOGIT_BOUND
        and checked["equal_labels"] >= EQUAL_LABELS
    ):
        raise InputError(
            f"--format {form}: what was exported disagrees with the model: logits differ by up to "
            f"{checked['max_logit_error']:.3g}, required at most {bound:.3g}; probabilities by "
            f"{checked['max_probability_error']:.3g}, at most {LOGIT_BOUND:g}; {checked['equal_labels']:.1%} of the "
            f"labels are equal, at least {EQUAL_LABELS:.0%}; nothing was written; try another format, and see whether "
            "`harlora doctor` finds something wrong"
        )


def _latency(runs: Mapping[str, Run], windows: np.ndarray) -> dict[str, float]:
    """The median time of a call of each in ms; by turns, since shared machines change their speed all the time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    while time.perf_counter() - began < _TIMED_S or len(times["exported"]) < 12:
        for name, run in runs.items():
            run(windows)  # not counted: it finds the other model's weights in the caches
            for _ in range(4):
                start = time.perf_counter()
                run(windows)
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What `export` returned, as titles, heads and rows of a terminal."""
    sizes, check = result["bytes"], result["check"]
    body = [
        ["size on disk, kB", f"{sizes['checkpoint'] / 1e3:.1f}", f"{sizes['file'] / 1e3:.1f}"],
        ["weights, kB", f"{sizes['weights_pytorch'] / 1e3:.1f}", f"{sizes['weights'] / 1e3:.1f}"],
        *(
            [f"batch of {row['batch']}, ms", f"{row['pytorch']:.3f}", f"{row['exported']:.3f}"]
            for row in result["latency_ms"]
        ),
        ["largest logit error", "", f"{check['max_logit_error']:.2g}"],
        ["equal labels", "", f"{check['equal_labels']:.1%}"],
    ]
    shown = [
        (
            f"{result['file']}: {result['layers']['4bit']} layers in 4 bits, {result['layers']['float32']} in float32; "
            f"{result['threads']} thread(s); compared on windows: {check['windows']}",
            ["", "PyTorch", "exported"],
            body,
        )
    ]
    if (changed := result["changed_by_merge"]) is not None:
        shown.append(
            (
                "Merging the adapters and quantising anew changed the classifier",
                ["", "by"],
                [
                    ["largest change of a logit", f"{changed['max_logit_error']:.3g}"],
                    ["largest logit before", f"{changed['max_logit']:.3g}"],
                    ["equal labels", f"{changed['equal_labels']:.1%}"],
                ],
            )
        )
    return shown
