"""Training, resuming, adapting and the leave-one-dataset-out study, on small synthetic data."""

import gc
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from needs import needs_extension
from torch import nn

from harlora.data import load_windows, split
from harlora.errors import InputError
from harlora.models import MAE
from harlora.nn import QLoRALinear, adapted_layers, apply_adapter
from harlora.nn.adapters import Statistics
from harlora.nn.apply import penalty, schedule
from harlora.report.compare import macro_f1_of_confusion
from harlora.report.tables import has_memory
from harlora.train import memory, runs
from harlora.train.federated import aggregate
from harlora.train.finetune import METHODS, FinetuneConfig, build_classifier, finetune, load_classifier, method_bytes
from harlora.train.fit import Optimisation, fit, make_optimizer
from harlora.train.lodo import Study
from harlora.train.memory import held_bytes, step_bytes, step_peak_bytes
from harlora.train.metrics import macro_f1, scores
from harlora.train.pretrain import load_pretrained, pretrain, thinned
from harlora.train.sampler import QualitySampler
from small import FINETUNE, MODEL, PRETRAIN

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    empty, cache = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("cache")
    return [load_windows(f"synthetic_{letter}", empty, cache) for letter in "abc"]


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    return pretrain(PRETRAIN, data[1:], tmp_path_factory.mktemp("runs"), device=CPU)


@pytest.fixture
def pretrained(checkpoint):
    return load_pretrained(checkpoint)


# The loop


class KilledError(Exception):
    pass


def toy_training(
    state_file, *, stop_after=None, dropout=0.3, validate=True, epochs=6, identity="a", adapter="", **options
):
    torch.manual_seed(1)
    x = torch.randn(90, 5)
    y = (x.sum(dim=1) > 0).long()
    last = nn.Linear(16, 2) if adapter else QLoRALinear(16, 2, rank=2)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), last)
    if adapter:
        seen = {path: Statistics(torch.ones(1), torch.ones(1), 1.0) for path in "04"}
        apply_adapter(model, adapter, ["0", "4"], rank=2, statistics=seen)
    steps = 0

    raised = penalty(model)
    sampler = QualitySampler(torch.arange(70), 0.9, (1, 1, 1, 1)) if adapter == "tsqlora" else None

    def batch(indices):
        return x[indices] + 0.1 * torch.randn(len(indices), 5), y[indices], indices

    def loss(noisy, truth, indices):
        logits = model(noisy)
        if sampler:
            sampler.observe(indices, logits, truth)
        error = nn.functional.cross_entropy(logits, truth)
        return error if raised is None else error + raised()

    def report(done, total, note):
        nonlocal steps
        steps += 1
        assert steps <= total
        assert "loss" in note
        if stop_after is not None and done >= stop_after:
            raise KilledError

    fitted = fit(
        model,
        batch,
        loss,
        torch.arange(70),
        Optimisation(epochs, 16, 1e-2, 0.01, averaged=3, **options),
        seed=3,
        identity=identity,
        state_file=state_file,
        validate=(lambda: float((model(x[70:]).argmax(1) == y[70:]).float().mean())) if validate else None,
        report=report,
        save_every_s=0.0,
        schedule=schedule(model),
        sampler=sampler,
    )
    return model, fitted


@pytest.mark.parametrize("adapter", ["", "adalora", "dylora", "tsqlora"])
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("stop_after", [1, 20, 41, 73, 119])
def test_a_killed_training_goes_on_to_the_same_result(tmp_path, stop_after, validate, adapter):
    expected, fitted = toy_training(tmp_path / "undisturbed", validate=validate, adapter=adapter)
    state = tmp_path / "state"
    with pytest.raises(KilledError):
        toy_training(state, stop_after=stop_after, validate=validate, adapter=adapter)
    assert state.exists() is (stop_after > 20)
    model, resumed = toy_training(state, validate=validate, adapter=adapter)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert resumed.history == fitted.history
    assert resumed.best_epoch == fitted.best_epoch
    assert resumed.seconds > 0


def test_training_twice_gives_the_same_and_another_seed_another(tmp_path):
    one, other = (toy_training(tmp_path / name)[0] for name in "ab")
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize(
    ("averaged", "best_epoch", "epochs"),
    [(1, 2, 5), (3, 3, 6), (6, 7, 7), (9, 7, 7)],  # means of 3, from the third on: 0.5667, 0.5333, 0.5, 0.3667
)
def test_the_best_epoch_is_kept_and_patience_ends_training(tmp_path, averaged, best_epoch, epochs):
    score = iter([0.1, 0.9, 0.7, 0.0, 0.8, 0.3, 1.0])
    model = nn.Linear(3, 1)
    weights = []

    def validate():
        weights.append(model.weight.detach().clone())
        return next(score)

    fitted = fit(
        model, lambda i: (torch.ones(len(i), 3),), lambda x: model(x).square().mean(), torch.arange(40),
        Optimisation(7, 8, 0.1, 0.0, averaged=averaged, patience=3),
        seed=0, identity="x", state_file=tmp_path / "state", validate=validate,
    )  # fmt: skip
    assert fitted.best_epoch == best_epoch
    assert len(fitted.history) == epochs
    assert torch.equal(model.weight, weights[best_epoch - 1])


def test_a_state_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    state = tmp_path / "state"
    with pytest.raises(KilledError):
        toy_training(state, stop_after=45)
    with pytest.raises(InputError, match="belongs to another run; delete it"):
        toy_training(state, identity="b")
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"state: not a complete safetensors file .*delete it, the run begins anew"):
        toy_training(state)


def test_too_few_windows_and_impossible_settings(tmp_path):
    with pytest.raises(InputError, match="requires 2 windows or more, got 1"):
        fit(nn.Linear(1, 1), lambda i: (i,), lambda i: i, torch.arange(1), Optimisation(1, 1, 1.0, 0.0), seed=0,
            identity="", state_file=tmp_path / "s")  # fmt: skip
    with pytest.raises(InputError, match="epochs must be above 0"):
        Optimisation(0, 1, 1.0, 0.0)


def test_only_trainable_parameters_move(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, lambda i: (torch.ones(len(i), 4),), lambda x: model(x).sum(), torch.arange(10),
        Optimisation(1, 5, 0.1, 0.5), seed=0, identity="", state_file=tmp_path / "s")  # fmt: skip
    assert torch.equal(model[0].weight, before)


# Metrics and memory


def test_scores_by_hand():
    truth, predicted = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 0, 0, 0])
    result = scores(truth, predicted, ["a", "b", "c"])
    assert result["accuracy"] == 0.5
    assert result["precision"] == pytest.approx((2 / 5 + 1 + 0) / 3)
    assert result["recall"] == pytest.approx((1 + 0.5 + 0) / 3)
    f1 = [2 * 0.4 / 1.4, 2 * 0.5 / 1.5, 0.0]
    assert result["f1"] == pytest.approx(f1)
    assert result["macro_f1"] == pytest.approx(sum(f1) / 3)
    assert result["confusion"] == [[2, 0, 0], [1, 1, 0], [2, 0, 0]]
    assert macro_f1(truth[:4], predicted[:4]) == pytest.approx((2 * (2 / 3) / (5 / 3) + 2 * 0.5 / 1.5) / 2)


def test_scores_are_over_the_labels_that_occur():
    truth, predicted = np.array([0, 0, 0]), np.array([0, 0, 1])
    found = scores(truth, predicted, ["a", "b"])
    assert found["macro_f1"] == macro_f1(truth, predicted) == macro_f1_of_confusion(found["confusion"])
    assert found["macro_f1"] == pytest.approx(0.8)
    assert (found["precision"], found["recall"]) == (1, pytest.approx(2 / 3))


def test_held_bytes_are_those_of_the_tensors():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), QLoRALinear(8, 4, rank=2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert held_bytes(model, optimizer)["optimizer"] == 0
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    held = held_bytes(model, optimizer)
    trained = 4 * (8 + 8 + 2 * 8 + 4 * 2)
    assert held["packed"] == 8 * 4 // 2
    assert held["scales"] == 4 + 4 * 16  # of one block, and what the 16 codes mean
    assert held["dense"] == 4 * (64 + 8) + 4 * 16 + 8 + 4 * 4  # linear, statistics, bias
    assert held["adapters"] == 4 * (2 * 8 + 4 * 2)
    assert held["other_trained"] == 4 * (8 + 8)
    assert held["trainable"] == held["gradients"] == trained
    assert held["frozen"] == held["packed"] + held["scales"] + held["dense"]
    steps = len([p for p in model.parameters() if p.requires_grad])
    assert held["optimizer"] == 2 * trained + 4 * steps
    optimizer.zero_grad()
    assert held_bytes(model, optimizer)["gradients"] == 0


def test_memory_that_is_shared_counts_once_and_whole_where_a_part_is_in_use():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters())
    assert held_bytes(model, optimizer)["other_trained"] == 4 * 64
    layer = QLoRALinear(64, 64, rank=0, double_quant=True)
    before = held_bytes(layer, optimizer)
    assert before["packed"] == 64 * 64 // 2
    assert before["scales"] == 64 + 4 + 4 + 4 * (16 + 256)  # 8 bits, of 256 scales one, their mean, both tables
    layer.weight = torch.cat([layer.weight, torch.zeros(10_000, 1, dtype=torch.uint8)])[: len(layer.weight)]
    assert held_bytes(layer, optimizer)["packed"] == before["packed"] + 10_000


def test_step_peak_counts_what_lives_at_once():
    kept = []

    def step():
        kept.append(torch.ones(1000, 1000))
        for _ in range(5):
            torch.ones(500, 1000).sum()

    peak = step_peak_bytes(step, CPU)
    assert 6_000_000 <= peak < 6_100_000


def live_bytes(call):
    """What ``call`` leaves allocated."""
    gc.collect()
    events, _ = memory._traced(call, CPU)
    return sum(block.size for block in memory._blocks(events) if block.last == math.inf)


def step_of(function):
    """What a step on ``function`` of a product of 128 rows, 64 to 32 wide, allocates; a row of 32 has 128 bytes."""
    model = nn.Linear(64, 32, bias=False)
    x = torch.randn(128, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    return step_bytes(model, optimizer, lambda x: function(model(x)).sum(), lambda: (x.clone(),))


def test_a_step_is_told_by_category():
    y = 128 * 32 * 4
    few = 600  # scalars
    plain = step_of(torch.exp)
    assert plain["batch"] == 128 * 64 * 4
    assert plain["saved"] == y  # exp keeps what it returns; x and the weight are counted elsewhere
    assert y <= plain["working"] < y + few  # the product itself, then the gradient of the product
    # The gradient of the weight, half as large, comes when nothing is saved any more.
    assert plain["batch"] + 2 * y <= plain["step_peak"] < plain["batch"] + 2 * y + few
    # What two functions keep counts once, what one more keeps counts.
    assert step_of(lambda y: y.exp().cos())["saved"] == y
    assert step_of(lambda y: y.sin().cos())["saved"] == 2 * y


def test_an_activation_that_is_kept_beside_the_graph_shows_up():
    kept = []

    def function(y):
        kept.append(y * 2)
        return y.exp()

    plain, found = step_of(torch.exp), step_of(function)
    assert found["saved"] == plain["saved"]
    assert found["working"] == pytest.approx(plain["working"] + 128 * 32 * 4, abs=600)
    assert found["step_peak"] > plain["step_peak"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_trace_agrees_with_the_allocators_own_peak():
    size = method_bytes(FinetuneConfig(method="full"), torch.device("cuda"))  # which warms up what allocates once
    model = build_classifier(FinetuneConfig(method="full"), MAE().encoder, 6).cuda().train()
    optimizer = make_optimizer(model, FinetuneConfig().optimisation())
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.randn(64, 128, 6)
    found = step_bytes(model, optimizer, lambda x: model(x).square().sum(), lambda: (x,))
    assert found["step_peak"] == torch.cuda.max_memory_allocated() - before
    assert size["saved"] > 0
    assert found["saved"] > 0


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qdora", "lora_xs", "quni_lora", "qone_bit"])
def test_nothing_is_held_that_is_not_counted(method):
    """All that building a model and a step leave allocated is in a category."""
    config = FinetuneConfig(method=method, rank=16)
    encoder = MAE().encoder
    method_bytes(config, CPU)  # code tables, and probes at the first use
    kept = []

    def train():
        model = build_classifier(config, encoder, 6).train()
        optimizer = make_optimizer(model, config.optimisation())
        model(torch.randn(4, 128, 6)).square().sum().backward()
        optimizer.step()
        kept.extend((model, optimizer))

    found = live_bytes(train)
    held = held_bytes(*kept)
    tables = 4 * (16 + 256) if METHODS[method].four_bits else 0
    assert sum(held[key] for key in ("frozen", "trainable", "gradients", "optimizer")) - tables == found


@needs_extension
def test_qlora_holds_no_more_of_anything_than_lora_at_real_size():
    size = {method: method_bytes(FinetuneConfig(method=method, rank=16), CPU) for method in ("full", "lora", "qlora")}
    held = {m: sum(s[k] for k in ("frozen", "trainable", "gradients", "optimizer")) for m, s in size.items()}
    assert held["qlora"] <= 0.6 * held["lora"]
    assert held["qlora"] <= 0.25 * held["full"]
    for key in ("saved", "working", "step_peak", "adapters", "gradients", "optimizer"):
        assert size["qlora"][key] <= size["lora"][key], key


# Pretraining


def test_pretraining_is_reused_by_content(data, tmp_path):
    first = pretrain(PRETRAIN, data[1:], tmp_path, device=CPU)
    written = first.stat().st_mtime_ns
    assert pretrain(PRETRAIN, data[1:], tmp_path, device=CPU) == first
    assert first.stat().st_mtime_ns == written
    for other in (
        pretrain(replace(PRETRAIN, seed=1), data[1:], tmp_path, device=CPU),
        pretrain(PRETRAIN, data[:2], tmp_path, device=CPU),
    ):
        assert other.parent != first.parent
    assert not list(tmp_path.glob("*/state.safetensors"))


def test_pretraining_checkpoint_holds_the_encoder(checkpoint, pretrained):
    assert pretrained.sources == ("synthetic_b", "synthetic_c")
    assert pretrained.encoder.config == MODEL
    assert json.loads((checkpoint.parent / "metrics.json").read_text())["loss"] == pretrained.loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.unlink(), "no such file"),
        (lambda f: f.write_bytes(b"hello"), "not a complete safetensors file"),
        (lambda f: f.write_bytes(f.read_bytes()[:-3] + b"abc"), "checksum does not match"),
    ],
)
def test_damaged_checkpoints_are_refused(checkpoint, tmp_path, change, message):
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(checkpoint.read_bytes())
    change(file)
    with pytest.raises(InputError, match=message):
        load_pretrained(file)


def test_a_pickle_is_never_opened(tmp_path):
    file = tmp_path / "encoder.safetensors"
    torch.save({"a": 1}, file)
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_pretrained(file)


def test_a_checkpoint_of_another_kind_is_refused(data, pretrained, checkpoint, tmp_path):
    metrics = finetune(FINETUNE, data[0], pretrained, tmp_path, device=CPU)
    (file,) = tmp_path.glob(f"*{metrics['identity']}/classifier.safetensors")
    with pytest.raises(InputError, match="required a harlora encoder checkpoint file, found classifier checkpoint"):
        load_pretrained(file)
    with pytest.raises(InputError, match="found encoder checkpoint"):
        load_classifier(checkpoint)


# Adapting


def test_a_capture_that_is_not_possible_is_refused_at_once(data, pretrained, tmp_path):
    for run in (
        lambda: pretrain(PRETRAIN, data[1:], tmp_path, device=CPU, capture="on"),
        lambda: finetune(FINETUNE, data[0], pretrained, tmp_path, device=CPU, capture="on"),
    ):
        with pytest.raises(InputError, match="capture: on requires a CUDA device, got cpu"):
            run()
    assert not list(tmp_path.iterdir())


def test_how_steps_were_taken_is_said_and_no_part_of_the_identity(data, pretrained, tmp_path):
    config = replace(FINETUNE, method="linear_probe", epochs=1)
    metrics = finetune(config, data[0], pretrained, tmp_path, device=CPU)
    assert metrics["captured"] is False
    assert finetune(config, data[0], pretrained, tmp_path, device=CPU, capture="off") == metrics


@pytest.mark.parametrize(
    ("method", "protocol"), [*((name, "subject") for name in METHODS), ("full", "paper"), ("qlora", "paper")]
)
def test_every_method_runs(data, pretrained, tmp_path, method, protocol):
    config = replace(FINETUNE, method=method, protocol=protocol)
    metrics = finetune(config, data[0], pretrained, tmp_path, sources=data[1:], device=CPU)
    assert 0 <= metrics["scores"]["macro_f1"] <= 1
    assert metrics["synthetic"] is True
    assert metrics["seconds"] > 0
    size = metrics["bytes"]
    absent = {"packed", "scales"} if not METHODS[method].four_bits else set()
    absent |= {"adapters"} if METHODS[method].adapter is None else set()
    assert {name for name, value in size.items() if value == 0} == absent
    assert has_memory(size)
    assert sum(map(sum, metrics["scores"]["confusion"])) == metrics["windows"]["test"]
    json.dumps(metrics, allow_nan=False)
    (folder,) = tmp_path.glob(f"*{metrics['identity']}")
    assert (folder / "adapter" / "adapter_model.safetensors").exists() is (METHODS[method].adapter is not None)
    # Finished runs are read, not repeated.
    before = (folder / "metrics.json").stat().st_mtime_ns
    assert finetune(config, data[0], pretrained, tmp_path, sources=data[1:], device=CPU) == metrics
    assert (folder / "metrics.json").stat().st_mtime_ns == before
    # The saved classifier gives the scores that were reported.
    model, normalizer, labels = load_classifier(folder / "classifier.safetensors")
    target = thinned(data[0], config.max_windows, 0)
    test = split(target, protocol, 0).test
    with torch.no_grad():
        predicted = model(torch.from_numpy(normalizer(target.signals[test]))).argmax(dim=1).numpy()
    truth = np.searchsorted(np.unique(target.labels), target.labels[test])
    assert scores(truth, predicted, labels) == metrics["scores"]


def trainable(config, classes=3):
    model = build_classifier(config, MAE(MODEL).encoder, classes)
    return model, {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "changed", [{"turned_deg": 40.0}, {"flipped": 0.9}, {"warp": 0.5}, {"rescaled": 0.5}, {"dropped": 0.7}]
)
def test_training_windows_are_changed_as_the_settings_say(data, pretrained, tmp_path, changed):
    still = {"turned_deg": 0.0, "flipped": 0.0, "warp": 1.0, "rescaled": 0.0, "dropped": 0.0}
    losses = []
    for settings in (still, {**still, **changed}):
        config = replace(FINETUNE, method="full", epochs=1, **settings)
        losses.append(finetune(config, data[0], pretrained, tmp_path, device=CPU)["history"][0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_how_windows_are_changed_goes_by_where_the_device_was_and_by_the_protocol():
    for name, turned, flipped in (("motionsense", 15.0, 0.3), ("uci_hapt", 5.0, 0.0), ("my_own", 5.0, 0.0)):
        config = FinetuneConfig().for_dataset(name)
        assert (config.turned_deg, config.flipped) == (turned, flipped)
        assert (config.warp, config.rescaled) == (0.85, 0.05)
        paper = FinetuneConfig(protocol="paper").for_dataset(name)
        assert (paper.turned_deg, paper.flipped, paper.warp, paper.rescaled) == (0.0, 0.0, 1.0, 0.0)
    own = FinetuneConfig().for_dataset("my_own", "Pocket, right")
    assert (own.turned_deg, own.flipped) == (15.0, 0.3)
    assert FinetuneConfig().for_dataset("uci_hapt", "pocket").turned_deg == 5.0  # the catalogue knows better
    given = replace(FinetuneConfig(), turned_deg=0.0).for_dataset("motionsense")
    assert (given.turned_deg, given.flipped) == (0.0, 0.3)


def test_the_papers_protocol_has_the_papers_epochs():
    def schedule(**settings):
        config = FinetuneConfig(**settings).for_dataset("uci_hapt")
        assert config.for_dataset("uci_hapt") == config
        return config.epochs, config.dropped

    assert schedule() == schedule(method="full") == (20, 0.5)
    assert schedule(protocol="paper") == schedule(protocol="paper", method="bitfit") == (50, 0.75)
    assert schedule(protocol="paper", method="linear_probe") == (20, 0.5)
    assert schedule(protocol="paper", epochs=3) == (3, 0.75)
    assert schedule(dropped=0.0) == (20, 0.0)


def test_what_each_method_trains():
    head = {f"head.{i}.{part}" for i in (0, 1, 4) for part in ("weight", "bias")}
    for method in ("zero_shot", "linear_probe"):
        assert trainable(replace(FINETUNE, method=method))[1] == head
    for method in ("full", "scratch"):
        model, names = trainable(replace(FINETUNE, method=method))
        assert names == {name for name, _ in model.named_parameters()}
    for method in ("lora", "qlora"):
        model, names = trainable(replace(FINETUNE, method=method, train_norms=False))
        assert len(dict(adapted_layers(model))) == 12
        assert names - head == {f"{path}.lora_{x}" for path, _ in adapted_layers(model) for x in "AB"}
        _, more = trainable(replace(FINETUNE, method=method))
        assert {"encoder.norm.weight", "encoder.blocks.0.attention.q.bias", "encoder.patch_embed.weight"} <= more


def test_ranks_of_some_layers():
    for rslora, scaling in ((False, 2.0), (True, 4 / 2**0.5)):
        config = replace(FINETUNE, method="lora", rank_pattern={"q|fc1": 8}, rslora=rslora)
        layers = dict(adapted_layers(build_classifier(config, MAE(MODEL).encoder, 3)))
        ranks = {path: layer.rank for path, layer in layers.items()}
        assert {path.rsplit(".", 1)[-1] for path, rank in ranks.items() if rank == 8} == {"q", "fc1"}
        assert [layer.scaling for layer in layers.values()] == pytest.approx([scaling] * len(layers))
    for method, modules in (("lora", FINETUNE.target_modules), ("qdora", ("q", "v"))):
        config = replace(FINETUNE, method=method, rank_pattern={"fc3": 8}, target_modules=modules)
        with pytest.raises(InputError, match=r"rank_pattern: 'fc3' is no layer with an adapter; they are blocks\.0\."):
            build_classifier(config, MAE(MODEL).encoder, 3)


@pytest.mark.parametrize("method", ["lora", "qpissa"])
def test_adapters_in_the_blocks_that_change_the_most_alone(data, pretrained, tmp_path, method):
    config = replace(FINETUNE, method=method, adapted_blocks=1)
    metrics = finetune(config, data[0], pretrained, tmp_path, device=CPU)
    (folder,) = tmp_path.glob(f"*{metrics['identity']}")
    model, _, _ = load_classifier(folder / "classifier.safetensors")
    paths = [path for path, _ in adapted_layers(model.encoder)]
    assert len(paths) == 6
    assert len({path.split(".")[1] for path in paths}) == 1


def test_the_people_who_are_tested_may_be_named(data, pretrained, tmp_path):
    name = data[0].subject_names[1]
    config = replace(FINETUNE, method="linear_probe", test_people=[name])  # a list, as TOML and JSON have it
    metrics = finetune(config, data[0], pretrained, tmp_path, device=CPU)
    assert metrics["test_subjects"] == [name]
    assert "test_people" not in FINETUNE.values()
    assert metrics["config"]["test_people"] == [name]
    assert finetune(FinetuneConfig(**metrics["config"]), data[0], pretrained, tmp_path, device=CPU) == metrics


def test_blocks_by_chance_are_the_same_for_all_methods():
    config = replace(FINETUNE, method="lora", adapted_blocks=1, adapted_blocks_by="chance")
    chosen = []
    for method, seed in (("lora", 0), ("qlora", 0), *(("lora", seed) for seed in range(1, 9))):
        model, _ = trainable(replace(config, method=method, seed=seed))
        (block,) = {path.split(".")[2] for path, _ in adapted_layers(model)}
        chosen.append(block)
    assert chosen[0] == chosen[1]
    assert set(chosen) == {"0", "1"}


def test_an_adapter_is_scored_at_lower_ranks_and_for_intruders(data, pretrained, tmp_path):
    config = replace(FINETUNE, method="qlora", rank=6, by_rank=True)
    metrics = finetune(config, data[0], pretrained, tmp_path, device=CPU)
    plain = finetune(replace(config, by_rank=False), data[0], pretrained, tmp_path, device=CPU)
    scored = metrics["by_rank"]
    assert scored["ranks"] == [1, 2, 4, 6]
    assert scored["cut"][-1] == pytest.approx(metrics["scores"]["macro_f1"], abs=0.02)
    assert scored["squeezed"][-1] == pytest.approx(metrics["scores"]["macro_f1"], abs=0.02)
    assert min(scored["cut"]) <= metrics["aurac"] <= max(scored["cut"])
    assert plain["scores"] == metrics["scores"]
    assert not {"by_rank", "aurac"} & plain.keys()
    assert plain["intruders"] >= 0
    probe = finetune(replace(FINETUNE, method="linear_probe"), data[0], pretrained, tmp_path, device=CPU)
    scratch = finetune(replace(FINETUNE, method="scratch"), data[0], pretrained, tmp_path, device=CPU)
    assert not [name for name in ("intruders",) if name in probe or name in scratch]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "qdora", "by_rank": True}, "by_rank is for lora, matryoshka, dylora and theirs in 4 bits"),
        ({"adapted_blocks_by": "name"}, "adapted_blocks_by must be change or chance, got 'name'"),
    ],
)
def test_what_cannot_be_set(settings, message):
    with pytest.raises(InputError, match=message):
        replace(FINETUNE, **settings).check()


@pytest.mark.parametrize("server", ["average", "fair"])
def test_people_may_be_clients(data, pretrained, tmp_path, server):
    config = replace(FINETUNE, method="qlora", federated=server, epochs=3)
    metrics = finetune(config, data[0], pretrained, tmp_path / "a", device=CPU)
    assert len(metrics["history"]) == 3
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    # Killed after two rounds it goes on to the same result.
    rounds = []

    def stop(done, total, note):
        rounds.append(note)
        if note.startswith("round 3"):
            raise KilledError

    with pytest.raises(KilledError):
        finetune(config, data[0], pretrained, tmp_path / "b", device=CPU, report=stop)
    again = finetune(config, data[0], pretrained, tmp_path / "b", device=CPU)
    assert again["history"] == metrics["history"]
    assert again["scores"] == metrics["scores"]
    (folder,) = (tmp_path / "b").glob("qlora-*")
    assert not (folder / "state.safetensors").exists()


def test_the_server_averages_and_fair_is_nearer_to_what_the_clients_made():
    torch.manual_seed(0)
    states = [
        {"x.lora_A": torch.randn(2, 6), "x.lora_B": torch.randn(5, 2), "bias": torch.randn(5), "count": torch.tensor(3)}
        for _ in range(3)
    ]
    sizes = [10, 20, 70]
    plain, fair = aggregate(states, sizes), aggregate(states, sizes, ridge=1e-4)
    assert {name: value.shape for name, value in plain.items()} == {name: value.shape for name, value in fair.items()}
    for name in ("bias", "x.lora_A"):
        mean = sum(size / 100 * state[name] for size, state in zip(sizes, states, strict=True))
        torch.testing.assert_close(plain[name], mean)
        assert torch.equal(plain[name], fair[name])
    wanted = sum(size / 100 * state["x.lora_B"] @ state["x.lora_A"] for size, state in zip(sizes, states, strict=True))
    errors = [float((one["x.lora_B"] @ one["x.lora_A"] - wanted).norm()) for one in (plain, fair)]
    assert errors[1] < 0.9 * errors[0]
    assert plain["count"] == 3


def test_scratch_forgets_the_pretraining():
    torch.manual_seed(9)
    encoder = MAE(MODEL).encoder
    pretrained = {name: value.clone() for name, value in encoder.state_dict().items()}
    full = build_classifier(replace(FINETUNE, method="full"), encoder, 3)
    scratch = build_classifier(replace(FINETUNE, method="scratch"), encoder, 3)
    assert torch.equal(full.encoder.blocks[0].fc1.weight, pretrained["blocks.0.fc1.weight"])
    assert not torch.equal(scratch.encoder.blocks[0].fc1.weight, pretrained["blocks.0.fc1.weight"])


def test_qlora_holds_less_than_lora_and_lora_less_than_full(data, pretrained, tmp_path):
    total, matrices = {}, {}
    for method in ("full", "lora", "qlora"):
        metrics = finetune(replace(FINETUNE, method=method, epochs=1), data[0], pretrained, tmp_path, device=CPU)
        size = metrics["bytes"]
        total[method] = sum(size[key] for key in ("frozen", "trainable", "gradients", "optimizer"))
        matrices[method] = size["matrices"] / size["matrices_float32"]
    assert total["qlora"] < total["lora"] < total["full"]
    assert matrices["qlora"] <= 0.15
    assert matrices["lora"] == matrices["full"] == 1


def test_fewer_labels_train_on_fewer_windows(data, pretrained, tmp_path):
    config = replace(FINETUNE, method="linear_probe", windows_per_class=2)
    metrics = finetune(config, data[0], pretrained, tmp_path, device=CPU)
    assert metrics["windows"]["train"] == 14
    half = finetune(
        replace(FINETUNE, method="linear_probe", label_fraction=0.5), data[0], pretrained, tmp_path, device=CPU
    )
    full = finetune(replace(FINETUNE, method="linear_probe"), data[0], pretrained, tmp_path, device=CPU)
    assert abs(half["windows"]["train"] - full["windows"]["train"] / 2) < 8
    assert half["windows"]["test"] == full["windows"]["test"] == metrics["windows"]["test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "qlra"}, "unknown method 'qlra'; required one of zero_shot"),
        ({"protocol": "random"}, "unknown protocol 'random'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"alpha": -1.0}, "alpha must be above 0"),
        ({"adapter_dropout": 1.0}, "adapter_dropout must be at least 0 and below 1"),
        ({"label_smoothing": 2.0}, "label_smoothing must be from 0 to 1, got 2"),
        ({"label_fraction": 0.0}, "label_fraction must be above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"max_windows": -5}, "max_windows must be at least 0"),
        ({"blocksize": 7}, "blocksize one of"),
        ({"flipped": 1.5}, "flipped must be from 0 to 1, got 1.5"),
        ({"warp": 0.0}, "warp must be above 0 and at most 1, got 0.0"),
        ({"turned_deg": -1.0}, "turned_deg must be at least 0, got -1.0"),
        ({"federated": "some"}, "federated must be one of no, average, fair, got 'some'"),
        ({"method": "full", "federated": "fair"}, "federated is for lora and qlora"),
        ({"method": "full", "options": {"choose": "random"}}, "options: full has none, got choose"),
        (
            {"method": "paca", "options": {"chose": "random"}},
            "options: paca has no option chose; required some of rank",
        ),
        ({"method": "paca", "options": {"rank": 4}}, "options: rank must be set as settings of their own"),
        ({"method": "adalora", "options": {"begin": "soon"}}, "adalora: begin must be of type float, got 'soon'"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(FINETUNE, **changes).check()


def test_options_may_be_text():
    config = replace(FINETUNE, method="adalora", options={"first_rank": "6", "begin": "0.2"})
    assert config.options == {"first_rank": 6, "begin": 0.2}
    assert config == replace(FINETUNE, method="adalora", options={"first_rank": 6, "begin": 0.2})
    assert config.values()["options"] == {"first_rank": 6, "begin": 0.2}
    assert "options" not in FINETUNE.values()
    assert replace(FINETUNE, method="matryoshka", options={"ranks": "1,2"}).options == {"ranks": (1, 2)}
    assert replace(FINETUNE, method="qlora", options={"frozen_A": "true"}).options == {"frozen_A": True}


def test_the_same_people_are_never_on_both_sides(data, pretrained, tmp_path):
    for source, target in (("uci_har", "uci_hapt"), ("uci_hapt", "uci_hapt")):
        with pytest.raises(InputError, match=f"pretrained on {source}, which has the people of {target}"):
            finetune(FINETUNE, replace(data[0], dataset=target), replace(pretrained, sources=(source,)), tmp_path,
                     device=CPU)  # fmt: skip
    twice = [replace(one, dataset=name) for one, name in zip(data, ("uci_har", "uci_hapt"), strict=False)]
    with pytest.raises(InputError, match="uci_har and uci_hapt are the same recordings of the same people"):
        pretrain(PRETRAIN, twice, tmp_path, device=CPU)
    with pytest.raises(InputError, match="are the same recordings"):
        Study(targets=("synthetic_a",), sources=("uci_har", "uci_hapt")).experiment().plan(tmp_path)


def test_zero_shot_trains_on_all_of_the_sources_unless_validated(data, pretrained, tmp_path):
    config = replace(FINETUNE, method="zero_shot")
    few = data[1].take(np.flatnonzero(data[1].subjects < 2))  # of too few people to hold any back
    found = finetune(config, data[0], pretrained, tmp_path, sources=[few, data[2]], device=CPU)
    assert found["windows"]["validation"] == 0
    assert found["best_epoch"] == len(found["history"]) == 2
    held_back = finetune(replace(config, validated=True), data[0], pretrained, tmp_path, sources=data[1:], device=CPU)
    assert held_back["windows"]["validation"] > 0


def test_parameters_are_counted_once_where_some_layers_are_adapted(data, pretrained, tmp_path):
    totals = {
        method: finetune(
            replace(FINETUNE, method=method, target_modules=("q", "v"), epochs=1),
            data[0],
            pretrained,
            tmp_path,
            device=CPU,
        )["parameters"]["total"]
        for method in ("lora", "qlora")
    }
    assert totals["lora"] == totals["qlora"]


def test_zero_shot_needs_sources(data, pretrained, tmp_path):
    with pytest.raises(InputError, match="give at least one"):
        finetune(replace(FINETUNE, method="zero_shot"), data[0], pretrained, tmp_path, device=CPU)


@pytest.mark.parametrize("config", [{"method": "full"}, {"method": "lora", "federated": "average"}])
def test_training_that_diverges_says_so(data, pretrained, tmp_path, config):
    with pytest.raises(
        InputError, match=r"training diverged in epoch [12]: the loss is .*; required a lower learning_rate"
    ):
        finetune(replace(FINETUNE, learning_rate=1e30, **config), data[0], pretrained, tmp_path, device=CPU)
    assert not list(tmp_path.glob("*/metrics.json"))


def test_steps_of_several_processes_are_not_captured(data, tmp_path, monkeypatch):
    several = SimpleNamespace(count=2, check=lambda size: None)
    monkeypatch.setattr("harlora.train.pretrain.captures", lambda *_: True)
    monkeypatch.setattr("harlora.train.pretrain.Processes", lambda _: several)
    with pytest.raises(InputError, match="capture: steps of several processes are not captured; use auto or off"):
        pretrain(PRETRAIN, data[1:], tmp_path, device=CPU, capture="on")


# Folders of runs


def test_the_commit_is_that_of_harlora_and_of_nothing_around_it(tmp_path):
    package = tmp_path / "project" / ".venv" / "harlora"
    package.parent.mkdir(parents=True)
    shutil.copytree(Path(runs.__file__).resolve().parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "project" / ".gitignore").write_text(".venv\n")
    for command in ("init -q", "add .gitignore", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", "-C", tmp_path / "project", *command.split()], check=True)
    monkey = f"import harlora.train.runs as r; r.__file__ = {str(package / 'train' / 'runs.py')!r}; print(r._source())"
    done = subprocess.run([sys.executable, "-c", monkey], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'commit': None, 'dirty': None}"
    own = runs._source()["commit"]
    assert own is None or re.fullmatch("[0-9a-f]{40}", own)


def test_a_config_that_was_edited_is_refused(data, tmp_path):
    file = pretrain(PRETRAIN, data[1:], tmp_path, device=CPU)
    config = file.parent / "config.json"
    config.write_text(config.read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(InputError, match=r"config\.json: was changed after the run began"):
        pretrain(PRETRAIN, data[1:], tmp_path, device=CPU)
