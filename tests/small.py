"""Sizes that train within seconds, shared by the tests."""

from harlora.models import MAEConfig
from harlora.train.finetune import FinetuneConfig
from harlora.train.pretrain import PretrainConfig

MODEL = MAEConfig(
    patch_size=16, width=24, depth=2, heads=2, ffn=48,
    decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_ffn=32,
)  # fmt: skip
PRETRAIN = PretrainConfig(model=MODEL, epochs=2, batch_size=64, max_windows=300)
FINETUNE = FinetuneConfig(epochs=2, batch_size=32, rank=2, alpha=4, max_windows=400)
