"""Adapters against PEFT's, where it has the method: the same parameters, the same outputs and gradients."""

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn
from torch.nn import functional as F

from harlora.nn import adapted_layers, apply_adapter, gather_statistics
from harlora.nn.adapters import LowRank
from harlora.nn.adapters.post import without_intruders
from harlora.nn.apply import schedule

TARGETS = ["k", "fc1", "fc2"]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.k, self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(torch.tanh(self.k(x)))))


def toy():
    torch.manual_seed(3)
    return Toy()


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))


def theirs(config):
    model = peft.get_peft_model(toy(), config)
    layers = {path: model.base_model.model.get_submodule(path) for path in TARGETS}
    return model, layers


# Of a layer of PEFT's: what our adapter calls each of its parameters, and how it lies there.
LORA = {"A": lambda layer: layer.lora_A["default"].weight, "B": lambda layer: layer.lora_B["default"].weight}
ADALORA = {
    "Q": lambda layer: layer.lora_A["default"],
    "P": lambda layer: layer.lora_B["default"],
    "singular": lambda layer: layer.lora_E["default"][:, 0],
}
CASES = {
    "lora": ({}, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), LORA),
    "rslora": ({"rslora": True}, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True), LORA),
    "dora": (
        {},
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True),
        {**LORA, "magnitude": lambda layer: layer.lora_magnitude_vector["default"].weight},
    ),
    "ia3": (
        {},
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["fc2"]),
        {"scale": lambda layer: layer.ia3_l["default"].view(-1)},
    ),
    "adalora": (
        {"first_rank": 4},
        peft.AdaLoraConfig(init_r=4, target_r=4, lora_alpha=8, target_modules=TARGETS, total_step=10),
        ADALORA,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_parameters_give_the_same_outputs_and_gradients(case):
    options, config, places = CASES[case]
    model, layers = theirs(config)
    method = "lora" if case == "rslora" else case
    if "ia3" not in case:
        options = {"rank": 4, "alpha": 8.0, **options}
    ours = apply_adapter(toy(), method, TARGETS, **options)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for path, layer in adapted_layers(ours):
            for name, place in places.items():
                getattr(layer.adapter, name).copy_(place(layers[path]))
    for one in (model, ours):
        one.train()
        F.mse_loss(one(X), Y).backward()
    # AdaLoRA divides by rank + 1e-5 in PEFT.
    torch.testing.assert_close(ours(X), model(X), atol=2e-5, rtol=2e-5)
    for path, layer in adapted_layers(ours):
        with torch.no_grad():
            for parameter in layers[path].parameters():  # so that the same places find gradients
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, place in places.items():
            expected = place(layers[path]).detach()
            torch.testing.assert_close(getattr(layer.adapter, name).grad, expected, atol=2e-5, rtol=2e-4)


def test_pissa_starts_where_theirs_does():
    _, layers = theirs(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="pissa"))
    for path, layer in adapted_layers(apply_adapter(toy(), "pissa", TARGETS, rank=4, alpha=8.0)):
        base = layers[path].get_base_layer().weight
        torch.testing.assert_close(layer.base_weight(), base, atol=1e-6, rtol=1e-5)
        product = layers[path].lora_B["default"].weight @ layers[path].lora_A["default"].weight
        torch.testing.assert_close(layer.adapter.B @ layer.adapter.A, product, atol=1e-6, rtol=1e-5)
        # One factor holds as much as the other.
        torch.testing.assert_close(layer.adapter.A.norm(), layers[path].lora_A["default"].weight.norm())


def test_lora_ga_starts_along_their_directions():
    plain = toy()
    statistics = gather_statistics(plain, TARGETS, (F.mse_loss(plain(x), Y) for x in (X, -X)))
    model = toy()
    for path in TARGETS:
        model.get_submodule(path)._peft_loraga_grad = statistics[path].gradient.clone()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction="A2rBr", scale="stable"),
    )  # fmt: skip
    given = peft.get_peft_model(model, config)
    for path, layer in adapted_layers(
        apply_adapter(toy(), "lora_ga", TARGETS, rank=3, alpha=6.0, statistics=statistics)
    ):
        other = given.base_model.model.get_submodule(path)
        for ours, them in (
            (layer.adapter.A, other.lora_A["default"].weight), (layer.adapter.B.T, other.lora_B["default"].weight.T)
        ):  # fmt: skip
            cosines = F.cosine_similarity(ours, them).abs()
            torch.testing.assert_close(cosines, torch.ones(3), atol=1e-3, rtol=0)


def test_adalora_keeps_the_triplets_that_theirs_keeps():
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, target_modules=TARGETS, total_step=100, tinit=1, tfinal=1
    )
    model, layers = theirs(config)
    ours = apply_adapter(toy(), "adalora", TARGETS, rank=2, alpha=8.0, first_rank=4, begin=0.0, end=0.99)
    budget = schedule(ours)
    allocator = RankAllocator(model, config, "default")
    generator = torch.Generator().manual_seed(4)
    ours_by_path = dict(adapted_layers(ours))
    for _ in range(5):  # the same parameters with the same gradients on both sides
        for path, layer in ours_by_path.items():
            for name, place in ADALORA.items():
                own = getattr(layer.adapter, name)
                with torch.no_grad():
                    own.copy_(torch.randn(own.shape, generator=generator))
                    place(layers[path]).copy_(own)
                own.grad = torch.randn(own.shape, generator=generator)
            other = layers[path]
            other.lora_A["default"].grad = layer.adapter.Q.grad.clone()
            other.lora_B["default"].grad = layer.adapter.P.grad.clone()
            other.lora_E["default"].grad = layer.adapter.singular.grad[:, None].clone()
        allocator.update_ipt(model)
        scores = budget.importance()
    allocator.mask_to_budget(model, 6)
    kept = torch.zeros(12, dtype=torch.bool)
    kept[scores.topk(6).indices] = True
    expected = torch.cat([layers[path].lora_E["default"][:, 0] != 0 for path in ours_by_path])
    assert torch.equal(kept, expected)


def test_intruders_are_lowered_as_theirs_are():
    model, layers = theirs(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.normal_(std=2.0)
    weights = {path: (layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
               for path, layer in layers.items()}  # fmt: skip
    reduce_intruder_dimension(model, top_k=4, threshold_epsilon=0.6, mitigation_lambda=0.75, logging_sink=None)
    changed = 0
    for path, (weight, A, B) in weights.items():
        change = LowRank(A.detach(), B.detach(), 2.0)
        milder = without_intruders(weight.detach(), change, factor=0.75, most=4, similarity=0.6)
        changed += milder is not change
        expected = layers[path].get_delta_weight("intruder_reduced")
        torch.testing.assert_close(milder.dense(), expected, atol=1e-4, rtol=1e-3)
    assert changed
