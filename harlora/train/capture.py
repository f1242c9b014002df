"""A training step of static shapes as one CUDA graph: forward, backward, clipping and the optimiser, launched at once.

A graph repeats the kernels it has seen, on the same addresses. What may change from step to step therefore lives in
tensors that are written in place: the batch, the learning rate, random numbers' state. How PyTorch wants it captured:
https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harlora.errors import InputError
from harlora.nn.linear import QLoRALinear

Capture = Literal["auto", "on", "off"]

_WARM_UPS = 3  # as in PyTorch's notes; Triton's kernels are compiled and checked against the reference in the first


def captures(capture: Capture, device: torch.device) -> bool:
    """Whether training steps on ``device`` are captured: ``"auto"`` does so on every CUDA device.

    Raises: InputError if ``"on"`` is asked for on another device.
    """
    if capture not in ("auto", "on", "off"):
        raise InputError(f"capture must be one of auto, on, off; got {capture!r}")
    if capture == "on" and device.type != "cuda":
        raise InputError(f"capture: on requires a CUDA device, got {device}; use auto or off")
    return capture != "off" and device.type == "cuda"


class TrainingStep:
    """A training step: loss, backward, clipping of the gradients' norm, optimiser.

    With ``capture`` the first call captures all of it into one CUDA graph, and calls with a batch of the same shapes
    and dtypes replay that. Another batch, such as an epoch's last, takes the same step eagerly; both kinds work on the
    same parameters, buffers and state of the optimiser and may alternate. They agree within rounding, random numbers
    included. After a change of what decides the step (tensors of the model replaced, its mode, the optimiser's state or
    settings) it is captured anew.

    model: on one device; holds all that the step changes, the optimiser's state aside. Its modules, and which of their
        parameters train, must stay the same.
    loss: a scalar, of a batch's tensors. In a graph it is called while capturing alone, so it must not wait for the
        device (``.item()``, ``.cpu()``), copy from the host, or depend on numbers of Python's that change later.
        Autocast, if wanted, is opened within it.
    optimizer: to be captured, Adam or AdamW with ``capturable=True`` and, in every group, a learning rate that is a
        tensor on the model's device. Schedulers of torch change that in place.
    clip_norm: the most that the norm of all gradients together may be; None leaves them.
    generators: on the model's device, those that ``loss`` draws from beside torch's own.
    Raises: ValueError or TypeError if ``capture`` is asked for and the model or the optimiser does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        capture: bool = False,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._model = model
        self._loss = loss
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._generators = generators
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # Going through the modules in each step would take a quarter of a millisecond.
        self._places = [
            (held, name)
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for name in held
        ]
        self._device = next(model.parameters()).device
        self._capture = capture
        if capture:
            _require_capturable(optimizer, self._device)
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []  # of the batches that are replayed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._facts: list[Any] = []
        # What the graph reads and writes by address: not freed while the graph lives.
        self._inputs: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._result: Tensor | None = None
        self._settings: list[Any] = []

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of ``batch``, before the step that is taken on it; a scalar on the device, without gradient.

        The next replay writes it over: ``.item()`` or a clone keeps it. Nothing waits for the device, so pinned memory
        in ``batch`` must not be written to until it has been read.
        """
        if not self._capture:
            return self._step(self._moved(batch))
        kinds = [(tensor.shape, tensor.dtype) for tensor in batch]
        if not self._kinds:
            self._kinds = kinds
        if kinds != self._kinds:
            return self._step(self._moved(batch))
        if self._graph is None or self._facts != self._found():
            self._record(batch)
        assert self._graph is not None
        assert self._result is not None
        for static, tensor in zip(self._inputs, batch, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        parameter, gradient = self._gradients[0]
        if parameter.grad is not gradient:  # after an eager step or zero_grad
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        return self._result

    def _moved(self, batch: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.to(self._device, non_blocking=True) for tensor in batch]

    def _step(self, batch: Sequence[Tensor]) -> Tensor:
        loss = self._loss(*batch)
        self._optimizer.zero_grad()  # to None: a captured backward then writes gradients instead of adding to them
        loss.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        # Without its graph: a node of it that lived on would tie the parameters to the stream of this step.
        return loss.detach()

    def _found(self) -> list[Any]:
        """What decides the captured step, as it is now: where tensors are, and numbers that the graph keeps."""
        return [
            self._model.training,
            *[0 if (tensor := held.get(name)) is None else tensor.data_ptr() for held, name in self._places],
            *map(id, self._replaceable()),
            *[group[name] for group in self._optimizer.param_groups for name in ("betas", "eps", "weight_decay")],
        ]

    def _replaceable(self) -> list[Any]:
        """What loading a state into the optimiser replaces."""
        return [self._optimizer.state, *[group["lr"] for group in self._optimizer.param_groups]]

    def _record(self, batch: Sequence[Tensor]) -> None:
        _require_capturable(self._optimizer, self._device)
        if torch.is_autocast_enabled(self._device.type):
            raise RuntimeError(
                "TrainingStep: capturing must not happen under autocast, whose cache of cast weights the graph would "
                "read for ever; open autocast within loss"
            )
        self._graph, self._result, self._gradients = None, None, []  # frees an earlier graph's memory
        with torch.cuda.device(self._device):
            self._inputs = [tensor.to(self._device, copy=True) for tensor in batch]
            stream, graph = torch.cuda.Stream(self._device), torch.cuda.CUDAGraph()
            for generator in self._generators:
                graph.register_generator_state(generator)
            drawn = torch.get_rng_state()
            with unchanged(self._model, self._optimizer, self._device, self._generators):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream), warnings.catch_warnings():
                    # Of torch, to whom has a capturable optimiser and does not capture.
                    warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)
                    for _ in range(_WARM_UPS):
                        self._step(self._inputs)
                torch.cuda.current_stream().wait_stream(stream)
                if not torch.equal(drawn, torch.get_rng_state()):
                    raise RuntimeError(
                        "TrainingStep: loss draws from the CPU's random numbers, which a graph would repeat in every "
                        "step; draw on the device, or beforehand and give it in the batch"
                    )
            self._optimizer.zero_grad()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    result = self._step(self._inputs)
            except RuntimeError as error:
                raise RuntimeError(
                    f"TrainingStep: the step cannot be captured ({error}); loss must neither wait for the device nor "
                    "copy from the host. capture=False, --capture off on the command line, takes it eagerly"
                ) from error
        self._graph, self._result, self._facts = graph, result, self._found()
        self._settings = self._replaceable()  # held, so that nothing else gets their ids
        self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]


@contextmanager
def unchanged(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    generators: Sequence[torch.Generator] = (),
) -> Iterator[None]:
    """Steps taken within ``with`` leave everything as it was, bit for bit, and tensors where they are in memory.

    That is parameters with gradient, buffers, the optimiser's state, gradients, the random numbers of the CPU, of
    ``device`` and of ``generators``. State that the optimiser made within becomes zero, which is what Adam begins with.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Buffers of all kinds: BatchNorm writes its statistics without counting up their version.
    # Weights in 4 bits, which nothing writes, are buffers too, and copies of all of them would be a second model.
    buffers = [b for m in model.modules() if not isinstance(m, QLoRALinear) for b in m.buffers(recurse=False)]
    kept = [(tensor, tensor.detach().clone()) for tensor in (*parameters, *buffers)]
    before = {
        id(value): value.clone()
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    }
    gradients = [parameter.grad for parameter in parameters]
    states = [generator.get_state() for generator in generators]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        for parameter in parameters:  # put back by reference, so nothing may be added to them
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
            for entry in optimizer.state.values():
                for value in entry.values():
                    if isinstance(value, Tensor):
                        value.copy_(before[id(value)]) if id(value) in before else value.zero_()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _require_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"TrainingStep: capture requires a model on a CUDA device, got {device}; use capture=False")
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        # Another's state may begin with something else than the zeros that `unchanged` leaves.
        raise TypeError(f"TrainingStep: optimizer must be Adam or AdamW to be captured, got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        rate = group["lr"]
        if not group["capturable"]:
            raise ValueError("TrainingStep: optimizer must be made with capturable=True to be captured, got False")
        if not isinstance(rate, Tensor) or rate.device != device:
            raise ValueError(
                f"TrainingStep: lr of the optimizer must be a tensor on {device}, got {rate!r}; the graph would keep a "
                "number for ever. Give lr=torch.tensor(..., device=...), and write to it in place"
            )
