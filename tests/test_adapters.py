"""What every adapter must do, whatever its method, over dense weights and over weights in 4 bits."""

import copy
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from harlora.errors import InputError
from harlora.models import MAEConfig
from harlora.models.mae import Encoder
from harlora.nn import adapted_layers, at_rank, gather_statistics, load_adapter, merge_adapters, save_adapter
from harlora.nn.adapters import ADAPTERS, LowRank, Statistics
from harlora.nn.adapters.choose import changes
from harlora.nn.adapters.matryoshka import aurac
from harlora.nn.adapters.one_bit import binary
from harlora.nn.adapters.post import average, intruders, linear_cka, squeeze, without_intruders
from harlora.nn.adapters.tsqlora import shares
from harlora.nn.apply import apply_adapter, apply_lora, apply_qlora, schedule

CONFIG = MAEConfig(patch_size=16, width=64, depth=2, heads=2, ffn=96)
TARGETS = ["q", "k", "v", "o", "fc1", "fc2"]
LOW_RANK = {
    "lora",
    "adalora",
    "pissa",
    "lora_ga",
    "lora_xs",
    "lora_sb",
    "matryoshka",
    "dylora",
    "paca",
    "one_bit",
    "hydra",
    "tsqlora",
    "squeeze",
}


def pretrained():
    torch.manual_seed(3)
    return Encoder(CONFIG)


def windows(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, CONFIG.window, CONFIG.channels, generator=generator)


def gradients(model):
    """Statistics of every target layer from two batches."""
    return gather_statistics(model, TARGETS, (model(windows(8, seed)).square().mean() for seed in (5, 6)))


def adapted(method, quantize=False, **options):
    model = pretrained()
    kind = ADAPTERS[method]
    return apply_adapter(
        model, method, TARGETS, quantize=quantize, statistics=gradients(model) if kind.needs_statistics() else None,
        **options,
    )  # fmt: skip


def train(model, steps=3, rate=1e-2):
    """A few steps towards a random target."""
    torch.manual_seed(11)
    target = torch.randn(4, CONFIG.tokens, CONFIG.width)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(windows()), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def test_statistics_are_those_of_the_gradients():
    model = pretrained()
    found = gradients(model)
    assert not any(p.grad is not None for p in model.parameters())
    assert len(found) == 12
    layer = model.blocks[1].fc1.weight
    each = [torch.autograd.grad(model(windows(8, seed)).square().mean(), layer)[0] for seed in (5, 6)]
    mine = found["blocks.1.fc1"]
    torch.testing.assert_close(mine.gradient, (each[0] + each[1]) / 2)
    torch.testing.assert_close(mine.squared, each[0] ** 2 + each[1] ** 2)
    products = [(one * layer.detach()).abs().mean() for one in each]
    assert mine.sensitivity == pytest.approx(float(products[0] + products[1]) / 2)
    with pytest.raises(ValueError, match="losses has none"):
        gather_statistics(model, TARGETS, [])


BOTH = pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
EVERY = pytest.mark.parametrize("method", ADAPTERS)


@EVERY
def test_a_new_adapter_starts_as_declared(method):
    plain = pretrained()(windows())
    started = adapted(method).eval()(windows())
    same = torch.allclose(plain, started, atol=1e-5)
    assert same == ADAPTERS[method].identity_at_start


@BOTH
@EVERY
def test_merged_equals_unmerged(method, quantize):
    model = adapted(method, quantize)
    train(model)
    before = model(windows())
    merged = merge_adapters(copy.deepcopy(model))
    assert not list(adapted_layers(merged))
    torch.testing.assert_close(merged(windows()), before, atol=2e-5, rtol=2e-5)


@BOTH
@EVERY
def test_training_moves_the_adapter_and_nothing_else(method, quantize):
    model = adapted(method, quantize)
    own = {id(p) for _, layer in adapted_layers(model) for p in layer.adapter.parameters() if p.requires_grad}
    assert own == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {k: v.clone() for k, v in model.state_dict().items() if ".adapter." not in k and v.numel()}
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = train(model, steps=6)
    assert losses[-1] < losses[0]
    for key, value in frozen.items():
        assert torch.equal(model.state_dict()[key], value), key
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, factors[name])]
    assert not still


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(method, dtype):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).to(dtype)
    x = torch.randn(5, 16).to(dtype)
    statistics = {"0": Statistics(torch.randn(12, 16), torch.rand(12, 16), 1.0)}
    for quantize in (False, True)[: 1 if dtype == torch.float64 else 2]:  # 4 bits are of float32 or less
        options = {} if method == "ia3" else {"rank": 4}
        model = apply_adapter(
            copy.deepcopy(plain), method, ["0"], quantize=quantize, statistics=statistics, **options
        )  # fmt: skip
        y = model(x)
        y.sum().backward()
        assert y.dtype == dtype
        merged = merge_adapters(model)(x)
        assert merged.dtype == dtype
        torch.testing.assert_close(merged, y, atol=0.05, rtol=0.02)


COUNTS = {  # numbers that train at one layer, by rank, in_features and out_features
    "lora": lambda r, i, o: r * (i + o),
    "adalora": lambda r, i, o: r * (i + o + 1),
    "dora": lambda r, i, o: r * (i + o) + o,
    "pissa": lambda r, i, o: r * (i + o),
    "lora_ga": lambda r, i, o: r * (i + o),
    "lora_xs": lambda r, i, o: r * r,
    "lora_sb": lambda r, i, o: r * r,
    "matryoshka": lambda r, i, o: r * (i + o),
    "dylora": lambda r, i, o: r * (i + o),
    "paca": lambda r, i, o: r * o,
    "one_bit": lambda r, i, o: r * (i + o),
    "hydra": lambda r, i, o: r // 2 * (i + o) + r * o,
    "tsqlora": lambda r, i, o: 2 * r * (i + o),
    "squeeze": lambda r, i, o: 4 * r * (i + o),
}


@pytest.mark.parametrize("method", COUNTS)
def test_as_many_numbers_train_as_the_formula_says(method):
    for rank in (2, 6):
        options = {"first_rank": rank} if method == "adalora" else {}
        for _, layer in adapted_layers(adapted(method, rank=rank, **options)):
            assert layer.adapter.trainable() == COUNTS[method](rank, layer.in_features, layer.out_features)


def test_ia3_trains_one_number_a_channel():
    model = apply_adapter(pretrained(), "ia3", ["k", "v", "fc2"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == CONFIG.depth * (2 * 64 + 96)


def test_every_method_has_a_count():
    assert COUNTS.keys() | {"ia3", "uni_lora"} == ADAPTERS.keys()


def test_uni_lora_trains_one_vector_that_keeps_lengths():
    model = adapted("uni_lora", size=100)
    (vector,) = [p for p in model.parameters() if p.requires_grad]
    assert vector.shape == (100,)
    parts = [layer.adapter.delta(layer) for _, layer in adapted_layers(model)]
    length = sum(part.A.square().sum() + part.B.square().sum() for part in parts).sqrt()
    torch.testing.assert_close(length, vector.norm())
    with pytest.raises(ValueError, match="size must be from 1 to"):
        adapted("uni_lora", size=10**9)
    with pytest.raises(ValueError, match="rank must be that of all layers, 8, got 2 at blocks.0.fc1"):
        adapted("uni_lora", rank_pattern={"fc1": 2})


@BOTH
@EVERY
def test_saved_and_loaded_it_computes_the_same(method, quantize, tmp_path):
    model = adapted(method, quantize)
    train(model)
    save_adapter(model, tmp_path / "x")
    other = adapted(method, quantize)
    if ADAPTERS[method].needs_statistics() or method == "pissa":  # the same frozen weight
        other = copy.deepcopy(model)
        with torch.no_grad():
            for _, layer in adapted_layers(other):
                for parameter in layer.adapter.parameters():
                    parameter.add_(1.0)
    load_adapter(other, tmp_path / "x")
    assert torch.equal(other.eval()(windows()), model(windows()))
    if not quantize:  # and into a model that has none yet
        fresh = load_adapter(pretrained(), tmp_path / "x").eval()
        assert torch.equal(fresh(windows()), model(windows()))


@pytest.mark.parametrize("method", sorted(LOW_RANK))
def test_peft_reads_what_a_low_rank_adapter_changes(method, tmp_path):
    model = adapted(method)
    train(model)
    save_adapter(model, tmp_path / "x", as_lora=True)
    plain = load_adapter(pretrained(), tmp_path / "x").eval()
    torch.testing.assert_close(plain(windows()), model(windows()), atol=2e-5, rtol=2e-5)


class _Calls(TorchDispatchMode):
    """Counts the calls of compiled operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("harlora"):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def calls(model):
    model.train()
    with _Calls() as counted:
        model(windows()).square().mean().backward()
    return {name: count for name, count in counted.counts.items() if "dequantize" not in name}


@pytest.mark.parametrize("method", sorted(LOW_RANK))
def test_a_low_rank_method_calls_the_same_operators_as_lora(method):
    plain = calls(apply_qlora(pretrained(), TARGETS, rank=8))
    assert plain
    assert calls(adapted(method, quantize=True)) == plain


# After training


def change(rank=4, out=20, into=12, scale=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator), scale
    )  # fmt: skip


def test_squeezing_gives_the_truncated_svd():
    before = change(rank=6)
    U, S, Vt = torch.linalg.svd(before.dense().double(), full_matrices=False)
    for rank in (1, 3, 6):
        after = squeeze(before, rank)
        assert after.A.shape == (rank, 12)
        best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        torch.testing.assert_close(after.dense().double(), best, atol=1e-4, rtol=1e-4)
        cut = LowRank(before.A[:rank], before.B[:, :rank], before.scale).dense()
        assert (after.dense() - before.dense()).norm() <= (cut - before.dense()).norm() + 1e-4
    with pytest.raises(ValueError, match="rank must be from 1 to 6, got 7"):
        squeeze(before, 7)


def test_squeezing_a_change_of_more_ranks_than_its_matrix_has():
    before = change(rank=9, out=4, into=6)
    for rank in (4, 5, 9):
        after = squeeze(before, rank)
        assert after.A.shape == (4, 6)
        torch.testing.assert_close(after.dense(), before.dense(), atol=1e-4, rtol=1e-4)
    layer = apply_adapter(nn.Sequential(nn.Linear(6, 4)), "squeeze", ["0"], rank=1, first_rank=9)[0]
    nn.init.normal_(layer.adapter.B)
    whole = layer.adapter.delta(layer).dense()
    layer.adapter.squeeze(7)
    torch.testing.assert_close(layer.adapter.delta(layer).dense(), whole, atol=1e-4, rtol=1e-4)
    model = apply_lora(nn.Sequential(nn.Linear(6, 4)), ["0"], rank=9)
    nn.init.normal_(model[0].lora_B)
    merged = model[0].merge().weight
    with at_rank(model, 8, squeezed=True):
        torch.testing.assert_close(model[0].merge().weight, merged, atol=1e-4, rtol=1e-4)


def test_a_planted_intruder_is_the_only_one_found():
    torch.manual_seed(2)
    U, _, Vt = torch.linalg.svd(torch.randn(40, 30))
    weight = (U[:, :8] * torch.linspace(10, 3, 8)) @ Vt[:8]
    own = LowRank(Vt[:1], U[:, :1] * 2)  # strengthens what is there
    assert not len(intruders(weight, own.dense()))
    alien = LowRank(Vt[20:21], U[:, 35:36] * 20)
    assert intruders(weight, alien.dense()).tolist() == [0]
    milder = without_intruders(weight, alien, factor=0.75)
    assert len(milder.A) == 1
    torch.testing.assert_close(milder.dense(), 0.75 * alien.dense(), atol=1e-4, rtol=1e-4)
    assert without_intruders(weight, own) is own


def test_averaging_clients():
    clients = [change(seed=seed) for seed in range(3)]
    weights = [10, 30, 60]
    target = sum(w / 100 * client.dense() for w, client in zip(weights, clients, strict=True))
    plain, fair = average(clients, weights), average(clients, weights, ridge=1e-6)
    assert torch.equal(plain.A, fair.A)
    assert plain.A.numel() + plain.B.numel() == fair.A.numel() + fair.B.numel()
    errors = [float((one.dense() - target).norm()) for one in (plain, fair)]
    assert errors[1] < 0.9 * errors[0]
    best = target @ torch.linalg.pinv(fair.A) @ fair.A  # what any B can reach with this A
    torch.testing.assert_close(fair.dense(), best, atol=1e-3, rtol=1e-3)
    same = [LowRank(clients[0].A, client.B, client.scale) for client in clients]
    exact = average(same, weights)
    torch.testing.assert_close(
        exact.dense(), sum(w / 100 * one.dense() for w, one in zip(weights, same, strict=True)), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="requires clients of one rank"):
        average([change(rank=2), change(rank=3)], [1, 1])


def test_cka_by_hand():
    torch.manual_seed(1)
    x = torch.randn(200, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert float(linear_cka(x, 3 * x @ rotation + 5)) == pytest.approx(1)
    assert float(linear_cka(x, torch.randn(200, 6))) < 0.2


# Ranks that are cut


def test_matryoshka_with_one_rank_is_lora_bit_for_bit():
    torch.manual_seed(0)
    nested = adapted("matryoshka", rank=4, ranks=(4,))
    torch.manual_seed(0)
    plain = adapted("lora", rank=4)
    for model in (nested, plain):
        torch.manual_seed(7)
        train(model)
    assert torch.equal(nested(windows()), plain(windows()))


@pytest.mark.parametrize("method", ["matryoshka", "dylora"])
def test_every_trained_rank_can_be_served(method):
    model = adapted(method, rank=8)
    train(model)
    outputs = []
    for rank in (1, 2, 4, 8):
        for _, layer in adapted_layers(model):
            layer.adapter.served = rank
            assert layer.adapter.delta(layer).A.shape[0] == rank
        outputs.append(model(windows()))
    assert all(not torch.equal(one, other) for one, other in pairwise(outputs))


def test_dylora_draws_one_rank_for_all_layers(tmp_path):
    model = adapted("dylora", rank=8, rank_pattern={"fc1": 2})
    train(model)
    save_adapter(model, tmp_path)
    used = []
    for one in (model, copy.deepcopy(model), load_adapter(pretrained(), tmp_path)):
        trained = {path: layer.adapter for path, layer in adapted_layers(one.train())}
        for _ in range(30):
            one(windows(1)).square().sum().backward()
            ranks = {path: int(adapter.B.grad.any(dim=0).sum()) for path, adapter in trained.items()}
            (rank,) = {rank for path, rank in ranks.items() if not path.endswith("fc1")}
            assert {rank for path, rank in ranks.items() if path.endswith("fc1")} == {1 if rank < 4 else 2}
            used.append(rank)
            one.zero_grad()
    assert set(used) == {1, 2, 4, 8}


@pytest.mark.parametrize("method", ["matryoshka", "dylora"])
def test_merging_and_files_of_a_model_in_training_have_what_is_served(method, tmp_path):
    model = adapted(method, rank=8)
    train(model)
    expected = model(windows())
    for _ in range(4):
        model.train()(windows())
        merged = merge_adapters(copy.deepcopy(model))
        torch.testing.assert_close(merged.eval()(windows()), expected, atol=2e-5, rtol=2e-5)
        save_adapter(model, tmp_path, as_lora=True)
        plain = load_adapter(pretrained(), tmp_path).eval()
        torch.testing.assert_close(plain(windows()), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("method", ["matryoshka", "dylora"])
def test_the_rank_that_is_served_is_in_files_and_never_exceeded(method, tmp_path):
    model = adapted(method, rank=8)
    train(model)
    at_2, squeezed = {}, {}
    for served in (8, 4):
        for _, layer in adapted_layers(model):
            layer.adapter.served = served
        with at_rank(model, 2):
            at_2[served] = model(windows())
        with at_rank(model, 4, squeezed=True):
            squeezed[served] = model(windows())
    torch.testing.assert_close(at_2[4], at_2[8])
    now = model(windows())
    torch.testing.assert_close(squeezed[4], now, atol=1e-5, rtol=1e-4)
    with at_rank(model, 8):
        torch.testing.assert_close(model(windows()), now)
    save_adapter(model, tmp_path)
    fresh = load_adapter(pretrained(), tmp_path).eval()
    assert torch.equal(fresh(windows()), now)
    assert torch.equal(load_adapter(adapted(method, rank=8, served=4), tmp_path).eval()(windows()), now)
    with pytest.raises(InputError, match=f"{method} with served 4, the model with served 0"):
        load_adapter(adapted(method, rank=8), tmp_path)
    with pytest.raises(ValueError, match="served must be from 1 to rank=8, got 9"):
        layer.adapter.served = 9


def changes_of(model):
    return [layer.merge().weight - layer.base_weight() for _, layer in adapted_layers(model)]


@pytest.mark.parametrize("method", ["lora", "matryoshka", "dylora", None])
@pytest.mark.parametrize("squeezed", [False, True])
def test_a_trained_adapter_at_a_lower_rank(method, squeezed):
    model = apply_qlora(pretrained(), TARGETS, rank=8) if method is None else adapted(method, rank=8)
    train(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = changes_of(model)
    pairs = []
    for _, layer in adapted_layers(model):
        own = layer.adapter
        A, B, scale = (layer.lora_A, layer.lora_B, layer.scaling) if own is None else (own.A, own.B, own.scale)
        pairs.append((A[:2].clone(), B[:, :2].clone(), scale))
    # What is cut from a method with a factor for each rank has that of the lower rank, here four times that of 8.
    factor = 4 if method in ("matryoshka", "dylora") else 1
    with at_rank(model, 2, squeezed=squeezed):
        for found, all_of_it, (A, B, scale) in zip(changes_of(model), whole, pairs, strict=True):
            wanted = factor * scale * (B @ A)
            if squeezed:
                U, S, Vt = torch.linalg.svd(all_of_it)
                wanted = (U[:, :2] * S[:2]) @ Vt[:2]
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    with at_rank(model, 100, squeezed=False):
        torch.testing.assert_close(changes_of(model), whole)
    with pytest.raises(RuntimeError, match="inside"), at_rank(model, 1):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_cut_is_refused():
    for method, rank, message in (
        ("dora", 2, r"dora at blocks.0.attention.q cannot be cut; required lora"),
        ("lora", 0, "rank must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"at_rank: {message}"), at_rank(adapted(method), rank):
            pass


def test_aurac_by_hand():
    assert aurac([0.5, 0.9], [1, 3]) == pytest.approx(0.7)
    assert aurac([0.8], [4]) == 0.8


# Ranks that move


def test_adalora_ends_with_its_budget_and_takes_it_from_a_layer_that_does_nothing():
    torch.manual_seed(5)
    first, idle, last = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)
    with torch.no_grad():
        for parameter in idle.parameters():
            parameter.zero_()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.idle, self.last = first, idle, last

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.last(h + self.idle(0 * h))  # nothing goes in, so nothing that it learns matters

    model = apply_adapter(Model(), "adalora", ["first", "idle", "last"], rank=2, first_rank=4)
    adapters = [layer.adapter for _, layer in adapted_layers(model)]
    schedule = ADAPTERS["adalora"].schedule([layer for _, layer in adapted_layers(model)])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = torch.randn(64, 10), torch.randn(64, 4)
    counts = []
    for step in range(60):
        optimizer.zero_grad()
        (F.mse_loss(model(x), y) + sum(adapter.penalty() for adapter in adapters)).backward()
        optimizer.step()
        schedule.after_step((step + 1) / 60)
        counts.append(int(schedule.kept.sum()))
    assert counts[0] == 12
    assert counts[-1] == 6
    assert all(later <= earlier for earlier, later in pairwise(counts))
    ranks = {path: int(layer.adapter.singular.count_nonzero()) for path, layer in adapted_layers(model)}
    assert ranks["idle"] == 0
    assert sum(ranks.values()) == 6


def test_adalora_goes_on_between_its_last_count_and_its_last_choice():
    torch.manual_seed(3)
    model = apply_adapter(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), "adalora", ["0", "2"], rank=4)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            for parameter in layer.adapter.parameters():
                parameter.normal_(std=0.3)

    def step(model, optimizer, by_step, number):
        torch.manual_seed(3000 + number)
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(8, 16)), torch.randn(8, 8)).backward()
        optimizer.step()
        by_step.after_step(number / 100)

    def adam(model):
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)

    optimizer, by_step = adam(model), schedule(model)
    for number in range(1, 64):
        step(model, optimizer, by_step, number)
    assert int(by_step.kept.sum()) == by_step.number(1.0)  # before end, which is 0.7
    resumed = copy.deepcopy(model)
    other_optimizer, other = adam(resumed), schedule(resumed)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load({name: value.clone() for name, value in by_step.state().items()})
    moved = False
    for number in range(64, 101):
        before = by_step.kept.clone()
        step(model, optimizer, by_step, number)
        step(resumed, other_optimizer, other, number)
        moved |= not torch.equal(by_step.kept, before)
    assert moved
    for value, again in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, again)


def test_whole_parts_are_proportional_within_their_limits():
    assert shares([1, 1, 1, 1], 16, 8) == [4, 4, 4, 4]
    assert shares([6, 3, 1], 20, 16) == [12, 6, 2]
    assert shares([100, 1, 1], 12, 8) == [8, 2, 2]
    assert shares([0, 0, 5], 9, 9) == [1, 1, 7]


@BOTH
def test_the_sensitivity_of_a_layer_is_that_of_its_weight(quantize):
    model = adapted("tsqlora", quantize, every=1)
    expected = copy.deepcopy(model)
    weights = {}
    for path, layer in adapted_layers(expected):  # the same change over a weight that has a gradient
        weights[path] = layer.base_weight().requires_grad_()
        layer.forward = lambda x, layer=layer, weight=weights[path]: F.linear(
            x, weight + layer.adapter.delta(layer).dense(), layer.bias
        )
    watching = schedule(model)
    for _, layer in adapted_layers(model):
        layer.adapter.sensitivity.zero_()
    for one in (model, expected):
        one.train()(windows()).square().mean().backward()
    assert watching.hooks
    for path, layer in adapted_layers(model):
        product = (weights[path] * weights[path].grad).abs().mean()
        torch.testing.assert_close(layer.adapter.sensitivity, 0.15 * product, rtol=1e-3, atol=1e-9)


def test_tsqlora_moves_ranks_to_the_layers_that_matter_and_keeps_their_sum():
    torch.manual_seed(5)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.idle, self.last = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.last(h + self.idle(0 * h))

    seen = {path: Statistics(torch.ones(1), torch.ones(1), 1e-3) for path in ("first", "idle", "last")}
    model = apply_adapter(Model(), "tsqlora", ["first", "idle", "last"], rank=4, statistics=seen)
    by_step = schedule(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = torch.randn(64, 10), torch.randn(64, 4)
    ranks, jumps = [], []
    for step in range(80):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        before = model(x).detach()
        grown = [int(layer.adapter.kept.sum()) for _, layer in adapted_layers(model)]
        by_step.after_step((step + 1) / 80)
        ranks.append([int(layer.adapter.kept.sum()) for _, layer in adapted_layers(model)])
        if all(new >= old for new, old in zip(ranks[-1], grown, strict=True)):
            jumps.append(float((model(x).detach() - before).abs().max()))
    assert all(sum(row) == 12 for row in ranks)
    assert ranks[0] == [4, 4, 4]
    assert ranks[-1][1] == 1
    assert len({tuple(row) for row in ranks}) > 1
    assert max(jumps) == 0


def test_ranks_of_loaded_tsqlora_adapters_stay_until_something_is_known(tmp_path):
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    seen = {path: Statistics(torch.ones(1), torch.ones(1), value) for path, value in (("0", 1.0), ("2", 5.0))}
    model = apply_adapter(copy.deepcopy(plain), "tsqlora", ["0", "2"], statistics=seen, rank=4)
    schedule(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(plain, tmp_path)
    by_step = schedule(loaded)
    ranks = [int(layer.adapter.kept.sum()) for _, layer in adapted_layers(loaded)]
    assert ranks == [int(layer.adapter.kept.sum()) for _, layer in adapted_layers(model)] == [1, 7]
    for x in (torch.randn(16), torch.randn(2, 3, 16), torch.randn(0, 16)):  # also without a dimension of samples
        loaded(x).sum().backward()
    assert by_step.hooks


# Which layers


def test_the_modules_that_change_what_goes_in_are_told_from_those_that_do_not():
    torch.manual_seed(0)

    class Scale(nn.Module):
        def forward(self, x):
            return 3 * x + 1

    class Mix(nn.Module):
        def forward(self, x):
            return torch.randn_like(x)

    modules = [Scale(), Mix(), Scale()]
    x = torch.randn(500, 4, 6)
    same, other, also_same = changes(modules, lambda: nn.Sequential(*modules)(x))
    assert same == pytest.approx(0, abs=1e-6)
    assert also_same == pytest.approx(0, abs=1e-6)
    assert other > 0.9
    with pytest.raises(ValueError, match="1 of 3 modules did not run"):
        changes([*modules[:2], Scale()], lambda: nn.Sequential(*modules)(x))
    assert not any(module._forward_hooks for module in modules)


# A method more


@pytest.fixture
def documented(monkeypatch):
    """The method that docs/architecture.md has as an example, registered."""
    text = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(compile(code, "docs/architecture.md", "exec"), names)  # our own page
    monkeypatch.setitem(ADAPTERS, "vera", names["VeRA"])
    return "vera"


def test_the_documented_method_does_what_all_must(documented, tmp_path):
    test_a_new_adapter_starts_as_declared(documented)
    for quantize in (False, True):
        test_merged_equals_unmerged(documented, quantize)
        test_training_moves_the_adapter_and_nothing_else(documented, quantize)
        test_saved_and_loaded_it_computes_the_same(documented, quantize, tmp_path / str(quantize))
    test_peft_reads_what_a_low_rank_adapter_changes(documented, tmp_path / "lora")
    test_a_low_rank_method_calls_the_same_operators_as_lora(documented)
    for _, layer in adapted_layers(adapted(documented, rank=6)):
        assert layer.adapter.trainable() == 6 + layer.out_features


# Files


NUMBERS = {  # 4-byte numbers and other bytes that a file has of one layer, by rank, in_features and out_features
    "lora": lambda r, i, o: (r * (i + o), 0),
    "dora": lambda r, i, o: (r * (i + o) + o, 0),
    "pissa": lambda r, i, o: (2 * r * (i + o), 0),  # where it started, too
    "lora_ga": lambda r, i, o: (2 * r * (i + o), 0),
    "lora_xs": lambda r, i, o: (r * r + r * (i + o), 0),  # the bases, too
    "lora_sb": lambda r, i, o: (r * r + r * (i + o), 0),
    "matryoshka": lambda r, i, o: (r * (i + o), 0),
    "dylora": lambda r, i, o: (r * (i + o), 0),
    "adalora": lambda r, i, o: (6 * (i + o + 1), 6),  # a new one has first_rank, and which are kept
    "ia3": lambda r, i, o: (o, 0),
    "paca": lambda r, i, o: (r * o, 8 * r),
    "one_bit": lambda r, i, o: (4, -(-r * i // 8) - (-r * o // 8)),
    "hydra": lambda r, i, o: (r // 2 * (i + o) + r * o, 0),
    "tsqlora": lambda r, i, o: (r * (i + o), 2 * r),  # of the rows that are kept, 2·rank bits in bytes
    "squeeze": lambda r, i, o: (r * (i + o), 8),
}


@pytest.mark.parametrize("method", NUMBERS)
def test_a_file_is_as_small_as_it_can_be(method, tmp_path):
    model = nn.Sequential(nn.Linear(24, 40))
    seen = {"0": Statistics(torch.randn(40, 24), torch.rand(40, 24), 1.0)}
    options = {} if method == "ia3" else {"rank": 4}
    apply_adapter(model, method, ["0"], statistics=seen, **options)
    if method == "squeeze":
        model[0].adapter.squeeze(4)
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    numbers, others = NUMBERS[method](4, 24, 40)
    assert sum(value.nbytes for value in stored.values()) == 4 * numbers + others


def test_one_bit_levels_are_the_best_two_and_stay_what_they_are():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    rounded = binary(values)
    assert len(rounded.unique()) == 2
    assert torch.equal(binary(rounded), rounded)
    error = (rounded - values).square().mean()
    for level in (0.6745, 0.7978845608):
        other = values.mean() + level * values.std() * torch.where(values >= values.mean(), 1.0, -1.0)
        assert error <= (other - values).square().mean()
    assert not binary(torch.zeros(3, 4)).any()


def test_a_lora_is_squeezed_step_by_step_and_the_last_step_is_exact():
    torch.manual_seed(2)
    model = apply_adapter(nn.Sequential(nn.Linear(12, 20)), "squeeze", ["0"], rank=2, first_rank=8)
    with torch.no_grad():
        model[0].adapter.B.normal_()
    before = model[0].adapter.delta(model[0]).dense()
    by_step = schedule(model)
    ranks = []
    for step in range(40):
        by_step.after_step((step + 1) / 40)
        ranks.append(int(torch.linalg.matrix_rank(model[0].adapter.delta(model[0]).dense())))
    assert ranks[0] == 8
    assert sorted(set(ranks), reverse=True) == [8, 6, 4, 3, 2]
    U, S, Vt = torch.linalg.svd(before)
    torch.testing.assert_close(
        model[0].adapter.delta(model[0]).dense(), (U[:, :2] * S[:2]) @ Vt[:2], atol=1e-5, rtol=1e-4
    )


@BOTH
@pytest.mark.parametrize("method", ["lora", "paca"])
def test_where_A_does_not_train_backward_keeps_t_in_place_of_x(method, quantize):
    def kept(**options):
        model = apply_adapter(nn.Sequential(nn.Linear(192, 64)), method, ["0"], quantize=quantize, **options)
        held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(1000, 192, requires_grad=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        y.sum().backward()
        return sum(sizes.values())

    t, x, one_hot = 1000 * 8 * 4, 1000 * 192 * 4, 8 * 192 * 4
    if method == "lora":
        assert kept() == t + x
        assert kept(frozen_A=True) == t
    else:
        assert kept() == t + one_hot


# What each method is for


def of_one_layer(method, weight, gradient=None, **options):
    """One layer with an adapter, and the layer as it was."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = nn.Sequential(copy.deepcopy(linear))
    gradient = torch.ones_like(weight) if gradient is None else gradient
    statistics = {"0": Statistics(gradient, gradient.square(), 1.0)}
    return apply_adapter(model, method, ["0"], statistics=statistics, **options)[0], linear


def first_step(layer, gradient, rate=1e-3):
    """How the weight changes in a step of gradient descent, where its own gradient is ``gradient``."""

    def change():
        return layer.adapter.delta(layer).dense()

    before = change()
    (before * gradient).sum().backward()
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return (change() - before).detach()


def test_the_first_step_of_lora_ga_follows_the_gradient_more_than_that_of_lora():
    for seed in range(3):
        torch.manual_seed(seed)
        weight, gradient = torch.randn(30, 40), torch.randn(30, 5) @ torch.randn(5, 40) + 0.3 * torch.randn(30, 40)
        followed = {}
        for method in ("lora", "lora_ga"):
            layer, _ = of_one_layer(method, weight, gradient, rank=4)
            step = first_step(layer, gradient)
            followed[method] = float(F.cosine_similarity(-gradient.flatten(), step.flatten(), dim=0))
        U, S, Vt = torch.linalg.svd(gradient)
        best = (U[:, :8] * S[:8]) @ Vt[:8]  # of rank 2r: no step of two factors of rank r is nearer
        reachable = float(F.cosine_similarity(gradient.flatten(), best.flatten(), dim=0))
        assert followed["lora"] < followed["lora_ga"] - 0.2
        assert followed["lora_ga"] > 0.9 * reachable


def test_lora_sb_starts_at_the_best_low_rank_step_and_lora_xs_does_not():
    torch.manual_seed(0)
    weight, gradient = torch.randn(30, 40), torch.randn(30, 40)
    wanted = -0.01 * gradient.sign()
    layer, _ = of_one_layer("lora_sb", weight, gradient, rank=6, rate=0.01)
    U, S, Vt = torch.linalg.svd(wanted, full_matrices=False)
    torch.testing.assert_close(layer.adapter.delta(layer).dense(), (U[:, :6] * S[:6]) @ Vt[:6], atol=1e-6, rtol=1e-4)
    other, _ = of_one_layer("lora_xs", weight, rank=6)
    bases = [other.adapter.delta(other).B, other.adapter.A]
    within = bases[0] @ torch.linalg.pinv(bases[0]) @ wanted @ torch.linalg.pinv(bases[1]) @ bases[1]
    assert (wanted - layer.adapter.delta(layer).dense()).norm() < 0.95 * (wanted - within).norm()


def test_pissa_loses_less_in_4_bits_where_the_spectrum_has_spikes():
    torch.manual_seed(1)
    spikes = 8 * torch.linalg.qr(torch.randn(64, 4))[0] @ torch.linalg.qr(torch.randn(96, 4))[0].T
    for weight, better in ((spikes + 0.05 * torch.randn(64, 96), True), (torch.randn(64, 96), False)):
        errors = []
        for method in ("lora", "pissa"):
            model = nn.Sequential(nn.Linear(96, 64))
            with torch.no_grad():
                model[0].weight.copy_(weight)
            apply_adapter(model, method, ["0"], rank=4, quantize=True)
            errors.append(float((model[0].merge().weight.detach() - weight).norm()))
        assert (errors[1] < 0.7 * errors[0]) is better


def test_paca_changes_the_chosen_columns_alone_and_gradients_choose_the_strongest():
    torch.manual_seed(2)
    weight, gradient = torch.randn(20, 50), torch.randn(20, 50) * torch.linspace(0.1, 2, 50)
    layer, linear = of_one_layer("paca", weight, gradient, rank=5, choose="gradient")
    columns = layer.adapter.index
    held = gradient.square().sum(dim=0)
    for _ in range(50):
        assert held[columns].sum() >= held[torch.randperm(50)[:5]].sum()
    with torch.no_grad():
        layer.adapter.values.normal_()
    merged = layer.merge().weight
    changed = (merged != linear.weight).any(dim=0).nonzero().flatten()
    assert changed.tolist() == columns.tolist()
    other, _ = of_one_layer("paca", weight, rank=5)
    assert other.adapter.index.tolist() != columns.tolist()


def test_hydra_without_its_sequential_half_is_lora():
    torch.manual_seed(3)
    weight = torch.randn(20, 30)
    layer, linear = of_one_layer("hydra", weight, rank=4, alpha=8.0)
    with torch.no_grad():
        layer.adapter.B[:, :2].normal_()  # the parallel half
    plain, _ = of_one_layer("lora", weight, rank=2, alpha=4.0)
    with torch.no_grad():
        plain.adapter.A.copy_(layer.adapter.A_parallel)
        plain.adapter.B.copy_(layer.adapter.B[:, :2])
    plain.bias = layer.bias
    x = torch.randn(7, 30)
    torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad():
        layer.adapter.B[:, 2:].normal_()
    behind = layer.adapter.scale * (layer.adapter.B[:, 2:] @ layer.adapter.A_sequential)
    expected = plain(x) + F.linear(x, linear.weight) @ behind.T
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_a_file_of_uni_lora_is_one_vector(tmp_path):
    save_adapter(adapted("uni_lora", size=77), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert [value.numel() for value in stored.values()] == [77]


@EVERY
def test_a_layer_compiles_whole(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    seen = {"0": Statistics(torch.randn(40, 24), torch.rand(40, 24), 1.0)}
    apply_adapter(model, method, ["0"], quantize=True, statistics=seen)
    x = torch.randn(5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = []
        for one in (model, compiled):
            torch.manual_seed(1)
            found.append(torch.autograd.grad(one(x).square().sum(), trained))
        torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_some_layers_may_have_other_ranks():
    model = apply_adapter(
        pretrained(), "adalora", TARGETS, rank=4, alpha=8.0, rank_pattern={"fc1": 2, "blocks.0.*.q": 6},
        alpha_pattern={"fc1": 4.0},
    )  # fmt: skip
    found = {path: (layer.adapter.rank, layer.adapter.scale) for path, layer in adapted_layers(model)}
    assert found["blocks.1.fc1"] == (2, 2.0)
    assert found["blocks.0.attention.q"] == (6, 8 / 6)
    assert found["blocks.1.attention.q"] == (4, 2.0)
    with pytest.raises(ValueError, match="ia3 has no option rank"):
        apply_adapter(pretrained(), "ia3", TARGETS, rank_pattern={"fc1": 2})
