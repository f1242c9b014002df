"""Putting adapters into models."""

import copy

import pytest
import torch
from torch import nn

import harlora
from harlora import LoRALinear, QLoRALinear, apply_lora, apply_qlora, merge_adapters
from harlora.models import MAE, Classifier
from harlora.nn import adapted_layers, apply_adapter, load_adapter, save_adapter
from harlora.nn.apply import schedule


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 12), "xfc1": nn.Linear(12, 8)}) for _ in "ab")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.q(x)
        for block in self.blocks:
            x = block["xfc1"](block["fc1"](x).relu())
        return self.head(x)


APPLY = pytest.mark.parametrize("apply", [apply_lora, apply_qlora])


@APPLY
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q", "fc1"], ["q", "blocks.0.fc1", "blocks.1.fc1"]),
        (["blocks.1.fc1"], ["blocks.1.fc1"]),
        ([r"1.fc1"], ["blocks.1.fc1"]),
        (r"blocks\.\d\.x?fc1", ["blocks.0.fc1", "blocks.0.xfc1", "blocks.1.fc1", "blocks.1.xfc1"]),
        ("all-linear", ["q", "blocks.0.fc1", "blocks.0.xfc1", "blocks.1.fc1", "blocks.1.xfc1", "head"]),
    ],
)
def test_targets(apply, targets, expected):
    model = Toy()
    assert apply(model, targets, rank=2) is model
    assert [path for path, _ in adapted_layers(model)] == expected
    assert {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == set(expected)


@APPLY
def test_every_adapter_of_every_target_gets_a_gradient(apply):
    model = Classifier(MAE().encoder, 6)
    apply(model.encoder, ["q", "k", "v", "o", "fc1", "fc2"], rank=4)
    layers = dict(adapted_layers(model))
    assert len(layers) == 36
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.02)  # lora_A has no gradient while lora_B is zero
    model(torch.randn(4, 128, 6)).square().sum().backward()
    for path, layer in layers.items():
        assert layer.lora_A.grad.abs().sum() > 0, path
        assert layer.lora_B.grad.abs().sum() > 0, path


def test_the_output_is_close_to_the_dense_model():
    model = Toy()
    x = torch.randn(5, 8)
    before = model(x)
    dense = apply_lora(copy.deepcopy(model), "all-linear")
    torch.testing.assert_close(dense(x), before)
    assert (apply_qlora(model, "all-linear")(x) - before).norm() < 0.3 * before.norm()


def test_a_shared_layer_stays_one_layer():
    model = Toy()
    model.blocks[1]["fc1"] = model.blocks[0]["fc1"]
    apply_qlora(model, ["fc1"])
    assert model.blocks[1]["fc1"] is model.blocks[0]["fc1"]
    assert isinstance(model.blocks[0]["fc1"], QLoRALinear)


def test_a_layer_that_one_module_uses_twice_stays_one_layer():
    linear = nn.Linear(8, 8)
    model = apply_lora(nn.Sequential(linear, nn.ReLU(), linear), "all-linear")
    assert isinstance(model[0], LoRALinear)
    assert model[2] is model[0]
    merge_adapters(model)
    assert type(model[0]) is nn.Linear
    assert model[2] is model[0]


def with_a_moved_adapter(apply, **options):
    """A TransformerEncoder whose feed-forward layers compute something else than before."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = apply(nn.TransformerEncoder(layer, 2), targets := ["linear1", "linear2"], **options).eval()
    assert len(list(adapted_layers(model))) == 2 * len(targets)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_adapters_in_a_transformer_encoder_of_torch_are_not_passed_by(method, tmp_path):
    apply = {"lora": apply_lora, "qlora": apply_qlora}.get(method, lambda *a: apply_adapter(a[0], method, a[1]))
    model = with_a_moved_adapter(apply)
    x, mask = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    fresh = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    others = [copy.deepcopy(model), merge_adapters(copy.deepcopy(model))]
    if method != "qlora":
        others.append(load_adapter(fresh, tmp_path))
    for given in ({}, {"src_key_padding_mask": mask}):
        expected = copy.deepcopy(model).train()(x, **given).detach()
        for other in (model, *others):
            for grad in (torch.enable_grad, torch.no_grad):
                with grad():
                    found = other.eval()(x, **given)
                torch.testing.assert_close(found[~mask], expected[~mask], rtol=1e-3, atol=1e-4)


class WithMultihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


@APPLY
def test_the_output_projection_of_multihead_attention_is_refused(apply):
    model = WithMultihead()
    with pytest.raises(ValueError, match=r"names attention\.out_proj, the output projection of an nn.MultiheadAtt"):
        apply(model, ["out_proj", "fc"])
    assert type(model.fc) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match=r"get no adapter.*attention\.out_proj"):
        apply(model, "all-linear")
    assert [path for path, _ in adapted_layers(model)] == ["fc"]
    model(torch.randn(2, 3, 8)).sum().backward()
    assert model.fc.lora_B.grad is not None


@APPLY
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query"], r"matches no layer; the model's linear layers are: q, blocks.0.fc1"),
        ([], "matches no layer"),
        (["blocks"], "blocks must be an nn.Linear"),
        (["0"], "blocks.0 must be an nn.Linear"),
    ],
)
def test_wrong_targets_are_refused_and_nothing_changes(apply, targets, message):
    model = Toy()
    with pytest.raises(ValueError, match=message):
        apply(model, targets)
    assert not list(adapted_layers(model))
    assert all(p.requires_grad for p in model.parameters())


@APPLY
def test_a_second_adapter_is_refused(apply):
    model = apply(Toy(), ["q"])
    with pytest.raises(ValueError, match="q carries an adapter already"):
        apply(model, ["q"])


def test_adapters_of_other_layers_stay_as_they_are():
    def trained(model):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    model = apply_lora(Toy(), ["q"])
    first = {"q.lora_A", "q.lora_B"}
    apply_adapter(model, "lora", ["blocks.0.fc1"], frozen_A=True)
    second = first | {"blocks.0.fc1.adapter.B"}
    assert trained(model) == second
    model.q.bias.requires_grad_(True)
    assert trained(apply_qlora(model, ["head"])) == second | {"head.lora_A", "head.lora_B"}


def test_of_several_methods_one_may_have_a_schedule():
    for methods in (["lora", "adalora"], ["adalora", "lora"]):
        model = Toy()
        for method, target in zip(methods, ["q", "head"], strict=True):
            apply_adapter(model, method, [target], rank=2)
        (adapter,) = schedule(model).adapters
        assert adapter.name == "adalora"
    apply_adapter(model, "squeeze", ["blocks.0.fc1"])
    with pytest.raises(ValueError, match="got adalora and squeeze; train them apart"):
        schedule(model)
    assert schedule(apply_adapter(Toy(), "dora", ["q"])) is None
    assert schedule(Toy()) is None


def test_the_model_itself_cannot_be_replaced():
    with pytest.raises(ValueError, match="use from_linear"):
        apply_qlora(nn.Linear(4, 4), ".*")
    with pytest.raises(ValueError, match="call its merge"):
        merge_adapters(QLoRALinear(4, 4))


def test_an_error_on_the_way_leaves_the_model_whole():
    model = Toy()
    model.blocks[1]["fc1"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        apply_qlora(model, "all-linear")
    assert type(model.q) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


@APPLY
def test_merging_a_model(apply):
    model = apply(Toy(), "all-linear", rank=3)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 8)
    expected = model(x)
    assert merge_adapters(model) is model
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, (nn.Linear, LoRALinear, QLoRALinear)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_training_mode_is_kept():
    assert not apply_qlora(Toy().eval(), ["q"]).q.training
    assert harlora.apply_qlora(Toy(), ["q"]).q.training


@pytest.mark.parametrize("apply", [apply_lora, apply_qlora])
def test_patterns_give_some_layers_another_rank_as_in_peft(apply):
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(8, 8), "fc1": nn.Linear(8, 8)}), "fc1": nn.Linear(8, 8)})
    apply(model, ["q", "fc1"], rank=2, alpha=4, rank_pattern={"a.fc1": 5, "q|v": 3}, alpha_pattern={"q": 6})
    found = {path: (layer.rank, layer.alpha) for path, layer in adapted_layers(model)}
    assert found == {"a.q": (3, 6), "a.fc1": (5, 4), "fc1": (2, 4)}
