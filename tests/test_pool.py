"""Many adapters over one model, against the same adapters loaded one by one."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from harlora.bench import forgetting, placements, pool
from harlora.data.catalog import load_windows
from harlora.data.labels import VOCABULARY
from harlora.data.splits import split
from harlora.errors import InputError
from harlora.models import MAEConfig
from harlora.models.mae import Classifier, Encoder
from harlora.nn import (
    AdapterPool,
    QLoRALinear,
    Router,
    apply_adapter,
    apply_lora,
    apply_qlora,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from harlora.nn.linear import AdaptedLinear
from harlora.train.finetune import load_classifier
from harlora.train.pretrain import load_mae, load_pretrained, pretrain
from small import FINETUNE, PRETRAIN

CONFIG = MAEConfig(patch_size=16, width=64, depth=2, heads=2, ffn=96)
TARGETS = ["q", "k", "v", "o", "fc1", "fc2"]
X = torch.randn(9, CONFIG.window, CONFIG.channels, generator=torch.Generator().manual_seed(8))
INDEX = torch.tensor([0, 2, 1, -1, 2, 0, 0, 1, -1])


def base(quantize):
    torch.manual_seed(3)
    model = Classifier(Encoder(CONFIG), 4)
    return (apply_qlora(model, TARGETS, rank=0) if quantize else model).eval()


def trained(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of ranks 2 and 4 and of another method; the last trains norms, biases and the head too."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for name, rank in (("hip", 2), ("wrist", 4)):
        made[name] = apply_qlora(base(False), TARGETS, rank=rank)
    made["ankle"] = apply_adapter(base(False), "adalora", TARGETS, rank=3, quantize=True)
    for name, parameter in made["ankle"].named_parameters():
        if name.endswith("bias") or "norm" in name or name.startswith("head"):
            parameter.requires_grad_(True)
    for seed, (name, model) in enumerate(made.items()):
        save_adapter(trained(model, seed), folder / name)
    return {name: folder / name for name in made}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_each_row_is_what_its_own_adapter_gives(folders, quantize, mixed):
    pool = AdapterPool(base(quantize), folders, mixed=mixed)
    assert pool.names == ("hip", "wrist", "ankle")
    plain = base(quantize)
    alone = [load_adapter(copy.deepcopy(plain), folder).eval() for folder in folders.values()]
    with torch.no_grad():
        expected = torch.stack(
            [(alone[i] if i >= 0 else plain)(row[None])[0] for row, i in zip(X, INDEX.tolist(), strict=True)]
        )
    torch.testing.assert_close(pool(X, INDEX), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(INDEX, pool.index(["hip", "ankle", "wrist", None, "ankle", "hip", "hip", "wrist", None]))
    only = pool(X[:2], torch.tensor([1, 1]))
    torch.testing.assert_close(only, alone[1](X[:2]).detach(), atol=2e-5, rtol=2e-5)
    assert pool(X[:0], INDEX[:0]).shape == (0, 4)


@pytest.mark.parametrize("mixed", [False, True])
def test_one_copy_of_the_weights_serves_all(folders, mixed):
    model = base(True)
    packed = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".weight")}
    before = {buffer.data_ptr(): buffer.clone() for buffer in packed.values()}
    pool = AdapterPool(model, folders, mixed=mixed)
    layers = [module for module in pool.modules() if isinstance(module, QLoRALinear)]
    assert len(layers) == 12 * (1 if mixed else len(folders) + 1)
    assert {layer.weight.data_ptr() for layer in layers} == set(before)
    assert all(torch.equal(layer.weight, before[layer.weight.data_ptr()]) for layer in layers)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_a_pool_is_built_without_copies_of_what_no_adapter_has(folders, monkeypatch, quantize):
    seen = []
    whole = load_adapter
    monkeypatch.setattr(
        "harlora.nn.pool.load_adapter", lambda model, folder: seen.append(model) or whole(model, folder)
    )
    model = base(quantize)
    first = model.encoder.blocks[0].attention.q.weight.data_ptr(), model.head[0].weight.data_ptr()
    AdapterPool(model, folders)
    for name, one in zip(folders, seen, strict=True):
        assert one.encoder.blocks[0].attention.q.weight.data_ptr() == first[0]
        assert (one.head[0].weight.data_ptr() == first[1]) == (name != "ankle")


def test_what_cannot_be_pooled_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="got none"):
        AdapterPool(base(False), {})
    pool = AdapterPool(base(True), folders, mixed=True)
    with pytest.raises(ValueError, match="index must be int64 of shape"):
        pool(X, INDEX[:3])
    with pytest.raises(ValueError, match="index must be from -1 to 2"):
        pool(X, INDEX + 1)
    with pytest.raises(ValueError, match="names must be None or of hip, wrist, ankle, got chest"):
        pool.index(["hip", "chest", None])
    for one in (pool, AdapterPool(base(True), folders, mixed=False)):
        with pytest.raises(ValueError, match="depends on its input"):
            merge_adapters(one)
    for method, message in (("dora", "not a low-rank change"), ("pissa", "over another weight than the 4-bit one")):
        save_adapter(apply_adapter(base(False), method, TARGETS, rank=2), tmp_path / method)
        with pytest.raises((ValueError, InputError), match=message):
            AdapterPool(base(True), {"one": tmp_path / method}, mixed=True)


class Scaled(nn.Module):
    """Trains a tensor of its own, around an adapted layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.q = nn.Linear(16, 16)

    def forward(self, x):
        return self.q(x * self.scale)


class Twice(nn.Module):
    """Holds one layer under two names, in one module and in another."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.ModuleDict({"q": nn.Linear(16, 16)}), nn.ModuleDict()
        self.first["again"] = self.other["q"] = self.first["q"]

    def forward(self, x):
        return self.other["q"](self.first["again"](self.first["q"](x).relu()).relu())


MODELS = {
    "root": Scaled,
    "within": lambda: nn.Sequential(Scaled(), nn.ReLU(), nn.Linear(16, 4)),
    "twice": Twice,
    "torch": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_modules_of_all_kinds_are_pooled(kind, mixed, tmp_path):
    def plain():
        torch.manual_seed(2)
        return MODELS[kind]().eval()

    models = []
    for seed in range(2):
        models.append(apply_lora(plain(), ["q"] if kind != "torch" else ["linear1", "linear2"], rank=4))
        for name, parameter in models[-1].named_parameters():
            if name.endswith("scale") or "norm" in name:
                parameter.requires_grad_(True)
        save_adapter(trained(models[-1], seed).eval(), tmp_path / str(seed))
    pool = AdapterPool(plain(), {str(seed): tmp_path / str(seed) for seed in range(2)}, mixed=mixed)
    x = torch.randn(9, 5, 16)
    index = torch.tensor([0, 1, 1, -1, -1, 0, 0, 1, -1])
    with torch.no_grad():
        expected = torch.stack([[*models, plain()][i](row[None])[0] for i, row in zip(index.tolist(), x, strict=True)])
    torch.testing.assert_close(pool(x, index), expected, atol=2e-5, rtol=2e-5)
    assert [isinstance(module, AdaptedLinear) for module in pool.modules()].count(True) == {
        "root": 2, "within": 2, "twice": 0 if mixed else 2, "torch": 0 if mixed else 4
    }[kind]  # fmt: skip


def test_a_model_with_adapters_is_refused(folders):
    for model in (apply_qlora(base(False), TARGETS, rank=2), apply_adapter(base(False), "dora", TARGETS)):
        for mixed in (False, True):
            with pytest.raises(ValueError, match="must be without adapters, got one at encoder.blocks.0.attention.q"):
                AdapterPool(model, folders, mixed=mixed)
        assert any(parameter.requires_grad for parameter in model.parameters())


def test_tensors_with_two_names_are_not_written_to(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.q, self.b = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.q(self.a(x)))

    torch.manual_seed(2)
    model = Tied().eval()
    before = copy.deepcopy(model.state_dict())
    other = apply_lora(copy.deepcopy(model), ["q"], rank=2)
    other.b.weight = nn.Parameter(torch.ones(16, 16))
    save_adapter(other, tmp_path)
    pool = AdapterPool(model, {"one": tmp_path}, mixed=False)
    x = torch.randn(4, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(pool(x, torch.zeros(4, dtype=torch.int64)), model(x))


def test_adapters_of_any_method_take_turns(tmp_path):
    model = trained(apply_adapter(base(False), "dora", TARGETS, rank=2, quantize=True), 5).eval()
    save_adapter(model, tmp_path / "dora")
    pool = AdapterPool(base(True), {"one": tmp_path / "dora"})  # on a CPU they are not mixed
    with torch.no_grad():
        torch.testing.assert_close(pool(X, torch.zeros(9, dtype=torch.int64)), model(X))


def test_a_router_learns_which_adapter_a_sample_needs():
    torch.manual_seed(0)
    centres = 3 * torch.randn(3, 8)
    index = torch.randint(3, (300,))
    features = centres[index] + torch.randn(300, 8) + 100
    router = Router(features[:200], index[:200])
    assert (router(features[200:]) == index[200:]).float().mean() > 0.95
    shuffled = Router(features[:200], index[:200][torch.randperm(200)])
    assert (shuffled(features[200:]) == index[200:]).float().mean() < 0.7
    assert isinstance(router, nn.Module)
    assert not list(router.parameters())


# Studies with pools


def test_all_ways_of_the_benchmark_give_the_same():
    rows = pool.measure(3, 7, 0.0)
    assert {row["name"] for row in rows} >= {pool.POOL, pool.MIXED}
    assert all(row["relative_error"] < 5e-2 for row in rows)
    assert all(row["rounds"] >= 5 and row["seconds"] > 0 for row in rows)
    assert [row["ratio_to_pool"] for row in rows if row["name"] == pool.POOL] == [1.0]
    # One set of 4-bit weights: each adapter more is the size of an adapter.
    more = pool.measure(4, 7, 0.0)
    size = pool.MODELS["A"]
    layers = size.depth * (4 * 2 * size.width + 2 * (size.width + size.ffn))
    grown = more[0]["held_bytes"] - rows[0]["held_bytes"]
    assert grown == pytest.approx(4 * pool.RANK * layers, rel=0.01)


def test_what_adapting_does_to_what_was_learned(tmp_path):
    target, source = (load_windows(name, tmp_path) for name in ("synthetic_a", "synthetic_c"))
    file = pretrain(PRETRAIN, [source], tmp_path / "runs", device=torch.device("cpu"))
    mae, pretrained = load_mae(file), load_pretrained(file)
    loss = forgetting.restoring(mae, [source], 64)
    before = loss(mae.encoder)
    # Better than the mean over the last of the two epochs, and than with another encoder.
    assert before < pretrained.loss
    assert loss(Encoder(pretrained.encoder.config)) > before
    config = replace(FINETUNE, method="lora", rank=1, max_windows=0, learning_rate=0.05)
    found = forgetting.measured(target, pretrained, loss, config, tmp_path / "runs")
    assert found["loss"] != before
    assert found["intruders"] > 0
    assert found["milder"]["loss"] != found["loss"]
    full = forgetting.measured(target, pretrained, loss, replace(FINETUNE, method="full"), tmp_path / "runs")
    assert "milder" not in full
    file.with_name("decoder.safetensors").unlink()
    with pytest.raises(InputError, match="pretrain again"):
        load_mae(file)


def test_a_router_between_two_ways_of_wearing(tmp_path):
    sets = [load_windows(name, tmp_path) for name in ("synthetic_a", "synthetic_b")]
    file = pretrain(PRETRAIN, [load_windows("synthetic_c", tmp_path)], tmp_path / "runs", device=torch.device("cpu"))
    config = replace(FINETUNE, method="qlora", epochs=1, max_windows=0)
    found = placements.compared(sets, load_pretrained(file), config, tmp_path / "runs")
    ways = found["scores"]
    assert 0 <= ways.pop("router right") <= 1
    assert len(ways) == 5
    tested = [split(windows, "subject", config.seed).test for windows in sets]
    assert found["windows"]["test"] == sum(map(len, tested))
    for way in ways.values():
        assert np.sum(way["confusion"]) == found["windows"]["test"]
    # What the pool gives with the right choice is what each classifier gives by itself.
    correct = 0
    for windows, part in zip(sets, tested, strict=True):
        (folder,) = (tmp_path / "runs").glob(f"qlora-{windows.dataset}-*")
        model, normalizer, labels = load_classifier(folder / "classifier.safetensors")
        with torch.no_grad():
            best = model(torch.from_numpy(normalizer(windows.signals[part]))).argmax(dim=1)
        named = [labels[k] for k in best.tolist()]
        correct += sum(VOCABULARY[label] == name for label, name in zip(windows.labels[part], named, strict=True))
    assert ways["two adapters, the right choice"]["accuracy"] == pytest.approx(
        correct / found["windows"]["test"], abs=0.01
    )
