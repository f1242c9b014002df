"""Adapters on disk, against the real PEFT, in both directions."""

import copy
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from harlora import QLoRALinear, apply_lora, apply_qlora, load_adapter, save_adapter
from harlora.errors import InputError
from harlora.nn import adapted_layers, apply_adapter
from harlora.nn.adapters import Statistics


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in "ab")
        self.decoder = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(8, 8)})])})
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x):
        x = self.q(x)
        for block in self.blocks:
            x = block["norm"](block["fc1"](x))
        return self.head(self.decoder["blocks"][0]["fc1"](x))


def toy():
    torch.manual_seed(4)
    return Toy().eval()


TARGETS = r"q|blocks\.\d\.fc1"  # not the decoder's
X = torch.linspace(-1, 1, 40).view(5, 8)


def trained(apply, **options):
    model = apply(toy(), TARGETS, rank=3, alpha=6, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_()
    return model


def in_peft(**options):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **options)
    model = peft.get_peft_model(toy(), config).eval()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    assert any("lora_B" in name for name, _ in model.named_parameters())
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_ours_loads_in_peft(tmp_path, rslora):
    model = trained(apply_lora, rslora=rslora)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(toy(), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(X), model(X))
    assert not any("decoder" in name and "lora" in name for name, _ in theirs.named_parameters())


def test_ours_with_everything_trained_loads_in_peft(tmp_path):
    model = trained(apply_lora)
    model.blocks[0]["norm"].requires_grad_(True)
    model.head.requires_grad_(True)
    model.q.bias.requires_grad_(True)
    with torch.no_grad():
        model.blocks[0]["norm"].bias.add_(1.0)
        model.q.bias.add_(0.5)
        model.head[0].weight.mul_(2.0)
        model.head[1].running_mean.add_(0.25)
    save_adapter(model, tmp_path)
    again = load_adapter(toy(), tmp_path).eval()
    torch.testing.assert_close(again(X), model(X))
    theirs = peft.PeftModel.from_pretrained(toy(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))


def test_of_a_layer_whose_bias_alone_trains_the_bias_alone_is_saved(tmp_path):
    model = trained(apply_lora)
    model.head[0].bias.requires_grad_(True)
    with torch.no_grad():
        model.head[0].bias.add_(1.0)
    save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key for key in keys if "lora" not in key} == {"base_model.model.head.0.bias"}
    torch.testing.assert_close(load_adapter(toy(), tmp_path).eval()(X), model(X))
    theirs = peft.PeftModel.from_pretrained(toy(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))


def test_ours_with_ranks_of_its_own_for_layers(tmp_path):
    model = apply_lora(toy(), ["q"], rank=2, alpha=6)
    apply_lora_again = apply_lora(nn.ModuleDict({"blocks": model.blocks}), ["fc1"], rank=4, alpha=2)
    assert apply_lora_again["blocks"] is model.blocks
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(toy(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))
    torch.testing.assert_close(load_adapter(toy(), tmp_path)(X), model(X))


def test_ranks_and_alphas_are_of_whole_paths(tmp_path):
    torch.manual_seed(4)
    layers = {"first": nn.Linear(8, 8), "fc": nn.Linear(8, 8), "block": nn.Sequential()}
    layers["block"].add_module("fc", nn.Linear(8, 8))
    plain = nn.Sequential()
    for name, layer in layers.items():
        plain.add_module(name, layer)
    model = copy.deepcopy(plain)
    apply_lora(model, "all-linear", rank=4, alpha=16, rank_pattern={"^fc": 2}, alpha_pattern={"^fc": 64})
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(plain), tmp_path)
    found = {path: (layer.rank, layer.alpha) for path, layer in adapted_layers(again)}
    assert found == {"first": (4, 16), "fc": (2, 64), "block.fc": (4, 16)}
    torch.testing.assert_close(again(X), model(X))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))
    edit(tmp_path, rank_pattern={"fc": 2, "block.fc": 4}, alpha_pattern={"^fc": 64})  # as keys were before
    with pytest.raises(InputError, match=r"block\.fc\.lora_A\.weight must have shape \(2, 8\)"):
        load_adapter(copy.deepcopy(plain), tmp_path)
    edit(tmp_path, rank_pattern={"block.fc": 4, "fc": 2})
    torch.testing.assert_close(load_adapter(plain, tmp_path)(X), model(X))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"fc1": 5}, "alpha_pattern": {"q": 1}},
        {"bias": "lora_only"},
        {"modules_to_save": ["head", "norm"]},
        {"lora_dropout": 0.25},
    ],
)
def test_peft_adapter_loads_into_a_plain_model(tmp_path, options):
    theirs = in_peft(**options)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(toy(), tmp_path).eval()
    torch.testing.assert_close(ours(X), theirs(X))
    assert len(list(adapted_layers(ours))) == 3
    assert ours.q.dropout == options.get("lora_dropout", 0.0)


def initialised(init, tmp_path):
    """A trained adapter of PEFT, and the folder of the same before training."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init)
    model = peft.get_peft_model(toy(), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, tmp_path / "initial"


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
def test_peft_adapters_over_the_models_own_weight_load(tmp_path, init):
    theirs, _ = initialised(init, tmp_path)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(toy(), tmp_path)(X), theirs(X))


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")  # PEFT's, converting
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_peft_adapters_over_a_weight_that_peft_changed_are_refused_unless_converted(tmp_path, init):
    theirs, before = initialised(init, tmp_path)
    expected = theirs(X)
    theirs.save_pretrained(tmp_path)
    refused(toy(), tmp_path, f"init_lora_weights must be True or .*, got '{init}'; .*path_initial_model_for_weight_con")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=before)
    torch.testing.assert_close(load_adapter(toy(), tmp_path / "converted")(X), expected)


@pytest.mark.parametrize("key", ["velora_config", "monteclora_config", "kasa_config"])
def test_variants_of_peft_are_refused(tmp_path, key):
    edit(saved(tmp_path), **{key: {"beta": 1e-4}})
    refused(toy(), tmp_path, f"{key} must be None, got")


def test_peft_adapter_loads_over_a_4_bit_base(tmp_path):
    theirs = in_peft()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(apply_qlora(toy(), TARGETS, rank=3, alpha=6), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for path, layer in adapted_layers(ours):
        assert torch.equal(layer.lora_B, stored[f"base_model.model.{path}.lora_B.weight"])
    assert (ours(X) - theirs(X)).norm() < 0.3 * theirs(X).norm()


def test_round_trip_over_a_4_bit_base(tmp_path):
    model = trained(apply_qlora)
    save_adapter(model, tmp_path)
    other = load_adapter(apply_qlora(toy(), TARGETS, rank=3, alpha=6), tmp_path)
    assert torch.equal(other(X), model(X))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


class Shifted(nn.Module):
    """Trains tensors of its own, and has adapted layers within."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))
        self.inner = Toy()
        self.inner.register_parameter("scale", nn.Parameter(torch.ones(8)))

    def forward(self, x):
        return self.inner((x + self.shift) * self.inner.scale)


@pytest.mark.parametrize("apply", [apply_lora, apply_qlora])
def test_modules_around_adapted_layers_keep_tensors_of_their_own(tmp_path, apply):
    torch.manual_seed(4)
    model = Shifted().eval()
    plain = copy.deepcopy(model)
    apply(model, TARGETS.replace("q|", r"inner\.q|inner\."), rank=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (model.shift, model.inner.scale):
            parameter.requires_grad_(True).normal_()
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_()
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    others = {name for name in stored if "lora_" not in name}
    assert others == {"base_model.model.shift", "base_model.model.inner.scale"}
    fresh = apply(plain, TARGETS.replace("q|", r"inner\.q|inner\."), rank=3)
    torch.testing.assert_close(load_adapter(fresh, tmp_path)(X), model(X), atol=0, rtol=0)


def saved(tmp_path):
    save_adapter(trained(apply_lora), tmp_path)
    return tmp_path


def edit(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def edited(folder, **options):
    """The folder of another method's adapter, with other options for the first layer."""
    config = json.loads((folder / "adapter_config.json").read_text())
    next(iter(config["options"].values())).update(options)
    edit(folder, **config)
    return folder


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


PREFIX = "base_model.model.q.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not a JSON file"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "has no r"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:200]
            ),
            "not a complete safetensors file",
        ),
        (lambda f: edit(f, use_dora=True), "use_dora must be False or None, got True"),
        (lambda f: edit(f, peft_type="IA3"), "peft_type must be 'LORA', got 'IA3'"),
        (lambda f: edit_tensors(f, lambda t: t.pop(PREFIX)), "q has no lora_A; the file is incomplete"),
        (lambda f: edit_tensors(f, lambda t: t.update({PREFIX: torch.ones(3, 9)})), r"must have shape \(3, 8\)"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.nope.lora_A.weight": torch.ones(3, 8)})),
            "nope must be a linear layer of the model, found no such module",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.extra": torch.ones(3)})),
            "has no counterpart in the model",
        ),
        (lambda f: edit_tensors(f, lambda t: [t.pop(k) for k in list(t)]), "required a LoRA adapter"),
    ],
)
def test_damaged_adapter_is_refused_and_nothing_changes(tmp_path, damage, message):
    folder = saved(tmp_path)
    damage(folder)
    model = toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_adapter(model, folder)
    assert not list(adapted_layers(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_another_rank_is_refused(tmp_path):
    with pytest.raises(InputError, match="has rank 3, alpha 6 .* the model has rank 4"):
        load_adapter(apply_qlora(toy(), TARGETS, rank=4), saved(tmp_path))


OPTIONS = {  # another than the default, which changes what the stored numbers mean
    "lora": {"alpha": 5.0},
    "dora": {"rslora": True},
    "adalora": {"alpha": 5.0},
    "paca": {"alpha": 5.0},
    "one_bit": {"alpha": 5.0},
    "lora_xs": {"alpha": 5.0},
    "hydra": {"alpha": 5.0},
    "uni_lora": {"seed": 1},
    "ia3": {"inputs": ("q",)},
}


def in_all(model, method, **options):
    """With a moved adapter at each target."""
    rank = {} if method == "ia3" else {"rank": 4}
    apply_adapter(model, method, TARGETS, **{**rank, **options})
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def refused(model, folder, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_adapter(model, folder)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("method", OPTIONS)
def test_an_adapter_with_other_options_than_the_models_is_refused(tmp_path, method):
    model = in_all(toy(), method, **OPTIONS[method])
    save_adapter(model, tmp_path)
    (name, value), *_ = OPTIONS[method].items()
    value = re.escape(repr(value))
    refused(in_all(toy(), method), tmp_path, f"{method} with {name} {value}, the model with {name} .*; apply the ada")
    same = load_adapter(in_all(toy(), method, **OPTIONS[method]), tmp_path)
    assert torch.equal(same(X), model(X))
    assert torch.equal(load_adapter(toy(), tmp_path)(X), model(X))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_another_rank_of_any_layer_is_refused_before_anything_changes(tmp_path, method):
    save_adapter(in_all(toy(), method, rank=1), tmp_path / "all")  # what would be broadcast
    refused(in_all(toy(), method), tmp_path / "all", "q has .* with rank 1, the model with rank 4")
    save_adapter(in_all(toy(), method, rank_pattern={"blocks.1.fc1": 2}), tmp_path / "last")
    refused(in_all(toy(), method), tmp_path / "last", "blocks.1.fc1 has .* with rank 2, the model with rank 4")


@pytest.mark.parametrize("method", OPTIONS)
def test_an_adapter_of_layers_of_another_shape_is_refused(tmp_path, method):
    targets = ["0"]
    for shape, others in (((32, 16), [(64, 16), (16, 16), (32, 32)]), ((32, 32), [(16, 16)])):
        model = apply_adapter(nn.Sequential(nn.Linear(*shape)), method, targets)
        save_adapter(model, tmp_path)
        for other in others:
            refused(
                nn.Sequential(nn.Linear(*other)), tmp_path, r"0 must be a layer of \(out_features, in_features\) \("
            )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["shapes"]  # as files were before
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(nn.Sequential(nn.Linear(32, 32)), tmp_path)
    if method not in ("paca", "uni_lora"):
        refused(nn.Sequential(nn.Linear(16, 16)), tmp_path, "shape|size mismatch")
    if method == "paca":
        refused(nn.Sequential(nn.Linear(4, 32)), tmp_path, "rank must be from 1 to 4")
        refused(nn.Sequential(nn.Linear(8, 32)), tmp_path, "index must be from 0 to 7")


@pytest.mark.parametrize("method", ["adalora", "tsqlora"])
def test_a_stored_factor_is_not_broadcast(tmp_path, method):
    linear = nn.Linear(8, 8)
    seen = {"0": Statistics(torch.ones(8, 8), torch.ones(8, 8), 1.0)}
    save_adapter(apply_adapter(nn.Sequential(linear), method, ["0"], rank=4, statistics=seen), tmp_path)
    name = f"base_model.model.0.adapter.{'P' if method == 'adalora' else 'B'}"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    refused(nn.Sequential(nn.Linear(8, 8)), tmp_path, r"must have shape \(8, .*got \(1,")


def test_one_vector_for_other_layers_than_the_models_is_refused(tmp_path):
    save_adapter(in_all(toy(), "uni_lora", size=50), tmp_path)
    other = apply_adapter(toy(), "uni_lora", r"q|blocks\.0.fc1|decoder.*fc1", rank=4, size=50)
    refused(other, tmp_path, "share something, of q, blocks.0.fc1, blocks.1.fc1, the model of q, .*, decoder")
    refused(toy(), edited(tmp_path, size=10**6), "size must be from 1 to the")


@pytest.mark.parametrize("method", ["lora", "pissa", "uni_lora"])
def test_a_loaded_adapter_is_on_the_device_of_its_layer(tmp_path, method):
    save_adapter(in_all(toy(), method), tmp_path)
    model = load_adapter(toy().to("meta"), tmp_path)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize("apply", [apply_lora, apply_qlora])
def test_trained_weights_and_biases_of_adapted_layers_are_in_the_file(tmp_path, apply):
    def fresh():
        return apply(toy(), TARGETS, rank=3, alpha=6, rank_pattern={r"blocks\.1\.fc1": 0})

    model = fresh()
    last = model.blocks[1]["fc1"]
    assert len(list(adapted_layers(model))) == 2
    last.bias.requires_grad_(True)
    if apply is apply_lora:
        model.q.weight.requires_grad_(True)
        last.weight.requires_grad_(True)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(fresh(), tmp_path)(X), model(X))
    if apply is apply_lora:
        assert torch.equal(load_adapter(toy(), tmp_path)(X), model(X))
        theirs = peft.PeftModel.from_pretrained(toy(), tmp_path).eval()
        torch.testing.assert_close(theirs(X), model(X))
        refused(apply_qlora(toy(), TARGETS, rank=3, alpha=6), tmp_path, r"blocks\.1\.fc1\.weight must have shape")


def test_a_trained_weight_that_pissa_took_a_part_of(tmp_path):
    model = in_all(toy(), "pissa")
    model.q.weight.requires_grad_(True)
    with torch.no_grad():
        model.q.weight.add_(1.0)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(toy(), tmp_path)(X), model(X))
    with pytest.raises(ValueError, match="the weight at q trains, which pissa took a part of"):
        save_adapter(model, tmp_path / "lora", as_lora=True)
    assert not (tmp_path / "lora").exists()


def test_uni_lora_is_written_as_lora(tmp_path):
    model = in_all(toy(), "uni_lora")
    save_adapter(model, tmp_path, as_lora=True)
    for other in (load_adapter(toy(), tmp_path), peft.PeftModel.from_pretrained(toy(), tmp_path).eval()):
        torch.testing.assert_close(other(X), model(X), atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


def test_a_layer_by_itself_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model is itself an adapted layer; give a model that holds it"):
        save_adapter(QLoRALinear(8, 8), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tied_weights_that_train_are_saved_under_both_names(tmp_path):
    def tied():
        model = toy()
        model.add_module("again", nn.Linear(6, 3, bias=False))
        model.again.weight = model.head[2].weight
        return model

    model = apply_lora(tied(), ["q"], rank=2)
    model.again.weight.requires_grad_(True)
    nn.init.normal_(model.again.weight)
    save_adapter(model, tmp_path)
    other = load_adapter(tied(), tmp_path)
    assert torch.equal(other(X), model(X))
    assert other.again.weight is other.head[2].weight


def test_a_model_without_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer of the model carries an adapter"):
        save_adapter(toy(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
