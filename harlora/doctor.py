"""Whether harlora works on this machine: what serves, whether it computes rightly, and which kernels are fastest here.

The self-test calls every backend directly, past the dispatcher, which would leave a wrong one out: a wrong kernel is to
be named, not avoided. What is compared with what: `_operators`, `_groups`, `_encoder`, `_precisions`.
"""

import copy
import itertools
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import harlora
from harlora import configure
from harlora.files import write_json
from harlora.kernels import configurations, cpp, dispatch, eager, gpu, reference, tuning
from harlora.models import MAE, MAEConfig

Report = Callable[[int, int, str], None]

REINSTALL = "install it anew with a C++ compiler: pip install --no-build-isolation --force-reinstall --no-deps ."
WRONG = "do not use it: set HARLORA_BACKEND=reference, and report this with the output of `harlora doctor --json`"
# The defaults of torch.testing for each dtype.
RTOL = {torch.float32: 1.3e-6, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
ATOL = 1e-5
FASTER = 1.03
TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
# What each operator returns, in order, and whose results are no rounded sums.
RESULTS = {
    "quantize_4bit": ("packed codes", "absmax", "nested_absmax", "nested_offset"), "dequantize_4bit": ("the weight",),
    "qlora_linear": ("y", "t"), "qlora_linear_backward": ("dX", "dbias", "dA", "dB"), "dora_norm": ("the norms",),
    "dora_linear": ("y", "t"), "lora_pool_linear": ("y", "t"),
}  # fmt: skip
EXACT = ("quantize_4bit", "dequantize_4bit")


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    problem: str
    remedy: str


@dataclass(frozen=True)
class SelfTest:
    """The outcome of a self-test: how many comparisons, of what, and which failed."""

    comparisons: int
    covered: list[str]
    problems: list[Problem]


class Size(NamedTuple):
    rows: int
    in_features: int
    out_features: int
    rank: int
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False

    def __str__(self) -> str:
        options = f"{self.quant_type}, blocksize {self.blocksize}{', nested scales' * self.double_quant}"
        return f"{self.rows} rows, {self.in_features}→{self.out_features}, rank {self.rank}, {options}"


# Odd and even, one past a block and a panel, blocks across rows, few and many rows, long rows.
SIZES = (
    Size(1, 192, 192, 16), Size(64, 192, 768, 8), Size(5, 63, 129, 3), Size(3, 65, 17, 1, "nf4", 32, True),
    Size(7, 96, 33, 5, "fp4"), Size(300, 160, 100, 9, "fp4", 128, True), Size(15, 1088, 70, 4), Size(2, 576, 34, 17),
    Size(8, 4096, 40, 16, "nf4", 64, True), Size(9, 256, 6, 66, "nf4", 4096), Size(5, 1, 1, 1), Size(33, 128, 65, 0),
    Size(0, 64, 32, 4), Size(64, 192, 192, 16), Size(512, 192, 512, 16), Size(4, 1088, 33, 16, "nf4", 256, True),
    Size(130, 320, 200, 24, "fp4", 64, True), Size(16, 192, 768, 16),
)  # fmt: skip
# Windows, tokens, width and inner width of the parts of an encoder.
PARTS = ((2, 16, 192, 512), (1, 5, 64, 130), (3, 7, 96, 33))
# A whole one.
ENCODER = MAEConfig()


# State --------------------------------------------------------------------------------------------------------------


def state(device: torch.device) -> tuple[dict[str, Any], list[Problem]]:
    """What is installed and serves on ``device``, as JSON values, and what is wrong with it."""
    problems: list[Problem] = []
    dispatch.select("qlora_linear", device, torch.float64)  # says what is wrong with HARLORA_BACKEND
    reason = cpp.load_extension()
    if reason:
        name = os.path.basename(str(cpp.extension_path())) if cpp.extension_path() else "harlora/kernels/_C.so"
        reason = reason.replace(str(cpp.extension_path()), name)
        problems.append(Problem(f"the compiled extension does not serve: {reason}", REINSTALL))
    found: dict[str, Any] = {
        "harlora": harlora.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": tuning.device_name(device.type),
        "extension": reason or f"loads, build {tuning.build(cpp.extension_path())}",
        "cuda": _cuda(),
        "tuning": _tuning(device, problems),
    }
    if not reason:
        found["kernels"] = cpp.selected_kernels()
        found["other kernels"] = {name: why or "runs" for name, why in _variants().items()}
        found["precisions"] = cpp.precisions()
    for variable in (dispatch.ENVIRONMENT, cpp.ENVIRONMENT, tuning.ENVIRONMENT):
        if os.environ.get(variable):
            found[variable] = os.environ[variable]
    found["backends"] = backends(device, problems)
    return found, problems


def backends(device: torch.device, problems: list[Problem]) -> list[dict[str, str]]:
    """Which backend serves each operator and dtype, and why each other does not; disagreements go to ``problems``."""
    found = []
    for operator in dispatch.OPERATORS:
        for dtype in (*cpp.DTYPES, torch.float64):
            line = {"operator": operator, "dtype": str(dtype).removeprefix("torch."), "serves": "", "others": ""}
            others = []
            for backend in dispatch.ordered(operator, device, dtype):
                why = dispatch.refusal(operator, backend, device, dtype)
                if not why:
                    why = _disagreement(operator, backend, device)
                    if why:
                        problem = f"backend {backend.name} of {operator} {why} on {device.type}"
                        if problem not in {each.problem for each in problems}:
                            problems.append(Problem(problem, WRONG))
                    elif not line["serves"]:
                        line["serves"] = backend.name
                        continue
                others.append(f"{backend.name}: {why or 'comes after'}")
            if not any(backend.name == "cpp" for backend in dispatch.backends(operator)):
                others.append("cpp: it was not built, or does not load")
            elif device.type == "cuda" and not cpp.has_kernel(operator, "cuda"):
                others.append("cpp: there is no such kernel for CUDA yet")
            found.append(line | {"others": "; ".join(dict.fromkeys(others))})
    return found


def _disagreement(operator: str, backend: dispatch.Backend, device: torch.device) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said here, with its remedy
        try:
            return "" if dispatch.agrees(operator, backend, device) else "disagrees with the reference"
        except RuntimeError as error:
            return f"fails ({error})"


def _cuda() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    return "torch was built without CUDA" if torch.version.cuda is None else "torch sees no NVIDIA GPU"


def _tuning(device: torch.device, problems: list[Problem]) -> str:
    file = tuning.path()
    if file is None:
        return f"switched off by {tuning.ENVIRONMENT}=0"
    try:
        found = tuning.read(file).get(tuning.device_name(device.type))
    except ValueError as error:
        problems.append(Problem(f"the tuning table {error}", "delete it, or measure anew: harlora doctor --tune"))
        return "not used"
    if found is None:
        return "not measured here; `harlora doctor --tune` does"
    if found.get("build") != tuning.build(cpp.extension_path()):
        return "measured with another build and not used; `harlora doctor --tune` measures anew"
    return f"measured {found.get('time', '')}"


@contextmanager
def _kernels_kept() -> Iterator[None]:
    name = cpp.selected_kernels()
    try:
        yield
    finally:
        cpp.select_kernels(name)


def _variants() -> dict[str, str]:
    """Why each set of CPU kernels does not run here; empty for those that do."""
    found = {}
    with _kernels_kept():
        for name in cpp.KERNELS:
            try:
                cpp.select_kernels(name)
                found[name] = ""
            except RuntimeError as error:
                known = str(error).partition("(")[2].partition(")")[0]
                found[name] = f"this processor does not run them, but {known}"
    return found


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What was found, as title, heads and lines of tables: state, backends, self-test, tuning."""
    state = found["state"]
    lines = [[name, _said(value)] for name, value in state.items() if name != "backends"]
    made = [("This installation", ["", ""], lines)]
    # Operators whose dtypes are served alike share a line.
    groups: dict[tuple[str, str, str], list[str]] = {}
    for line in state["backends"]:
        groups.setdefault((line["operator"], line["serves"], line["others"]), []).append(line["dtype"])
    lines = [[operator, ", ".join(dtypes), serves, others] for (operator, serves, others), dtypes in groups.items()]
    made.append(("Backends", ["operator", "dtypes", "serves", "why others do not"], lines))
    by_operator: dict[str, list[str]] = {}
    for covered in found["self_test"]["covered"]:
        operator, _, backend = covered.partition(", ")
        by_operator.setdefault(operator, []).append(backend)
    lines = [[operator, ", ".join(names)] for operator, names in by_operator.items()]
    made.append((f"Self-test: {found['self_test']['comparisons']} comparisons", ["operator", "backends"], lines))
    if tuned := found.get("tuned"):
        lines = [
            [
                title,
                ", ".join(f"{name} {value:.2f}" for name, value in sorted(ratios.items(), key=lambda pair: pair[1])),
            ]
            for title, ratios in tuned["measured"].items()
        ]
        made.append(("Tuned: time over that of the default's first choice", ["", "fastest first"], lines))
    return made


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {text}" for name, text in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


# Self-test ----------------------------------------------------------------------------------------------------------


@dataclass
class _Tester:
    """Compares, counts, and keeps what failed."""

    device: torch.device
    backend: str = ""
    comparisons: int = 0

    def __post_init__(self) -> None:
        self.covered: dict[str, None] = {}
        self.problems: list[Problem] = []
        self._posed: dict[Any, Any] = {}

    def problem(self, operator: str, size: Size, dtype: torch.dtype) -> Any:
        """`_problem`, of which all backends have the same."""
        key = operator, size, dtype
        if key not in self._posed:
            self._posed[key] = _problem(operator, self.device, size, dtype)
        return self._posed[key]

    def compare(
        self, operator: str, what: str, where: str, found: Tensor, exact: Tensor, allowed: Tensor | float
    ) -> None:
        """``allowed``: how far each value of ``found`` may be from ``exact``, in float64."""
        self.comparisons += 1
        self.covered[f"{operator}, {self.backend}"] = None
        said = ""
        if found.shape != exact.shape:
            said = f"has shape {tuple(found.shape)}, required {tuple(exact.shape)}"
        elif exact.numel():
            error = (found.detach().double() - exact.detach().double()).abs()
            excess = torch.where(error.isfinite(), error - allowed, torch.inf)
            if float(excess.max()) > 0:
                place = int(excess.argmax())
                limit = allowed if isinstance(allowed, float) else float(allowed.expand_as(error).reshape(-1)[place])
                index = tuple(int(each) for each in torch.unravel_index(torch.tensor(place), error.shape))
                said = f"is off by {float(error.reshape(-1)[place]):.2g} at {index}, allowed {limit:.2g}"
        if said:
            self.fail(operator, what, where, said)

    def fail(self, operator: str, what: str, where: str, said: str) -> None:
        problem = f"{operator}, backend {self.backend} on {self.device.type}, {where}: {what} {said}"
        self.problems.append(Problem(problem, WRONG))

    def attempt(self, operator: str, where: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns; None, and a problem, if it raises."""
        try:
            return call()
        except Exception as error:  # whatever a broken backend raises is what is wrong
            self.fail(operator, "it", where, f"raises {type(error).__name__}: {error}")
            return None


def self_test(device: torch.device, report: Report | None = None) -> SelfTest:
    """Every operator on every backend, and of the CPU's on every set of kernels, against the reference in float64.

    Codes, scales and dequantised values must be exact. Sums may be off by twice what the reference is in the same
    dtype, plus the default tolerance of `torch.testing` for it; in reduced precision by what `inference_precision`
    promises.
    report: is told the steps done, of how many, and what is tested.
    """
    tester = _Tester(device)
    served = not cpp.load_extension()
    names: list[str] = []
    if device.type == "cpu" and served:
        names = [f"cpp {name}" for name, why in _variants().items() if not why]
    elif served:
        names = ["cpp"]
    if _functions("triton", device):
        names.append("triton")
    steps = ["reference", *names, "what harlora chooses"]
    for done, name in enumerate(steps):
        if report is not None:
            report(done, len(steps), name)
        tester.backend = name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backends that the dispatcher leaves out: named here
            if not name.startswith("cpp "):
                _operators(tester, _functions(name, device))
                if name == "triton":
                    tester.attempt("the parts of an encoder", "", partial(_groups, tester, gpu, cpp.DTYPES))
                    tester.attempt("the encoder", "float32", partial(_encoder, tester))
                continue
            with _kernels_kept():
                cpp.select_kernels(name.removeprefix("cpp "))
                _operators(tester, _functions(name, device))
                if tester.attempt("the choice of kernels", "float32", partial(eager.serves, torch.empty(0))):
                    parts = partial(_groups, tester, eager, [torch.float32])
                    tester.attempt("the parts of an encoder", "float32", parts)
                    tester.attempt("the encoder", "float32", partial(_encoder, tester))
                    tester.attempt("inference_precision", "float32", partial(_precisions, tester))
    tester.problems += [Problem(each, WRONG) for each in dispatch.wrong_configurations()]
    return SelfTest(tester.comparisons, list(tester.covered), tester.problems)


def _functions(name: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """A backend's functions by operator, or the public ones; Triton's where they serve ``device``, unasked or asked."""
    if name == "triton":
        return {
            operator: backend.function
            for operator in dispatch.OPERATORS
            for backend in dispatch.backends(operator)
            if backend.name == "triton" and backend.device_type == device.type
            and (not backend.on_request or os.environ.get(dispatch.ENVIRONMENT) == "triton")
        }  # fmt: skip
    if name.startswith("cpp"):
        known = [operator for operator in dispatch.OPERATORS if cpp.has_kernel(operator, device.type)]
        return {operator: getattr(cpp, operator) for operator in known}
    module = reference if name == "reference" else torch.ops.harlora
    return {operator: getattr(module, operator) for operator in dispatch.OPERATORS}


def _draw(seed: int, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _bound(exact: Tensor, same_dtype: Tensor, dtype: torch.dtype) -> Tensor | float:
    if not exact.numel():
        return 0.0
    return 2 * (same_dtype.double() - exact).abs().max() + ATOL + RTOL[dtype] * exact.abs().max()


def _operators(tester: _Tester, functions: dict[str, Callable[..., Any]]) -> None:
    """Each of ``functions``, by operator, in every size and dtype."""
    for size, dtype in itertools.product(SIZES, cpp.DTYPES):
        where = f"{str(dtype).removeprefix('torch.')}, {size}"
        for operator, function in functions.items():
            arguments, exact, allowed = tester.problem(operator, size, dtype)
            results = tester.attempt(operator, where, partial(function, *arguments))
            if results is not None:
                for what, found, *required in zip(RESULTS[operator], _listed(results), exact, allowed, strict=True):
                    tester.compare(operator, what, where, found, *required)


def _problem(
    operator: str, device: torch.device, size: Size, dtype: torch.dtype
) -> tuple[tuple[Any, ...], list[Tensor], list[Tensor | float]]:
    """Arguments, the exact results, and how far each result may be off."""
    meaning, problem = getattr(reference, operator), partial(dispatch.problem, operator, device)
    arguments = problem(dtype, *size)
    same = _listed(meaning(*arguments))
    if operator in EXACT:
        return arguments, same, [0.0] * len(same)
    exact = _listed(meaning(*problem(torch.float64, *size, rounded=dtype)))
    return arguments, exact, [_bound(one, other, dtype) for one, other in zip(exact, same, strict=True)]


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _groups(tester: _Tester, module: Any, dtypes: Sequence[torch.dtype]) -> None:
    """Several layers in one call, as ``module`` has them for parts of an encoder, against plain torch in float64.

    Gradients too, by which the operators of backward are tested.
    """
    for dtype in dtypes:
        _groups_in(tester, module, dtype)


def _groups_in(tester: _Tester, module: Any, dtype: torch.dtype) -> None:
    device = tester.device

    def layer(seed: int, in_features: int, out_features: int) -> tuple[Any, Tensor]:
        weight = _draw(seed, device, out_features, in_features) / in_features**0.5
        packed, absmax, *_ = reference.quantize_4bit(weight, "nf4", 64, False)
        dense = reference.dequantize_4bit(
            packed, absmax, None, None, "nf4", 64, (out_features, in_features), torch.float64
        )
        bias, A = _draw(seed + 1, device, out_features), _draw(seed + 2, device, 8, in_features) / in_features**0.5
        B = _draw(seed + 3, device, out_features, 8) / 8**0.5
        trained = tuple(tensor.to(dtype).requires_grad_() for tensor in (bias, A, B))
        return (packed, absmax, None, None, "nf4", 64, out_features, *trained, 0.5), dense

    def plain(x: Tensor, made: tuple[Any, Tensor], leaves: Sequence[Tensor]) -> Tensor:
        bias, A, B = leaves
        return F.linear(x, made[1].to(x.dtype), bias) + 0.5 * F.linear(F.linear(x, A), B)

    def check(
        operator: str, where: str, call: Callable[[], Any], meaning: Callable[..., Any], leaves: list[Tensor]
    ) -> None:
        found = tester.attempt(operator, where, call)
        if found is None:
            # A GPU takes not all sizes together; what it leaves out because it is wrong is named at the end.
            failed = bool(tester.problems) and tester.problems[-1].problem.startswith(operator)
            if module is eager and not failed:
                tester.fail(operator, "it", where, "does not serve, though the extension loads")
            return
        values = []
        for precision in (torch.float64, dtype):
            copies = [leaf.detach().to(precision).requires_grad_() for leaf in leaves]
            values.append(_outputs(meaning(*copies), copies, dtype))
        titles = [f"output {i}" for i in range(len(values[0]) - len(leaves))] + [
            f"gradient {i}" for i in range(len(leaves))
        ]
        for what, one, exact, same in zip(titles, _outputs(found, leaves, dtype), *values, strict=True):
            tester.compare(operator, what, where, one, exact, _bound(exact, same, dtype))

    for windows, tokens, width, inner in PARTS:
        where = f"{str(dtype).removeprefix('torch.')}, {windows} windows, {tokens} tokens, width {width}"
        x = _draw(7, device, windows, tokens, width).to(dtype).requires_grad_()
        q, k, v = (layer(10 * i, width, width) for i in range(1, 4))
        leaves = [x, *(tensor for made in (q, k, v) for tensor in made[0][7:10])]
        check(
            "qlora_qkv", where, partial(module.qlora_qkv, x, q[0], k[0], v[0]),
            lambda x, *rest, made=(q, k, v): tuple(plain(x, m, rest[3 * i : 3 * i + 3]) for i, m in enumerate(made)),
            leaves,
        )  # fmt: skip
        fc1, fc2 = layer(50, width, inner), layer(60, inner, width)
        leaves = [x, *(tensor for made in (fc1, fc2) for tensor in made[0][7:10])]
        check(
            "qlora_mlp", f"{where}, inner {inner}", partial(module.qlora_mlp, x, fc1[0], fc2[0]),
            lambda x, *rest, made=(fc1, fc2): plain(F.gelu(plain(x, made[0], rest[:3])), made[1], rest[3:]), leaves,
        )  # fmt: skip
        if module is not eager:
            continue
        heads = 6 if width % 6 == 0 else 4
        split = [_draw(70 + i, device, windows, tokens, width).requires_grad_() for i in range(3)]

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int = heads) -> Tensor:
            parts = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
            return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(-2)

        check(
            "attention",
            f"{where}, {heads} heads",
            partial(eager.attention, split[0], split[1], split[2], heads),
            attend,
            split,
        )


def _outputs(results: Any, leaves: list[Tensor], rounded: torch.dtype) -> list[Tensor]:
    """The results and the gradients of ``leaves``, of a sum of all results with weights that ``rounded`` has."""
    outputs = _listed(results)
    weights = [_draw(90 + i, y.device, *y.shape).to(rounded).to(y.dtype) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def _encoder(tester: _Tester) -> None:
    """A whole encoder in one call, inference and the gradient, against its modules in float64 with dense weights."""
    encoder, exact = (each.to(tester.device) for each in _encoders())
    for windows in (1, 5):
        where = f"float32, {windows} windows of an encoder"
        x = _draw(8, tester.device, windows, ENCODER.window, ENCODER.channels)
        same = x.double().requires_grad_()
        x.requires_grad_()
        right = _trained(exact, same)
        with torch.no_grad():
            tokens = tester.attempt("encoder", where, partial(encoder, x))
        training = tester.attempt("encoder", where, partial(_trained, encoder, x))
        for kind, results in (("inference", [] if tokens is None else [tokens]), ("training", training or [])):
            for what, found, wanted in zip(("the tokens", "the gradient"), results, right, strict=False):
                # Six blocks, each of which rounds a dozen times. In float32 its modules would be served by kernels.
                allowed = 1e-4 * float(wanted.abs().max())
                tester.compare("encoder", f"in {kind} {what}", where, found, wanted, allowed)


def _trained(module: Any, x: Tensor) -> list[Tensor]:
    return _outputs(module(x), [x], torch.float32)


def _encoders() -> tuple[Any, Any]:
    """A 4-bit encoder with adapters, and the same in float64 with dense weights, the adapters merged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = MAE(ENCODER).encoder.eval()
        encoder = harlora.apply_qlora(copy.deepcopy(base), TARGETS, rank=8, alpha=8)
    exact = copy.deepcopy(base).double()
    for number, (path, layer) in enumerate(encoder.named_modules()):
        if isinstance(layer, harlora.QLoRALinear):
            linear: Any = exact.get_submodule(path)
            A: Any = layer.lora_A
            B: Any = layer.lora_B
            with torch.no_grad():
                B.copy_(0.1 * _draw(number, B.device, *B.shape))
                linear.weight.copy_(layer.base_weight().double() + layer.scaling * B.double() @ A.double())
    return encoder, exact


@torch.no_grad()
def _precisions(tester: _Tester) -> None:
    """Inference in fewer bits: no value further off than `inference_precision` promises."""
    for precision, (rows, in_features, out_features) in itertools.product(
        [name for name in cpp.precisions() if name != "float32"], ((64, 192, 768), (5, 4096, 33), (9, 64, 70))
    ):
        operator = f"qlora_linear in {precision}"
        where = f"{rows} rows, {in_features}→{out_features}"
        x, weight = _draw(2, tester.device, rows, in_features), _draw(1, tester.device, out_features, in_features)
        packed = harlora.quantize_4bit(weight)
        dense = reference.dequantize_4bit(
            packed.packed, packed.absmax, None, None, "nf4", 64, (out_features, in_features), torch.float64
        )
        size, magnitude = x.double().abs(), dense.abs()
        if precision == "bfloat16":  # each factor is within 2⁻⁹ of its value, so each product within 2⁻⁸
            allowed = 2**-8 * size @ magnitude.T
        else:
            scales = packed.absmax.double().repeat_interleave(64).view_as(magnitude)
            largest = size.view(rows, -1, 64).amax(-1).repeat_interleave(64, -1)
            allowed = (size @ scales.T + largest @ (magnitude + scales / 254).T) / 254
        with harlora.inference_precision(precision):
            found = tester.attempt(operator, where, partial(harlora.qlora_linear, x, packed))
        if found is not None:
            tester.compare(operator, "y", where, found, x.double() @ dense.T, 1.01 * allowed + 1e-4)


# Tuning -------------------------------------------------------------------------------------------------------------


def tune(device: torch.device, problems: list[Problem], report: Report | None = None) -> dict[str, Any]:
    """Measures which kernels and backends are fastest on ``device``, and writes the user's dispatch table.

    The order of the table changes only where another is faster by more than 3 % in the geometric mean of its cases, and
    what the self-test found wrong (``problems``) takes no part. Returns the table.
    Raises: ValueError if tables are switched off.
    """
    file = tuning.path()
    if file is None:
        raise ValueError(f"{tuning.ENVIRONMENT}=0 switches tables off; unset it to tune")
    table: dict[str, Any] = {
        "build": tuning.build(cpp.extension_path()), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": torch.get_num_threads(), "order": {}, "measured": {},
    }  # fmt: skip
    wrong = " ".join(each.problem for each in problems)
    jobs = [(operator, dtype) for operator in dispatch.OPERATORS for dtype in cpp.DTYPES]
    variants = []
    if device.type == "cpu" and not cpp.load_extension():
        variants = [name for name, why in _variants().items() if not why and f"cpp {name} on" not in wrong]
    for done, (operator, dtype) in enumerate(jobs):
        if report is not None:
            report(done, len(jobs) + 1, operator)
        known = [
            backend
            for backend in dispatch.backends(operator)
            if not backend.on_request and not dispatch.refusal(operator, backend, device, dtype)
            and f"backend {backend.name}" not in wrong
        ]  # fmt: skip
        if len(known) < 2:
            continue
        cases = _tuning_cases(operator, device, dtype)
        ratios = _compare(
            {backend.name: [partial(backend.function, *case) for case in cases] for backend in known}, device
        )
        title = f"{operator} {str(dtype).removeprefix('torch.')}"
        table["measured"][title] = ratios
        table["order"][title] = _faster_first([backend.name for backend in known], ratios)
    if len(variants) > 1:
        if report is not None:
            report(len(jobs), len(jobs) + 1, "CPU kernels")
        with _kernels_kept():
            default = os.environ.get(cpp.ENVIRONMENT) or cpp.select_kernels()
            variants.sort(key=lambda name: name != default)
            calls = _variant_calls(device)
            ratios = _compare({name: [partial(_with_kernels, name, c) for c in calls] for name in variants}, device)
        table["measured"]["CPU kernels"] = ratios
        table["kernels"] = _faster_first(variants, ratios)[0]
    if device.type == "cuda" and not dispatch.load_triton():
        configure.compile_ahead(device, report)
        rules, times = configure.measure(device, report)
        sizes = (ENCODER.tokens, ENCODER.heads, ENCODER.width, ENCODER.ffn, ENCODER.depth)
        of_encoders, times_of_encoders = configure.measure_encoders(device, sizes, report)
        measured = [*times, *times_of_encoders]
        table |= {"triton": configurations.fingerprint(), "configurations": rules | of_encoders, "times": measured}
        table["measured"] |= configure.gain(device, measured)
    try:
        devices = tuning.read(file)
    except ValueError:
        devices = {}  # of no use to anyone
    write_json(file, {"format": tuning.FORMAT, "devices": {**devices, tuning.device_name(device.type): table}})
    return table


def _tuning_cases(operator: str, device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    sizes = ((1, 192, 192), (64, 192, 768), (512, 192, 768), (64, 1024, 1024))
    return [dispatch.problem(operator, device, dtype, *size, 16, "nf4", 64, False) for size in sizes]


def _variant_calls(device: torch.device) -> list[Callable[[], object]]:
    encoder, _ = _encoders()
    return [
        *(
            partial(getattr(cpp, operator), *case)
            for operator in ("qlora_linear", "qlora_linear_backward")
            for case in _tuning_cases(operator, device, torch.float32)
        ),
        *(partial(torch.no_grad()(encoder), _draw(5, device, windows, 128, 6)) for windows in (1, 16)),
    ]


def _with_kernels(name: str, call: Callable[[], object]) -> None:
    cpp.select_kernels(name)
    call()


def _compare(
    competitors: dict[str, list[Callable[[], object]]], device: torch.device, rounds: int = 11
) -> dict[str, float]:
    """The time of each over that of the first, the geometric mean over their calls, who take turns."""
    logs: dict[str, list[float]] = {name: [] for name in competitors}
    for calls in zip(*competitors.values(), strict=True):
        times: dict[str, list[float]] = {name: [] for name in competitors}
        for number in range(rounds + 1):
            for name, call in zip(competitors, calls, strict=True):
                began, count = time.perf_counter(), 0
                while count == 0 or time.perf_counter() - began < 5e-4:
                    call()
                    count += 1
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:  # the first warms up
                    times[name].append((time.perf_counter() - began) / count)
        first = statistics.median(times[next(iter(times))])
        for name in competitors:
            logs[name].append(statistics.median(times[name]) / first)
    return {name: round(statistics.geometric_mean(values), 4) for name, values in logs.items()}


def _faster_first(names: list[str], ratios: dict[str, float]) -> list[str]:
    """``names`` by their times, except that the first stays first unless another is faster beyond the noise."""
    best = min(names, key=lambda name: ratios[name])
    first = best if ratios[names[0]] > FASTER * ratios[best] else names[0]
    return [first, *sorted((name for name in names if name != first), key=lambda name: ratios[name])]
