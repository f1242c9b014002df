"""Eight mistakes seen in public code for this task: each check passes here, and fails with the mistake put in."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from harlora.data import Interval, Normalizer, Recording, cut, load_windows, split
from harlora.data import windows as windows_module
from harlora.data.archive import Archive
from harlora.data.motionsense import read as read_motionsense
from harlora.data.streams import align
from harlora.errors import InputError
from harlora.models import MAE, Classifier, MAEConfig
from harlora.nn import LoRALinear, adapted_layers, apply_lora
from harlora.train import finetune as finetune_module
from harlora.train.finetune import FinetuneConfig, finetune, load_classifier
from harlora.train.pretrain import PretrainConfig, Pretrained

SMALL = MAEConfig(patch_size=16, width=24, depth=1, heads=2, ffn=48, decoder_width=16, decoder_heads=2, decoder_depth=1)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return load_windows("synthetic_a", tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("cache"))


# 1. Validation subjects that are also test subjects.


def check_subjects_apart(windows, parts):
    validation, test, train = (
        set(windows.subjects[part].tolist()) for part in (parts.validation, parts.test, parts.train)
    )
    assert validation
    assert not validation & test
    assert not train & (validation | test)


def test_validation_subjects_are_not_test_subjects(windows):
    parts = split(windows, "subject", 0)
    check_subjects_apart(windows, parts)
    with pytest.raises(AssertionError):
        check_subjects_apart(windows, replace(parts, validation=parts.test[::2]))


# 2. A mask ratio parameter that is read and then ignored.


def check_mask_ratio(model, ratio):
    seen = []
    model.encoder.blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    _, _, mask = model(torch.randn(4, 128, 6))
    assert mask.mean() == pytest.approx(ratio)
    assert seen == [round((1 - ratio) * mask.shape[1])]


def test_mask_ratio_is_applied():
    for ratio in (0.25, 0.5, 0.75):
        check_mask_ratio(MAE(replace(SMALL, mask_ratio=ratio)), ratio)
    model = MAE(replace(SMALL, mask_ratio=0.75))
    model.config = replace(SMALL, mask_ratio=0.5)  # the forward pass follows another value than the one asked for
    with pytest.raises(AssertionError):
        check_mask_ratio(model, 0.75)


# 3. Gyroscope rows paired with accelerometer rows by row number.


def check_same_moment(aligned, truth):
    for start, accel, gyro in aligned:
        times = start + np.arange(len(accel)) / 50
        assert np.abs(accel - truth(times)).max() < 0.05
        assert np.abs(gyro - truth(times)).max() < 0.05


def test_sensors_are_paired_by_time():
    def truth(times):
        return np.stack([np.sin(3 * times)] * 3, axis=1)

    accel_s, gyro_s = np.arange(0, 20, 1 / 50), np.arange(0.4, 20, 1 / 45)
    accel, gyro = truth(accel_s), truth(gyro_s)
    check_same_moment(align(accel_s, accel, gyro_s, gyro, rate_hz=50, longest_gap_s=1), truth)
    rows = min(len(accel), len(gyro))
    with pytest.raises(AssertionError):
        check_same_moment([(0.0, accel[:rows], gyro[:rows])], truth)


# 4. Unmapped labels that turn into class 0.


def recordings_with(*activities, length=300):
    accel = np.tile(np.array([0, 0, 9.81], np.float32), (length, 1))
    return [
        Recording(
            "motionsense",
            "1",
            "x",
            50.0,
            accel,
            np.zeros_like(accel),
            (Interval(0, length, activity),),
            f"{activity}.csv",
        )
        for activity in activities
    ]


def check_unmapped_dropped():
    made = cut(recordings_with("wlk", "cartwheel"))
    assert made.label_names() == ("walk",)
    assert made.dropped == {"cartwheel": 3}


def test_unmapped_labels_are_dropped_and_counted(monkeypatch):
    check_unmapped_dropped()

    class Lenient(dict):
        def get(self, key, default=None):
            return super().get(key, "sit")  # class 0

    mapped = Lenient(windows_module.ACTIVITY_LABELS["motionsense"])
    monkeypatch.setitem(windows_module.ACTIVITY_LABELS, "motionsense", mapped)
    with pytest.raises(AssertionError):
        check_unmapped_dropped()


# 5. Resampling that crosses subjects, windows that bridge a removed stretch.


def check_nothing_bridged(cut_function):
    """Each stretch holds its own constant in the gyroscope; every window must show one constant."""
    made = []
    for person, value in (("1", 1.0), ("2", 5.0)):
        accel = np.tile(np.array([0, 0, 9.81], np.float32), (700, 1))
        gyro = np.full((700, 3), value, np.float32)
        gyro[200:350] = 50.0  # an activity without label
        gyro[350:] = value + 1
        intervals = (Interval(0, 200, "wlk"), Interval(200, 350, "cartwheel"), Interval(350, 700, "wlk"))
        made.append(Recording("motionsense", person, "x", 40.0, accel, gyro, intervals, person))
    result = cut_function(made)
    assert len(result) > 6
    for signal, subject in zip(result.signals, result.subjects, strict=True):
        assert np.ptp(signal[:, 3:]) < 1e-3
        assert round(float(signal[0, 3])) in ((1, 2) if subject == 0 else (5, 6))


def mistaken_cut(recordings):
    """Drops what has no label, joins what is left, resamples all of it and cuts."""
    kept = [np.concatenate([r.accel, r.gyro], axis=1)[i.start : i.stop] for r in recordings for i in r.intervals
            if i.activity == "wlk"]  # fmt: skip
    signals = windows_module.sliding_windows(windows_module.resample(np.concatenate(kept), 40.0))
    return SimpleNamespace(signals=signals, subjects=np.repeat([0, 1], [len(signals) // 2, -(-len(signals) // 2)]),
                           __len__=None)  # fmt: skip


def test_no_window_crosses_a_removed_stretch_or_a_subject():
    check_nothing_bridged(cut)

    class Result(SimpleNamespace):
        def __len__(self):
            return len(self.signals)

    with pytest.raises(AssertionError):
        check_nothing_bridged(lambda made: Result(**{k: v for k, v in vars(mistaken_cut(made)).items() if k[0] != "_"}))


# 6. Gravity-free acceleration from one dataset mixed with gravity-included from another.


class WithoutGravity(Archive):
    def numbers(self, name, **options):
        table = super().numbers(name, **options)
        table[:, 0:3] = 0.0  # the reader would take userAcceleration alone
        return table


def test_acceleration_without_gravity_is_refused(tmp_path):
    header = ",".join(f"{s}.{a}" for s in ("gravity", "userAcceleration", "rotationRate") for a in "xyz")
    rows = "\n".join("0.0,1.0,0.0,0.01,0.02,0.03,0.1,0.1,0.1" for _ in range(300))
    (tmp_path / "wlk_1").mkdir()
    (tmp_path / "wlk_1" / "sub_1.csv").write_text(f"{header}\n{rows}\n")
    assert len(cut(read_motionsense(Archive(tmp_path)))) == 3
    with pytest.raises(InputError, match="required about 9.81: m/s² with gravity"):
        cut(read_motionsense(WithoutGravity(tmp_path)))


# 7. Normalisation statistics taken over the test part.


def check_statistics_of_training_part(windows, folder):
    config = FinetuneConfig(method="linear_probe", epochs=1)
    encoder = MAE(SMALL).encoder
    pretrained = Pretrained(
        encoder, identity="x", config=PretrainConfig(model=SMALL), sources=("synthetic_b",), loss=1.0, seconds=1.0
    )
    metrics = finetune(config, windows, pretrained, folder, device=torch.device("cpu"))
    (file,) = folder.glob(f"*{metrics['identity']}/classifier.safetensors")
    _, normalizer, _ = load_classifier(file)
    parts = split(windows, "subject", 0)
    train = windows.signals[np.concatenate([parts.train, parts.validation])]  # all but the test part
    np.testing.assert_allclose(normalizer.mean, train.mean(axis=(0, 1), dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(normalizer.std, train.std(axis=(0, 1), dtype=np.float64), rtol=1e-9)


def test_statistics_come_from_the_training_part_alone(windows, tmp_path, monkeypatch):
    check_statistics_of_training_part(windows, tmp_path / "right")

    class Leaky(Normalizer):
        @classmethod
        def fit(cls, signals):
            return Normalizer.fit(windows.signals)

    monkeypatch.setattr(finetune_module, "Normalizer", Leaky)
    monkeypatch.setattr(finetune_module, "load_classifier", load_classifier)
    with pytest.raises(AssertionError):
        check_statistics_of_training_part(windows, tmp_path / "wrong")


# 8. A LoRA wrapper around the output projection of nn.MultiheadAttention, which never runs.


def check_every_adapter_learns(model, x):
    layers = list(adapted_layers(model))
    assert layers
    for _, layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
    model(x).square().sum().backward()
    for path, layer in layers:
        for parameter in (layer.lora_A, layer.lora_B):
            assert parameter.grad is not None, path
            assert parameter.grad.abs().sum() > 0, path


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_every_adapter_gets_a_gradient():
    model = Classifier(MAE(SMALL).encoder, 3)
    apply_lora(model.encoder, ["q", "k", "v", "o", "fc1", "fc2"])
    check_every_adapter_learns(model, torch.randn(4, 128, 6))
    mistaken = Multihead()
    with pytest.raises(ValueError, match="an adapter there would never train"):
        apply_lora(mistaken, ["out_proj"])
    mistaken.attention.out_proj = LoRALinear.from_linear(nn.Linear(8, 8))
    with pytest.raises(AssertionError):
        check_every_adapter_learns(mistaken, torch.randn(2, 5, 8))
