"""A training step as one CUDA graph: the same numbers as a plain loop, and nothing changed by warming up.

Without a GPU the calls of torch.cuda are replaced by ones that keep a log and replay by taking the captured step again
on the graph's own tensors, so that the way from warm-up to replay runs all the same.
"""

import copy
import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harlora.bench import cases, peers
from harlora.errors import InputError
from harlora.models import MAE, Classifier, MAEConfig
from harlora.nn import QLoRALinear, apply_qlora
from harlora.train import capture
from harlora.train.capture import TrainingStep, captures, unchanged
from harlora.train.fit import Optimisation, fit

# `make gpu` runs this file with few packages: nothing here may import the command line or the data.
CPU = torch.device("cpu")
MODEL = MAEConfig(
    patch_size=16, width=24, depth=2, heads=2, ffn=48,
    decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_ffn=32,
)  # fmt: skip
SIZES = (16, 16, 16, 9, 16, 16, 9, 16)  # windows a step; the smaller ones are no replays


class Thinned(nn.Module):
    """Dropout whose random numbers come from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def __deepcopy__(self, memo):
        return Thinned()

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.generator) > 0.3) / 0.7 if self.training else x


def small_model(dropout=None):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), dropout or Thinned(), QLoRALinear(16, 3, rank=2)
    )


def small_optimizer(model, **options):
    settings = {"lr": torch.tensor(1e-2), "weight_decay": 0.1, "fused": True, "capturable": True}
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings | options)


def schedule_of(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1, cycle_momentum=False)


def batches(sizes=SIZES):
    generator = torch.Generator().manual_seed(2)
    for size in sizes:
        yield torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def loss_of(model):
    return lambda x, labels: F.cross_entropy(model(x), labels, label_smoothing=0.1)


def everything(model, optimizer):
    """All that a step may change, by name."""
    found = dict(model.state_dict())
    for number, entry in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in entry.items()}
    found |= {f"lr {i}": torch.as_tensor(group["lr"]) for i, group in enumerate(optimizer.param_groups)}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def plain_loop(model, optimizer, schedule, clip_norm):
    """The loop as everyone writes it: losses, and all that it changed."""
    losses = []
    loss_function = loss_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for x, labels in batches():
        loss = loss_function(x, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, everything(model, optimizer)


class Cuda:
    """Stands in for torch.cuda: ``log`` has what was asked of it, in order; ``graphs`` all that were made."""

    def __init__(self, monkeypatch):
        self.log = []
        self.graphs = []
        self.capturing = None
        self.fails = False
        original = TrainingStep._step
        stand_in = self

        def step(training, batch):
            stand_in.log.append(f"step of {len(batch[0])}")
            result = original(training, batch)
            if stand_in.capturing is not None:
                stand_in.capturing.captured = (training, batch, result)
            return result

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                stand_in.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def __init__(self):
                self.captured = None
                self.registered = []
                stand_in.graphs.append(self)

            def register_generator_state(self, generator):
                self.registered.append(generator)

            def replay(self):
                training, batch, result = self.captured
                stand_in.log.append("replay")
                before = [(p, p.grad) for p in training._parameters]
                result.copy_(original(training, batch))
                for (parameter, gradient), (same, written) in zip(before, self.gradients, strict=True):
                    assert parameter is same
                    written.copy_(parameter.grad)  # by address; what p.grad is now, a graph does not care
                    parameter.grad = gradient

        current = Stream("current")

        @contextmanager
        def on(stream):
            stand_in.log.append(f"on {stream.name}")
            yield
            stand_in.log.append(f"off {stream.name}")

        @contextmanager
        def graph(captured, *, stream):
            stand_in.log.append(f"capture on {stream.name}")
            if stand_in.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            stand_in.capturing = captured
            # Nothing runs while it is captured: its effects are taken back. Gradients are there from then on.
            training = stand_in.training
            assert all(p.grad is None for p in training._parameters)
            with unchanged(training._model, training._optimizer, CPU, training._generators):
                yield
                captured.gradients = [(p, p.grad) for p in training._parameters]
            for parameter, gradient in captured.gradients:
                parameter.grad = gradient
            stand_in.capturing = None
            stand_in.log.append("captured")

        for name, value in {
            "Stream": lambda device: Stream(), "CUDAGraph": Graph, "current_stream": lambda: current, "stream": on,
            "graph": graph, "device": lambda device: nullcontext(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(TrainingStep, "_step", step)
        monkeypatch.setattr(capture, "_require_capturable", lambda optimizer, device: None)
        record = TrainingStep._record

        def recorded(training, batch):
            stand_in.training = training
            record(training, batch)

        monkeypatch.setattr(TrainingStep, "_record", recorded)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


WARMED = [
    "side waits for current", "on side", *3 * ["step of 16"], "off side", "current waits for side", "capture on side",
    "step of 16", "captured",
]  # fmt: skip


# On CPUs


@pytest.mark.parametrize("clip_norm", [0.05, 1e9])
def test_an_eager_step_is_that_of_a_plain_loop(clip_norm):
    model = small_model(nn.Dropout(0.3))
    other = copy.deepcopy(model)
    optimizer, rates = (small_optimizer(m, lr=1e-2, capturable=False) for m in (model, other))
    schedule = schedule_of(rates, len(SIZES))
    torch.manual_seed(3)
    expected = plain_loop(model, optimizer, schedule_of(optimizer, len(SIZES)), clip_norm)
    torch.manual_seed(3)
    step = TrainingStep(other, loss_of(other), rates, clip_norm=clip_norm)
    losses = []
    for batch in batches():
        loss = step(*batch)
        assert not loss.requires_grad
        losses.append(loss.item())
        schedule.step()
    assert losses == expected[0]
    assert_same(everything(other, rates), expected[1])


@pytest.mark.parametrize("steps_before", [0, 3])
def test_warming_up_leaves_everything_as_it_was(steps_before):
    dropped, generator = nn.Dropout(0.3), torch.Generator().manual_seed(7)
    model = small_model(dropped)
    optimizer = small_optimizer(model)
    step = TrainingStep(model, loss_of(model), optimizer)
    for batch in batches(steps_before * [16]):
        step(*batch)
    before = everything(model, optimizer)
    places = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    cpu, own = torch.get_rng_state(), generator.get_state()
    with unchanged(model, optimizer, CPU, [generator]):
        loss_of(model)(*next(batches())).backward()
        for batch in batches([16, 9]):
            torch.rand(3, generator=generator)
            step(*batch)
        assert not torch.equal(before["1.running_mean"], model[1].running_mean)
        assert not torch.equal(before["0.weight"], model[0].weight)
    assert torch.equal(cpu, torch.get_rng_state())
    assert torch.equal(own, generator.get_state())
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == places
    for parameter, (gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    after = everything(model, optimizer)
    for name in after.keys() - before.keys():  # what Adam makes in its first step, and begins it with
        assert not steps_before
        assert not after.pop(name).any(), name
    assert_same(after, before)


def test_a_capture_that_is_not_possible_is_refused():
    assert not captures("auto", CPU)
    assert not captures("off", torch.device("cuda"))
    assert captures("auto", torch.device("cuda", 1))
    with pytest.raises(InputError, match="capture: on requires a CUDA device, got cpu; use auto or off"):
        captures("on", CPU)
    with pytest.raises(InputError, match="capture must be one of auto, on, off; got 'yes'"):
        captures("yes", CPU)
    model = small_model()
    with pytest.raises(ValueError, match="capture requires a model on a CUDA device, got cpu; use capture=False"):
        TrainingStep(model, loss_of(model), small_optimizer(model), capture=True)


class Renamed:
    """The CPU, saying that it is a CUDA device."""

    type = "cuda"
    __hash__ = None

    def __eq__(self, other):
        return other == CPU


def test_an_optimizer_that_does_not_fit_a_graph_is_refused():
    parameters = list(nn.Linear(2, 2).parameters())
    cuda = Renamed()
    for optimizer, error, message in (
        (torch.optim.SGD(parameters), TypeError, "must be Adam or AdamW to be captured, got SGD"),
        (torch.optim.AdamW(parameters), ValueError, "made with capturable=True to be captured, got False"),
        (torch.optim.AdamW(parameters, lr=0.1, capturable=True), ValueError, "lr of the optimizer must be a tensor on"),
    ):
        with pytest.raises(error, match=message):
            capture._require_capturable(optimizer, cuda)
    fitting = torch.optim.AdamW(parameters, lr=torch.tensor(0.1), capturable=True)
    capture._require_capturable(fitting, cuda)


# With stand-ins for torch.cuda


def test_a_replayed_step_is_that_of_a_plain_loop(cuda):
    model = small_model()
    other = copy.deepcopy(model)
    optimizer = small_optimizer(model)
    expected = plain_loop(model, optimizer, schedule_of(optimizer, len(SIZES)), 0.05)
    optimizer = small_optimizer(other)
    schedule = schedule_of(optimizer, len(SIZES))
    generator = other[3].generator
    step = TrainingStep(other, loss_of(other), optimizer, clip_norm=0.05, capture=True, generators=[generator])
    losses = []
    places = set()
    for batch in batches():
        loss = step(*batch)
        assert not loss.requires_grad
        places |= {loss.data_ptr()} if len(batch[0]) == 16 else set()
        losses.append(loss.item())
        schedule.step()
    assert losses == expected[0]
    assert_same(everything(other, optimizer), expected[1])
    assert cuda.log == [*WARMED, *(f"step of {size}" if size == 9 else "replay" for size in SIZES)]
    (graph,) = cuda.graphs
    assert graph.registered == [generator]
    assert len(places) == 1


def test_gradients_that_the_graph_writes_outlive_zero_grad_and_eager_steps(cuda):
    model = small_model()
    optimizer = small_optimizer(model)
    step = TrainingStep(model, loss_of(model), optimizer, capture=True)
    first, second, third, fourth = batches([16, 9, 16, 16])
    step(*first)
    written = [p.grad for p in step._parameters]
    step(*second)
    assert all(p.grad is not gradient for p, gradient in zip(step._parameters, written, strict=True))
    step(*third)
    assert all(p.grad is gradient for p, gradient in zip(step._parameters, written, strict=True))
    optimizer.zero_grad()
    step(*fourth)
    assert all(p.grad is gradient for p, gradient in zip(step._parameters, written, strict=True))
    assert cuda.log == [*WARMED, "replay", "step of 9", "replay", "replay"]


def test_what_is_replaced_is_captured_anew(cuda):
    model = small_model()
    optimizer = small_optimizer(model)
    step = TrainingStep(model, loss_of(model), optimizer, capture=True)
    batch, smaller = batches([16, 9])
    step(*batch)
    state, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    def halved():
        optimizer.param_groups[0]["weight_decay"] /= 2

    changes = (
        lambda: model.load_state_dict(state),  # the 4-bit layer's buffers are new ones
        lambda: optimizer.load_state_dict(saved),
        halved,
        model.eval,
        lambda: model.double().float(),  # the same values elsewhere
    )
    for number, change in enumerate(changes, start=2):
        change()
        step(*smaller)  # of another size: no occasion to capture
        assert len(cuda.graphs) == number - 1
        step(*batch)
        step(*batch)
        assert len(cuda.graphs) == number
        assert cuda.log[-len(WARMED) - 2 :] == [*WARMED, "replay", "replay"]


def test_a_loss_that_no_graph_can_hold_is_named(cuda):
    (batch,) = batches([16])
    model = small_model(nn.Dropout(0.3))  # whose numbers are the CPU's here
    before = everything(model, small_optimizer(model))
    step = TrainingStep(model, loss_of(model), small_optimizer(model), capture=True)
    with pytest.raises(RuntimeError, match="loss draws from the CPU's random numbers, which a graph would repeat"):
        step(*batch)
    assert_same(everything(model, small_optimizer(model)), before)
    model = small_model()
    step = TrainingStep(model, loss_of(model), small_optimizer(model), capture=True)
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="must not happen under autocast"):
        step(*batch)
    cuda.fails = True
    with pytest.raises(RuntimeError, match=r"cannot be captured \(operation not permitted .*--capture off .* takes it"):
        step(*batch)
    cuda.fails = False
    assert step(*batch).isfinite()


class KilledError(Exception):
    pass


def fitted(state_file, *, captured, device=CPU, stop_after=None, epochs=4):
    torch.manual_seed(1)
    x = torch.randn(90, 5)
    y = (x.sum(dim=1) > 0).long()
    # Without a bias before BatchNorm: its gradient is nothing but rounding, which Adam would blow up.
    model = nn.Sequential(nn.Linear(5, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), QLoRALinear(16, 2, rank=2)).to(
        device
    )

    def report(done, total, note):
        if done == stop_after:
            raise KilledError

    result = fit(
        model,
        lambda indices: (x[indices] + 0.1 * torch.randn(len(indices), 5), y[indices]),
        lambda noisy, truth: F.cross_entropy(model(noisy), truth),
        torch.arange(70),
        Optimisation(epochs, 16, 1e-2, 0.01),
        seed=3,
        identity="a",
        state_file=state_file,
        capture=captured,
        validate=lambda: float((model(x[70:].to(device)).argmax(1).cpu() == y[70:]).float().mean()),
        report=report,
        save_every_s=0.0,
    )
    return model, result


def test_the_loop_trains_with_captured_steps(cuda, tmp_path):
    model, result = fitted(tmp_path / "captured", captured=True)
    assert cuda.log == [*WARMED, *4 * 20 * ["replay"]]
    eager, expected = fitted(tmp_path / "eager", captured=False)
    # The learning rate is rounded to float32 where it is a tensor.
    torch.testing.assert_close(model.state_dict(), eager.state_dict())
    for one, other in zip(result.history, expected.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.usefixtures("cuda")
def test_a_killed_training_with_captured_steps_goes_on_to_the_same_result(tmp_path):
    expected, undisturbed = fitted(tmp_path / "undisturbed", captured=True)
    with pytest.raises(KilledError):
        fitted(tmp_path / "state", captured=True, stop_after=47)
    model, resumed = fitted(tmp_path / "state", captured=True)
    assert resumed.history == undisturbed.history
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))


# On a GPU

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
GPU_SIZES = (32, 32, 32, 20, 32, 32, 20, 32, 32)


def classifier(dropout=0.2):
    torch.manual_seed(1)
    model = Classifier(MAE(MODEL).encoder, 4, dropout=dropout)
    model.encoder.requires_grad_(False)
    apply_qlora(model.encoder, ("q", "k", "v", "o", "fc1", "fc2"), rank=4, alpha=8)
    for name, parameter in model.encoder.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model.to("cuda").train()


def windows_of(sizes):
    generator = torch.Generator().manual_seed(2)
    for size in sizes:
        yield (
            torch.randn(size, MODEL.window, MODEL.channels, generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )


def trained_on_gpu(*, captured, generator=None):
    """Losses, all that the steps changed, and the device's random numbers' state."""
    model = classifier()
    rate = torch.tensor(1e-2, device="cuda") if captured else 1e-2
    # Some gradients are zero but for rounding (of a bias before BatchNorm); with a usual eps Adam would blow them up.
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, eps=1e-2, fused=True, capturable=captured)
    schedule = schedule_of(optimizer, len(GPU_SIZES))

    def loss(x, labels):
        if generator is not None:
            x = x + 0.1 * torch.randn(x.shape, device=x.device, generator=generator)
        return F.cross_entropy(model(x), labels, label_smoothing=0.1)

    generators = [] if generator is None else [generator.manual_seed(11)]
    step = TrainingStep(model, loss, optimizer, clip_norm=0.5, capture=captured, generators=generators)
    torch.manual_seed(4)
    losses = []
    for batch in windows_of(GPU_SIZES):
        losses.append(step(*batch).item())
        schedule.step()
    return losses, everything(model, optimizer), torch.cuda.get_rng_state()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("own_generator", [False, True])
def test_captured_steps_are_those_of_an_eager_loop_on_a_gpu(own_generator):
    generator = torch.Generator("cuda") if own_generator else None
    eager, again = (trained_on_gpu(captured=False, generator=generator) for _ in range(2))
    captured = trained_on_gpu(captured=True, generator=generator)
    # Twice what two eager runs differ by, plus torch's default for float32: some of its kernels add in any order.
    for one, other, same in zip(captured[0], eager[0], again[0], strict=True):
        assert abs(one - other) <= 2 * abs(other - same) + 1e-5 + 1.3e-6 * abs(other)
    assert captured[1].keys() == eager[1].keys()
    for name, value in captured[1].items():
        other, same = (run[1][name].to(value.device, value.dtype) for run in (eager, again))
        if not value.is_floating_point():
            assert torch.equal(value, other), name
            continue
        allowed = 2 * (other - same).abs().max() + 1e-5 + 1.3e-6 * other.abs().max()
        assert (value - other).abs().max() <= allowed, name
    # As many random numbers were drawn, none of them by warming up.
    assert torch.equal(captured[2], eager[2])


@pytest.mark.gpu
@NEEDS_GPU
def test_every_replay_draws_new_numbers_on_a_gpu():
    model = classifier(dropout=0.5)
    rate = torch.tensor(0.0, device="cuda")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, fused=True, capturable=True
    )
    step = TrainingStep(model, lambda x, labels: F.cross_entropy(model(x), labels), optimizer, capture=True)
    (batch,) = windows_of([32])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = [step(*batch).item() for _ in range(5)]
    assert len(set(losses)) == 5
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter), name  # the learning rate is 0
    rate.fill_(1e-2)
    step(*batch)
    assert not torch.equal(before["head.4.weight"], model.head[4].weight)


@pytest.mark.gpu
@NEEDS_GPU
def test_the_loss_of_the_masked_autoencoder_is_captured_on_a_gpu():
    losses = {}
    for captured in (False, True):
        torch.manual_seed(1)
        model = MAE(MODEL).to("cuda").train()
        rate = torch.tensor(1e-3, device="cuda") if captured else 1e-3
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, eps=1e-2, fused=True, capturable=captured)
        step = TrainingStep(model, lambda x, model=model: model(x)[0], optimizer, clip_norm=1.0, capture=captured)
        torch.manual_seed(4)
        losses[captured] = [step(x).item() for x, _ in windows_of(GPU_SIZES)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert all(one != other for one, other in itertools.pairwise(losses[True]))


@pytest.mark.gpu
@NEEDS_GPU
def test_the_loop_trains_with_captured_steps_on_a_gpu(tmp_path):
    device = torch.device("cuda")
    eager, captured = (fitted(tmp_path / str(on), captured=on, device=device)[1].history for on in (False, True))
    for one, other in zip(captured, eager, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
    undisturbed = captured
    with pytest.raises(KilledError):
        fitted(tmp_path / "state", captured=True, device=device, stop_after=47)
    resumed = fitted(tmp_path / "state", captured=True, device=device)[1].history
    for one, other in zip(resumed, undisturbed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.gpu
@NEEDS_GPU
def test_the_bench_measures_a_captured_step_that_is_right_on_a_gpu():
    names = ("harlora", "harlora captured")
    (case,) = cases.Plan((), ("A",), (), names).cases(torch.device("cuda"), 0)
    assert tuple(case.contenders) == names
    for name, make in case.contenders.items():
        contender = make()
        assert contender.relative_error < peers.error_limit(name, torch.bfloat16)
        contender.call()
