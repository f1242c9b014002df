"""Masked autoencoder for windows of motion sensor signals, and the classifier on its encoder.

The encoder follows He et al. 2022 (arXiv 2111.06377) in one dimension: a window is cut into patches along time, all
channels of a time span in one patch; most patches are removed; the encoder sees the rest; a smaller decoder restores
all patches; the loss is the mean squared error on the removed ones.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harlora.models.whole import attend, encode, encode_tokens, feed_forward


@dataclass(frozen=True)
class MAEConfig:
    """Sizes of the masked autoencoder; the encoder has 2.1 million parameters with ffn 512, 1.8 million with 384.

    channels: sensor channels a sample.
    window: samples a window; a multiple of ``patch_size``.
    width, depth, heads, ffn: of the encoder; ``decoder_…`` of the decoder.
    mask_ratio: share of the patches that is removed before the encoder, between 0 and 1.
    """

    channels: int = 6
    window: int = 128
    patch_size: int = 8
    width: int = 192
    depth: int = 6
    heads: int = 6
    ffn: int = 512
    decoder_width: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    decoder_ffn: int = 256
    mask_ratio: float = 0.75

    def check(self) -> None:
        """Raise ValueError unless the sizes fit each other."""
        for name, value in asdict(self).items():
            if name != "mask_ratio" and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"MAEConfig: {name} must be a positive integer, got {value!r}")
        if self.window % self.patch_size:
            raise ValueError(f"MAEConfig: window must be a multiple of patch_size={self.patch_size}, got {self.window}")
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            if getattr(self, width) % (2 * getattr(self, heads)):
                raise ValueError(
                    f"MAEConfig: {width} must be a multiple of 2·{heads}={2 * getattr(self, heads)}, "
                    f"got {getattr(self, width)}"
                )
        if not 0 < self.mask_ratio < 1 or self.tokens_removed == 0 or self.tokens_removed == self.tokens:
            raise ValueError(
                f"MAEConfig: mask_ratio must remove at least one and leave at least one of {self.tokens} patches, "
                f"got {self.mask_ratio}"
            )

    @property
    def tokens(self) -> int:
        """Patches a window."""
        return self.window // self.patch_size

    @property
    def tokens_removed(self) -> int:
        """Patches that masking removes."""
        return round(self.mask_ratio * self.tokens)


def sinusoidal_positions(tokens: int, width: int) -> Tensor:
    """Fixed positions (Vaswani et al. 2017, section 3.5), ``(1, tokens, width)``."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-torch.log(torch.tensor(10000.0)) / width))
    angle = torch.arange(tokens)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)[None]


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v and o projections, so that each can carry an adapter."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        attended = attend(x, self.q, self.k, self.v, self.heads)
        if attended is not None:
            return self.o(attended)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, tokens, width / heads)
            for layer in (self.q, self.k, self.v)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-LayerNorm transformer block: x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        normed = self.norm2(x)
        fed = feed_forward(normed, self.fc1, self.fc2)
        return x + (self.fc2(F.gelu(self.fc1(normed))) if fed is None else fed)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Patches along time, ``(batch, tokens, patch_size · channels)``.

    x: ``(batch, window, channels)``.
    """
    return x.unflatten(1, (-1, patch_size)).flatten(2)


def unpatchify(patches: Tensor, channels: int) -> Tensor:
    """The window that `patchify` cut, ``(batch, window, channels)``."""
    return patches.unflatten(2, (-1, channels)).flatten(1, 2)


class Encoder(nn.Module):
    """Patch embedding, positions, transformer blocks and a last LayerNorm."""

    positions: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_size * config.channels, config.width)
        self.register_buffer("positions", sinusoidal_positions(config.tokens, config.width), persistent=False)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.ffn) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encoded tokens, ``(batch, tokens, width)``; of the visible patches alone when ``visible`` is given.

        x: ``(batch, window, channels)``, normalised.
        visible: ``(batch, tokens_visible)``, int64, which patches to encode.
        Raises: ValueError if ``x`` has another window or other channels than the model.
        """
        config = self.config
        if x.shape[1:] != (config.window, config.channels):
            raise ValueError(
                f"Encoder: x must be (batch, {config.window}, {config.channels}), got {tuple(x.shape)}; "
                "cut and resample the recording as the model was trained"
            )
        patches = patchify(x, config.patch_size)
        if visible is None and (encoded := encode(self, patches)) is not None:
            return encoded
        tokens = self.patch_embed(patches) + self.positions
        if visible is not None:
            tokens = _gather_tokens(tokens, visible)
        if (encoded := encode_tokens(self, tokens)) is not None:
            return encoded
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Decoder(nn.Module):
    """A smaller mirror of the encoder that restores every patch from the visible tokens."""

    positions: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.width, config.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.register_buffer("positions", sinusoidal_positions(config.tokens, config.decoder_width), persistent=False)
        self.blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads, config.decoder_ffn) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(config.decoder_width)
        self.predict = nn.Linear(config.decoder_width, config.patch_size * config.channels)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, restore: Tensor) -> Tensor:
        """Predicted patches, ``(batch, tokens, patch_size · channels)``.

        encoded: ``(batch, tokens_visible, width)``.
        restore: ``(batch, tokens)``, int64, the inverse of the permutation that put visible patches first.
        """
        tokens = self.embed(encoded)
        removed = restore.shape[1] - tokens.shape[1]
        tokens = torch.cat([tokens, self.mask_token.expand(len(tokens), removed, -1)], dim=1)
        tokens = _gather_tokens(tokens, restore) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.predict(self.norm(tokens))


def _gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


class MAE(nn.Module):
    """Masked autoencoder over windows of motion sensor signals."""

    def __init__(self, config: MAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or MAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.apply(_initialise)

    def forward(self, x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, predicted patches and mask.

        loss = mean over removed patches of (predicted - patch)².

        x: ``(batch, window, channels)``, normalised.
        order: ``(batch, tokens)``, int64, a permutation of the patches of each window, of which the first are visible;
            drawn at random by default.
        loss: a scalar; predicted: ``(batch, tokens, patch_size · channels)``; mask: ``(batch, tokens)``, 1 = removed.
        """
        if order is None:
            order = torch.rand(len(x), self.config.tokens, device=x.device).argsort(dim=1)
        restore = order.argsort(dim=1)
        count = self.config.tokens - self.config.tokens_removed
        predicted = self.decoder(self.encoder(x, visible=order[:, :count]), restore)
        mask = (restore >= count).to(x.dtype)
        error = (predicted - patchify(x, self.config.patch_size)).square().mean(dim=2)
        return (error * mask).sum() / mask.sum(), predicted, mask


class Classifier(nn.Module):
    """An encoder with a small head: mean over tokens, MLP with BatchNorm and Dropout, one logit a class."""

    def __init__(self, encoder: Encoder, classes: int, *, hidden: int = 256, dropout: float = 0.2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(encoder.config.width, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        self.head.apply(_initialise)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits, ``(batch, classes)``; from the visible patches alone when ``visible`` is given, as in `Encoder`.

        x: ``(batch, window, channels)``, normalised.
        """
        return self.head(self.encoder(x, visible).mean(dim=1))


def _initialise(module: nn.Module) -> None:
    # Xavier for linear layers as in the masked autoencoder's published code; LayerNorm keeps ones and zeros.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
