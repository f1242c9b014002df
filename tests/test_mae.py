"""The masked autoencoder."""

import pytest
import torch
from torch import nn

from harlora.models import MAE, Classifier, Encoder, MAEConfig
from harlora.models.mae import patchify, unpatchify

SMALL = MAEConfig(
    width=24, depth=2, heads=2, ffn=48, decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_ffn=32
)


def test_default_size_is_close_to_the_papers():
    model = MAE()
    parameters = sum(p.numel() for p in Classifier(model.encoder, 6).parameters())
    assert abs(parameters - 2_210_857) < 0.05 * 2_210_857
    assert model.config.width == 192
    linears = [name for name, m in model.encoder.named_modules() if isinstance(m, nn.Linear)]
    for layer in ("q", "k", "v", "o", "fc1", "fc2"):
        assert sum(name.rsplit(".", 1)[-1] == layer for name in linears) == 6
    decoder = sum(p.numel() for p in model.decoder.parameters())
    assert decoder < 0.2 * sum(p.numel() for p in model.encoder.parameters())


@pytest.mark.parametrize("patch_size", [1, 4, 8, 16, 64])
def test_unpatchify_undoes_patchify(patch_size):
    x = torch.randn(3, 128, 6)
    patches = patchify(x, patch_size)
    assert patches.shape == (3, 128 // patch_size, patch_size * 6)
    assert torch.equal(unpatchify(patches, 6), x)
    assert torch.equal(patches[:, 1], x[:, patch_size : 2 * patch_size].flatten(1))


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75, 0.9])
def test_the_mask_ratio_is_really_applied(mask_ratio):
    model = MAE(MAEConfig(**{**vars(SMALL), "mask_ratio": mask_ratio}))
    seen = []
    model.encoder.blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    _, _, mask = model(torch.randn(5, 128, 6))
    removed = round(mask_ratio * 16)
    assert mask.sum(dim=1).tolist() == [removed] * 5
    assert seen == [16 - removed]  # the encoder sees the visible tokens only
    assert len({tuple(row.tolist()) for row in mask}) > 1


def test_removed_patches_do_not_reach_the_encoder_and_visible_ones_not_the_loss():
    model = MAE(SMALL).eval()
    x = torch.randn(4, 128, 6)

    order = torch.rand(4, 16).argsort(dim=1)

    def forward(x):
        return model(x, order)

    loss, predicted, mask = forward(x)
    removed = mask.repeat_interleave(8, dim=1)[:, :, None]  # (batch, window, 1)
    other = torch.where(removed == 1, torch.randn_like(x), x)
    assert torch.equal(forward(other)[1], predicted)
    expected = (unpatchify(predicted, 6) - x).square() * removed
    torch.testing.assert_close(loss, expected.sum() / (removed.sum() * 6))
    changed = x.clone().requires_grad_()
    # The loss through its targets alone: the prediction is held fixed.
    error = (predicted.detach() - patchify(changed, 8)).square().mean(dim=2)
    ((error * mask).sum() / mask.sum()).backward()
    assert changed.grad[removed.expand_as(x) == 0].abs().max() == 0
    assert changed.grad[removed.expand_as(x) == 1].abs().min() > 0


def test_masks_differ_between_calls_and_follow_the_order_given():
    model = MAE(SMALL)
    x = torch.randn(8, 128, 6)
    assert not torch.equal(model(x)[2], model(x)[2])
    order = torch.rand(8, 16).argsort(dim=1)
    mask = model(x, order)[2]
    visible = 16 - SMALL.tokens_removed
    assert mask.gather(1, order[:, :visible]).sum() == 0
    assert mask.gather(1, order[:, visible:]).min() == 1


def test_the_encoder_is_equivariant_to_which_tokens_it_sees():
    encoder = MAE(SMALL).encoder.eval()
    x = torch.randn(2, 128, 6)
    order = torch.randperm(16).expand(2, 16)
    everything = encoder(x)
    permuted = encoder(x, visible=order)
    torch.testing.assert_close(permuted, everything.gather(1, order[:, :, None].expand(-1, -1, 24)))


def test_positions_tell_tokens_apart():
    encoder = MAE(SMALL).encoder.eval()
    tokens = encoder(torch.ones(1, 128, 6))[0]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_it_learns():
    torch.manual_seed(0)
    model = MAE(SMALL)
    phase = torch.rand(64, 1, 6) * 6.28
    x = torch.sin(torch.arange(128)[None, :, None] * 0.2 + phase)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss, _, _ = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_windows_are_refused():
    encoder = Encoder(SMALL)
    for shape in ((2, 64, 6), (2, 128, 3), (128, 6)):
        with pytest.raises(ValueError, match=r"x must be \(batch, 128, 6\)"):
            encoder(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 7}, "window must be a multiple of patch_size=7"),
        ({"width": 25}, "width must be a multiple"),
        ({"heads": 0}, "heads must be a positive integer"),
        ({"mask_ratio": 0.0}, "mask_ratio must remove at least one"),
        ({"mask_ratio": 1.0}, "mask_ratio must remove"),
        ({"mask_ratio": 0.99}, "leave at least one of 16"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MAE(MAEConfig(**{**vars(SMALL), **changes}))


def test_compiles_whole():
    model = Classifier(MAE(SMALL).encoder, 4).eval()
    x = torch.randn(3, 128, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
