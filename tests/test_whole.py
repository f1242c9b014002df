"""The encoder in one call against its modules one by one: the same numbers, and never where something differs."""

import copy
import weakref

import pytest
import torch
from needs import needs_extension
from torch import nn

import harlora
from harlora.kernels import eager
from harlora.models import MAE, Classifier, MAEConfig, whole
from harlora.models.mae import Attention, Block, patchify

LAYERS = ["q", "k", "v", "o", "fc1", "fc2"]
pytestmark = needs_extension
SMALL = MAEConfig(width=24, depth=2, heads=2, ffn=48, decoder_width=16, decoder_depth=1, decoder_heads=2)
CONFIGS = {
    "small": SMALL,
    "default": MAEConfig(depth=2),
    "few tokens": MAEConfig(depth=1, patch_size=16, ffn=384),
    "one token": MAEConfig(width=40, depth=1, heads=5, ffn=70, patch_size=64, mask_ratio=0.5),
    "many tokens": MAEConfig(width=72, depth=1, heads=3, ffn=40, patch_size=1, channels=3),
}


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"])
def kernels(request, use_kernels):
    """Every instruction set that this processor has."""
    use_kernels(request.param)


def encoder_of(config, targets=LAYERS, apply=harlora.apply_qlora, **options):
    encoder = MAE(config).encoder.eval()
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    if targets:
        apply(encoder, targets, rank=3, **options)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("lora_B", ".bias")):
            nn.init.normal_(parameter, std=0.1)
    return encoder


def one_by_one(encoder, x):
    tokens = encoder.patch_embed(patchify(x, encoder.config.patch_size)) + encoder.positions
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


@pytest.fixture
def calls(monkeypatch):
    """How often the compiled operator has served."""
    served = []
    compiled = eager.HeldEncoder.__call__

    def counting(*arguments):
        result = compiled(*arguments)
        served.append(result is not None)
        return result

    monkeypatch.setattr(eager.HeldEncoder, "__call__", counting)
    return served


def agree(encoder, x):
    exact = one_by_one(copy.deepcopy(encoder).double(), x.double())
    error = (encoder(x).double() - exact).abs().max()
    assert error <= 2 * (one_by_one(encoder, x).double() - exact).abs().max() + 1e-5


@torch.no_grad()
@pytest.mark.usefixtures("kernels", "nan_filled_memory")
@pytest.mark.parametrize("windows", [0, 1, 5, 70])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_modules(config, windows, calls):
    encoder = encoder_of(config)
    x = torch.randn(windows, config.window, config.channels)
    if windows:
        agree(encoder, x)
    assert encoder(x).shape == (windows, config.tokens, config.width)
    assert all(calls)
    assert calls


@torch.no_grad()
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_not_finite_does_not_become_finite(name, value, calls):
    encoder = encoder_of(SMALL)
    layer = getattr(encoder.blocks[0] if name in {"fc1", "fc2"} else encoder.blocks[0].attention, name)
    layer.lora_A[1, 3] = value
    x = torch.randn(3, SMALL.window, SMALL.channels)
    assert torch.equal(encoder(x).isfinite(), one_by_one(encoder, x).isfinite())
    assert calls == [True]


@torch.no_grad()
@pytest.mark.parametrize(
    ("targets", "apply", "options"),
    [
        ([], None, {}),
        (["q", "v"], harlora.apply_qlora, {}),
        (LAYERS, harlora.apply_lora, {}),
        ("all-linear", harlora.apply_qlora, {"double_quant": True}),
        (LAYERS, harlora.apply_qlora, {"quant_type": "fp4", "blocksize": 32, "rslora": True}),
        (["fc1"], harlora.apply_qlora, {"blocksize": 4096, "double_quant": True}),
    ],
)
def test_any_mixture_of_layers(targets, apply, options, calls):
    agree(encoder_of(SMALL, targets, apply, **options), torch.randn(3, 128, 6))
    assert calls == [True]


@torch.no_grad()
def test_what_is_trained_loaded_or_replaced_counts_at_once(calls):
    encoder, x = encoder_of(SMALL), torch.randn(3, 128, 6)

    def follows():
        torch.testing.assert_close(encoder(x), one_by_one(encoder, x), rtol=1e-4, atol=1e-4)

    before = encoder(x)
    layer = encoder.blocks[1].fc2
    layer.lora_B.add_(1.0)
    follows()
    assert not torch.equal(before, encoder(x))
    layer.lora_B = nn.Parameter(torch.randn_like(layer.lora_B))
    follows()
    layer.alpha = 3.0
    follows()
    encoder.norm.eps = 0.5
    follows()
    encoder.load_state_dict(encoder_of(SMALL).state_dict())
    follows()
    encoder.blocks[0].attention.q = nn.Linear(24, 24)
    follows()
    encoder.blocks[0] = harlora.merge_adapters(encoder.blocks[0])
    follows()
    encoder.blocks[0].fc1.bias = None
    follows()
    assert calls == [True] * 10
    encoder.blocks = encoder.blocks[:1]
    follows()
    assert calls[-1]
    encoder.bfloat16().float()
    follows()
    assert calls[-1]


def refuse_hooks(encoder):
    encoder.blocks[0].fc1.register_forward_hook(lambda module, args, output: output + 1)


def refuse_pre_hooks(encoder):
    encoder.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def refuse_dropout(encoder):
    layer = encoder.blocks[0].attention.q
    layer.dropout = 0.5
    layer.train()


def refuse_subclass(encoder):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    encoder.blocks[0].fc1 = Twice(24, 48)


def refuse_replaced_forward(encoder):
    encoder.blocks[0].fc1.forward = lambda x: x.new_ones(*x.shape[:-1], 48)


def refuse_another_block(encoder):
    class Parallel(Block):
        def forward(self, x):
            return x + self.attention(self.norm1(x)) + self.fc2(self.fc1(self.norm2(x)))

    block = Parallel(24, 2, 48)
    block.load_state_dict(MAE(SMALL).encoder.blocks[0].state_dict())
    encoder.blocks[0] = block


def refuse_another_attention(encoder):
    class Uniform(Attention):
        def forward(self, x):
            return self.o(self.v(x).mean(dim=1, keepdim=True).expand_as(x))

    encoder.blocks[1].attention = Uniform(24, 2)


def refuse_other_heads(encoder):
    encoder.blocks[1].attention.heads = 3


def refuse_half(encoder):
    encoder.blocks[0].fc1.lora_A.data = encoder.blocks[0].fc1.lora_A.data.bfloat16()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        refuse_hooks,
        refuse_pre_hooks,
        refuse_dropout,
        refuse_subclass,
        refuse_replaced_forward,
        refuse_another_block,
        refuse_another_attention,
        refuse_other_heads,
        refuse_half,
    ],
)
def test_falls_back_where_a_layer_is_out_of_the_ordinary(change, calls):
    encoder, x = encoder_of(SMALL), torch.randn(3, 128, 6)
    encoder(x)
    change(encoder)
    torch.manual_seed(1)
    found = encoder(x)
    torch.manual_seed(1)
    assert torch.equal(found, one_by_one(encoder, x))
    assert sum(calls) == 1
    tried = len(calls)
    encoder(x)
    assert len(calls) == tried  # nothing is tried again that cannot serve


def test_training_runs_the_modules(calls):
    model = Classifier(encoder_of(SMALL), 4)
    model(torch.randn(5, 128, 6)).sum().backward()
    assert model.encoder.blocks[0].fc1.lora_A.grad is not None
    assert not calls
    model.requires_grad_(False)
    x = torch.randn(5, 128, 6, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert not calls


@torch.no_grad()
def test_the_masked_encoder_runs_the_modules(calls):
    encoder_of(SMALL)(torch.randn(2, 128, 6), visible=torch.arange(4).expand(2, 4))
    assert not calls


@torch.no_grad()
def test_half_precision_and_autocast_run_the_modules(calls):
    x = torch.randn(2, 128, 6)
    encoder_of(SMALL).bfloat16()(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder_of(SMALL)(x)
    assert not calls


@torch.no_grad()
def test_a_copied_and_a_deleted_encoder_leave_no_trace():
    encoder, x = encoder_of(SMALL), torch.randn(2, 128, 6)
    first = encoder(x)
    other = copy.deepcopy(encoder)
    other.blocks[0].fc1.lora_B.zero_()
    assert not torch.equal(other(x), first)
    assert torch.equal(encoder(x), first)
    count = len(whole._plans)
    del encoder, other
    assert len(whole._plans) <= count - 2


def test_the_operator_checks_what_it_is_given():
    operators = torch.ops.harlora_cpp
    plan = whole._Plan(encoder_of(SMALL))
    tensors = [place[name] for place, name in plan.slots]
    x = torch.randn(2, 16, 48)

    def run(x, *description):
        held = operators.encoder_hold(*description)
        try:
            return operators.encoder(x, held)
        finally:
            operators.encoder_release(held)

    run(x, tensors, plan.facts, plan.factors)
    for arguments in (
        (x[0], tensors, plan.facts, plan.factors),
        (x[:, :, :47], tensors, plan.facts, plan.factors),
        (x[:, :15], tensors, plan.facts, plan.factors),
        (x.double(), tensors, plan.facts, plan.factors),
        (x, tensors[:-1], plan.facts, plan.factors),
        (x, [*tensors, x], plan.facts, plan.factors),
        (x, tensors, plan.facts[:-1], plan.factors),
        (x, tensors, plan.facts, plan.factors[:-1]),
        (x, tensors, [plan.facts[0], 0, *plan.facts[2:]], plan.factors),
    ):
        with pytest.raises(RuntimeError):
            run(*arguments)
    with pytest.raises(RuntimeError, match="no layers are held under 0"):
        operators.encoder(x, 0)


@torch.no_grad()
def test_what_is_held_is_released_with_the_encoder():
    encoder = encoder_of(SMALL)
    encoder(torch.randn(2, 128, 6))
    gone = weakref.ref(encoder.blocks[0].fc1.lora_A)
    number = whole._plans[encoder].held._number
    del encoder
    assert gone() is None
    with pytest.raises(RuntimeError, match="no layers are held"):
        torch.ops.harlora_cpp.encoder(torch.randn(2, 16, 48), number)
