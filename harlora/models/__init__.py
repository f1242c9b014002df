"""The model for human activity recognition."""

from harlora.models.mae import MAE, Classifier, Encoder, MAEConfig

__all__ = ["MAE", "Classifier", "Encoder", "MAEConfig"]
