"""Which windows an epoch takes."""

from dataclasses import replace

import pytest
import torch

from harlora.data import load_windows
from harlora.errors import InputError
from harlora.train.finetune import FinetuneConfig, finetune
from harlora.train.pretrain import load_pretrained, pretrain
from harlora.train.sampler import QualitySampler, Sampler
from small import FINETUNE, PRETRAIN


def quality(count=6, share=0.5, weights=(1.0, 1.0, 1.0, 1.0)):
    return QualitySampler(torch.arange(count) * 2, share, weights)


def test_an_epoch_takes_its_share_and_nothing_twice():
    torch.manual_seed(0)
    for sampler in (Sampler(torch.arange(10), 0.3), quality(10, 0.3)):
        for _ in range(20):
            order = sampler.order()
            assert len(order) == len(set(order.tolist())) == 3
        assert sampler.drawn.sum() == 60
        assert sampler.count == 3


def test_what_a_window_teaches_by_hand():
    sampler = quality()
    indices, truth = torch.tensor([0, 4]), torch.tensor([0, 1])
    for logits in ([[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]):
        sampler.observe(indices, torch.tensor(logits), truth)
    right, other = (
        1 / (1 + torch.e**-1),
        1 / (1 + torch.e),
    )  # of the label: rose for the first window, fell for the next
    seen = sampler.terms[:, [0, 2]]
    expected = [[2 * (1 - right) ** 2, 2 * (1 - other) ** 2]]
    expected += [[torch.log(torch.tensor(p / 0.5)) for p in (right, other)], [right - 0.5, other - 0.5]]
    torch.testing.assert_close(seen, torch.tensor(expected))
    assert sampler.terms[:, [1, 3, 4, 5]].isnan().all()
    # Standardised, of two windows each term is 1 or -1: the one that improves has the lower error.
    assert sampler.quality().tolist() == pytest.approx([1, 0, -1, 0, 0, 0])
    only_error = quality(weights=(1.0, 0.0, 0.0, 1.0))
    only_error.terms = sampler.terms
    assert only_error.quality().tolist() == pytest.approx([-1, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_windows_are_drawn_as_the_softmax_says(temperature):
    torch.manual_seed(1)
    sampler = quality(4, 0.5, (1.0, 0.0, 0.0, temperature))
    sampler.terms[0] = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    p = (sampler.quality() / temperature).softmax(dim=0)
    # Of two without replacement, window i is in the pair with p_i + Σ_j p_j · p_i / (1 - p_j).
    expected = torch.stack([p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)])
    for _ in range(4000):
        sampler.order()
    torch.testing.assert_close(sampler.drawn / 4000, expected, atol=0.03, rtol=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return [load_windows(name, tmp_path_factory.mktemp("none")) for name in ("synthetic_a", "synthetic_b")]


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory):
    return load_pretrained(pretrain(PRETRAIN, data[1:], tmp_path_factory.mktemp("runs"), device=torch.device("cpu")))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "qlora", "sampled": 0.4},
        {"method": "qlora", "sampler": "quality", "sampled": 0.4},
        {"method": "qtsqlora"},
    ],
)
def test_training_on_a_share_with_wrong_labels(data, encoder, tmp_path, settings):
    config = replace(FINETUNE, mislabelled=0.3, epochs=3, **settings)
    metrics = finetune(config, data[0], encoder, tmp_path, device=torch.device("cpu"))
    plain = finetune(replace(config, mislabelled=0.0), data[0], encoder, tmp_path, device=torch.device("cpu"))
    assert 0.1 < metrics["drawn_wrong"] < 0.6
    assert "drawn_wrong" not in plain
    assert metrics["history"][0]["loss"] != plain["history"][0]["loss"]
    assert metrics["windows"] == plain["windows"]
    assert FinetuneConfig(**metrics["config"]) == config.for_dataset("synthetic_a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampled": 0.0}, "sampled must be above 0"),
        ({"sampler": "best"}, "sampler must be one of auto, uniform, quality, got 'best'"),
        ({"quality": (1, 1, 1, 0)}, "a temperature above 0"),
        ({"mislabelled": 1.0}, "mislabelled must be at least 0"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(InputError, match=message):
        replace(FINETUNE, **changes).check()


def test_half_is_drawn_by_quality_unless_another_share_is_asked_for(data, encoder, tmp_path):
    totals = []
    for settings in ({"method": "tsqlora"}, {"method": "tsqlora", "sampled": 1.0}, {"method": "lora"}):
        said = []
        config = replace(FINETUNE, epochs=1, batch_size=4, **settings)
        finetune(
            config, data[0], encoder, tmp_path, device=torch.device("cpu"),
            report=lambda done, total, note, said=said: said.append(total),
        )  # fmt: skip
        totals.append(said[-1])
    assert totals[0] == totals[1] // 2
    assert totals[1] == totals[2]
