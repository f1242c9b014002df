"""The figures of Seregina, Lalanda and Vega 2025 (arXiv 2512.17983), to stand beside ours.

Their protocol is ours called ``paper``: windows split at random, fine-tuned for 50 epochs on 70 %, scored on 30 %.
Their pretraining saw four datasets and their machine was another, so seconds compare only in kind.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperScore:
    """Accuracy, macro-F1 and seconds of fine-tuning of one method on one dataset."""

    accuracy: float
    macro_f1: float
    seconds: int


SCORES: dict[str, dict[str, PaperScore]] = {
    "hhar": {
        "full": PaperScore(0.981, 0.980, 2772),
        "lora": PaperScore(0.960, 0.958, 2505),
        "qlora": PaperScore(0.955, 0.952, 2598),
    },
    "realworld": {
        "full": PaperScore(0.907, 0.907, 5657),
        "lora": PaperScore(0.859, 0.861, 5073),
        "qlora": PaperScore(0.860, 0.861, 5195),
    },
    "pamap2": {
        "full": PaperScore(0.853, 0.854, 1170),
        "lora": PaperScore(0.829, 0.825, 1011),
        "qlora": PaperScore(0.829, 0.824, 1037),
    },
    "motionsense": {
        "full": PaperScore(0.961, 0.958, 1453),
        "lora": PaperScore(0.956, 0.950, 1299),
        "qlora": PaperScore(0.955, 0.949, 1378),
    },
    "uci": {
        "full": PaperScore(0.968, 0.969, 927),
        "lora": PaperScore(0.952, 0.953, 881),
        "qlora": PaperScore(0.953, 0.953, 875),
    },
}

PARAMETERS = {"full": (2_210_857, 2_210_857), "lora": (428_832, 2_636_105), "qlora": (428_832, 2_636_105)}

# Megabytes: what is held without working memory, trained parameters, working buffers.
MEMORY_MB = {"lora": (10.06, 1.64, 0.01), "qlora": (6.22, 1.64, 4.82)}

# UCI HAR by the share of all windows that is trained on: accuracy.
LABEL_SHARE_ACCURACY = {
    "full": {0.70: 0.9676, 0.60: 0.9651, 0.50: 0.9618, 0.40: 0.9543, 0.30: 0.9380},
    "lora": {0.70: 0.9528, 0.60: 0.9508, 0.50: 0.9483, 0.40: 0.9416, 0.30: 0.9257},
}

# LoRA on UCI HAR by rank: macro-F1.
RANK_MACRO_F1 = {8: 0.9352, 16: 0.9395, 20: 0.9434, 32: 0.9531, 48: 0.9602, 64: 0.9649}
