"""A classifier on a recording of one's own, and the whole way from tables to labelled windows."""

import csv
import io
import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from rich.console import Console

from harlora import cli
from harlora.data import cut, load_windows
from harlora.data.labels import VOCABULARY
from harlora.errors import InputError
from harlora.files import load_tensors, save_tensors
from harlora.progress import Bars
from harlora.report import timeline
from harlora.train.finetune import CHECKPOINT, finetune, load_classifier
from harlora.train.predict import predict
from harlora.train.pretrain import load_pretrained, pretrain
from small import FINETUNE, PRETRAIN
from tables import HEADER, joined, made, rows_of, write

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier that learned sit, stand, lie, walk, upstairs, downstairs and run of synthetic_a in a few steps."""
    root = tmp_path_factory.mktemp("runs")
    windows = [load_windows(f"synthetic_{letter}", root, root / "cache") for letter in "ab"]
    pretrained = load_pretrained(pretrain(PRETRAIN, windows[1:], root, device=CPU))
    config = replace(FINETUNE, method="full", epochs=6, max_windows=600)
    finetune(config, windows[0], pretrained, root, device=CPU)
    (file,) = root.glob(f"full-*/{CHECKPOINT}")
    return file


def recording(subject="1", labels=("sit", "walk", "run")):
    return joined([one for one in made(8, labels) if one.subject == subject])


def test_windows_are_those_of_training_and_so_are_their_labels(tmp_path, classifier):
    ours = predict(classifier, write(tmp_path / "a.csv", rows_of(recording())), device=CPU)
    model, normalizer, names = load_classifier(classifier)
    cuts = cut([recording()])
    # Two activities meet in some windows of a whole recording; the others are those of training where their grids meet.
    first = cuts.segments == 0
    expected = model(torch.from_numpy(normalizer(cuts.signals[first]))).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(ours.probabilities[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert ours.labels == names
    assert len(ours.starts_s) == 1 + (3 * 2250 - 128) // 64
    assert ours.starts_s[1] == pytest.approx(1.28)
    np.testing.assert_allclose(ours.ends_s - ours.starts_s, 2.56)


def test_truth_is_that_of_windows_within_one_activity(tmp_path, classifier):
    found = predict(classifier, write(tmp_path / "a.csv", rows_of(recording())), device=CPU)
    for start, end, truth in zip(found.starts_s, found.ends_s, found.truth, strict=True):
        inside = [label for label, at in (("sit", 0), ("walk", 45), ("run", 90)) if at <= start and end <= at + 45]
        assert ([found.labels[truth]] if truth >= 0 else []) == inside
    assert found.unscored["of several activities, or partly without"] == (found.truth < 0).sum() > 0
    scores = found.scores()
    assert sum(scores["support"]) == (found.truth >= 0).sum()
    known = found.truth >= 0
    assert scores["accuracy"] == pytest.approx((found.classes == found.truth)[known].mean())
    assert scores["accuracy"] > 0.5
    assert [label for _, _, label in found.given] == ["sit", "walk", "run"]


def test_labels_that_cannot_be_scored_are_counted(tmp_path, classifier):
    rows = rows_of(recording())
    names = {"sit": "cycle", "walk": "dance", "run": ""}
    for row in rows:
        row[7] = names[row[7]]
    found = predict(classifier, write(tmp_path / "a.csv", rows), device=CPU)
    assert found.scores() is None
    assert found.unscored["of 'cycle', which the classifier does not know"] == 34
    assert found.unscored["of 'dance', which is not in the vocabulary"] == 33
    assert found.unscored["without a label"] == 33
    mapped = predict(classifier, tmp_path / "a.csv", labels=("dance=walk",), device=CPU)
    assert mapped.scores()["support"][mapped.labels.index("walk")] == 33


@pytest.mark.parametrize("rate_hz", [50.02, 49.98, 99.96])
def test_times_are_those_of_the_table_where_its_rate_is_nearly_a_round_one(tmp_path, classifier, rate_hz, monkeypatch):
    steps = 2 if rate_hz > 60 else 1
    one = recording()
    fast = {key: np.repeat(getattr(one, key), steps, axis=0) for key in ("accel", "gyro")}
    intervals = [replace(i, start=steps * i.start, stop=steps * i.stop) for i in one.intervals]
    one = replace(one, rate_hz=rate_hz, intervals=tuple(intervals), **fast)
    found = predict(classifier, write(tmp_path / "a.csv", rows_of(one)), hop=4, device=CPU)
    # Its windows are cut as if the rate were 50 or 100 Hz, so sample 4 n of 50 Hz is row 4 n steps of the table.
    first = 4 * np.arange(1 + (3 * 2250 - 128) // 4)
    np.testing.assert_allclose(found.starts_s, first * steps / rate_hz, atol=1e-4)
    np.testing.assert_allclose(found.ends_s, (first + 128) * steps / rate_hz, atol=1e-4)
    assert found.spans_s[-1, 1] == pytest.approx(len(one.accel) / rate_hz, abs=1e-4)
    truth = [found.labels[i] if i >= 0 else "" for i in found.truth]
    kinds = ("sit", "walk", "run")
    assert truth == [kinds[n // 2250] if n // 2250 == (n + 127) // 2250 else "" for n in first]
    figure = axes_of(monkeypatch, found, tmp_path / "none.png")
    assert figure.axes[0].get_xlim()[1] == pytest.approx(len(one.accel) / rate_hz, abs=1e-4)


@pytest.mark.parametrize("hop", [16, 64, 128, 400])
def test_every_moment_is_spoken_for_once(tmp_path, classifier, hop):
    rows = rows_of(recording())
    del rows[2000:2500]  # ten seconds of nothing
    found = predict(classifier, write(tmp_path / "a.csv", rows), hop=hop, device=CPU)
    assert len(found.stretches) == 2
    assert len(found.starts_s) == sum(1 + (len(trace) - 128) // hop for *_, trace in found.stretches)
    assert found.starts_s[1 + (2000 - 128) // hop] == pytest.approx(50.0)
    begin, end = found.spans_s.T
    assert (begin[1:] >= end[:-1] - 1e-9).all()
    assert not ((begin < 49.9) & (end > 40.1)).any()  # nothing in the gap
    measured = sum(len(trace) for *_, trace in found.stretches) / 50
    spoken = sum(found.shares().values())
    assert spoken == pytest.approx((end - begin).sum())
    if hop <= 128:
        assert spoken == pytest.approx(measured)
    else:
        assert spoken < 0.6 * measured
    for (start, _, trace), expected in zip(found.stretches, (0.0, 50.0), strict=True):
        assert start == expected
        assert np.median(trace) == pytest.approx(9.8, abs=0.5)


def test_the_file_of_predictions(tmp_path, classifier):
    found = predict(classifier, write(tmp_path / "a.csv", rows_of(recording())), device=CPU)
    found.write_csv(tmp_path / "out" / "predictions.csv")
    with (tmp_path / "out" / "predictions.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == [
        "start_s", "end_s", "label", "probability", *(f"p_{name}" for name in found.labels), "truth",
    ]  # fmt: skip
    assert len(rows) == len(found.starts_s)
    for row in rows:
        chances = {name: float(row[f"p_{name}"]) for name in found.labels}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-3)
        assert float(row["probability"]) == max(chances.values()) == chances[row["label"]]
        assert float(row["end_s"]) - float(row["start_s"]) == pytest.approx(2.56)
    bare = [row[:7] for row in rows_of(recording())]
    unlabelled = predict(classifier, write(tmp_path / "b.csv", bare, header=HEADER[:7]), device=CPU)
    unlabelled.write_csv(tmp_path / "b" / "predictions.csv")
    assert (tmp_path / "b" / "predictions.csv").read_text().splitlines()[0].endswith("p_run")
    assert unlabelled.scores() is None
    assert np.array_equal(unlabelled.probabilities, found.probabilities)


def axes_of(monkeypatch, found, file):
    drawn = []
    monkeypatch.setattr(timeline, "save", lambda figure, file: drawn.append(figure))
    timeline.draw(found, "a title", file)
    (figure,) = drawn
    return figure


def test_the_picture_shows_bands_gaps_and_that_it_is_synthetic(tmp_path, classifier, monkeypatch):
    rows = rows_of(recording())
    del rows[2000:2500]
    first = datetime(2024, 5, 31, 12, tzinfo=UTC)
    for row in rows:
        row[0] = (first + timedelta(seconds=float(row[0]))).isoformat()
    found = predict(classifier, write(tmp_path / "a.csv", rows), device=CPU)
    timeline.draw(found, "a title", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    figure = axes_of(monkeypatch, found, tmp_path / "none.png")
    said = [text.get_text() for text in figure.texts]
    assert any("SYNTHETIC data: a title; 0:00 is 2024-05-31 12:00:00 UTC" in text for text in said)
    assert "SYNTHETIC DATA" in said
    band, signal, chance = figure.axes
    assert [label.get_text() for label in band.get_yticklabels()] == ["table", "classifier"]
    assert {text.get_text() for text in band.texts} >= {"sit", "walk", "run"}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][-1] == "gap"
    for axis in (band, signal, chance):
        (gap,) = [patch for patch in axis.patches if patch.get_hatch()]
        assert gap.get_x() == pytest.approx(40.0)
        assert gap.get_width() == pytest.approx(10.0)
    (line,) = chance.get_lines()
    assert np.isnan(line.get_ydata()).sum() == 1
    real = replace(found, target="motionsense")
    assert "SYNTHETIC DATA" not in [text.get_text() for text in axes_of(monkeypatch, real, "x").texts]


def test_a_long_recording_is_drawn_in_rows(tmp_path, classifier, monkeypatch):
    long = joined([recording()] * 4)  # nine minutes
    found = predict(classifier, write(tmp_path / "a.csv", rows_of(long)), device=CPU)
    figure = axes_of(monkeypatch, found, tmp_path / "none.png")
    assert [axis.get_xlim() for axis in figure.axes[::3]] == [(120.0 * row, 120.0 * (row + 1)) for row in range(5)]
    assert timeline.clock(59.6) == "1:00"
    assert timeline.clock(3725) == "1:02:05"
    assert set(timeline.COLOURS) == set(VOCABULARY)


def test_what_cannot_be_labelled_is_named(tmp_path, classifier):
    file = write(tmp_path / "a.csv", rows_of(recording()))
    two = write(tmp_path / "two.csv", itertools.chain(rows_of(recording("1")), rows_of(recording("2"))))
    with pytest.raises(InputError, match=r"two.csv: has rows of several subjects, 1, 2; required one recording"):
        predict(classifier, two, device=CPU)
    with pytest.raises(InputError, match="has 2 tables; required one recording, name its file"):
        predict(classifier, tmp_path, device=CPU)
    with pytest.raises(InputError, match="--hop must be at least 1 sample, got 0"):
        predict(classifier, file, hop=0, device=CPU)
    with pytest.raises(InputError, match=r"none.safetensors: no such file; give the classifier.safetensors"):
        predict(tmp_path / "none.safetensors", file, device=CPU)
    tensors, info = load_tensors(classifier, kind="classifier checkpoint", remedy="")
    save_tensors(tmp_path / "other.safetensors", tensors, kind="encoder checkpoint", info=info)
    with pytest.raises(InputError, match="required a harlora classifier checkpoint file, found encoder checkpoint"):
        predict(tmp_path / "other.safetensors", file, device=CPU)
    short = write(tmp_path / "short.csv", rows_of(recording())[2300:2400])
    with pytest.raises(InputError, match=r"short.csv: no part without a gap is as long as one window of 2.56 s"):
        predict(classifier, short, units=cli.Units(gyro="rad/s"), device=CPU)


def test_from_tables_to_labelled_windows(tmp_path, capsys, monkeypatch):
    """The whole way on the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARLORA_DATA", raising=False)
    for number, one in enumerate(made(4, ("sit", "walk", "run"))):
        write(tmp_path / "tables" / f"{number:02}.csv", rows_of(one))

    def run(*arguments):
        cli.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    said = run("data", "import", "tables", "--name", "mine", "--placement", "waist")
    assert "windows that come out" in said
    assert "dataset mine: data/mine/recordings.safetensors" in said
    said = run("data", "list")
    assert "mine" in said
    assert "your own" in said
    assert "Windows that come out, by subject and class" in run("data", "inspect", "mine")
    small = (
        "--width", 24, "--depth", 1, "--heads", 2, "--ffn", 32, "--decoder-width", 16,
        "--decoder-heads", 2, "--epochs", 1, "--max-windows", 200,
    )  # fmt: skip
    run("pretrain", "--sources", "mine", *small, "--out", "other")
    run("pretrain", "--sources", "synthetic_b", *small)
    (checkpoint,) = tmp_path.glob("runs/pretrain-*/encoder.safetensors")
    said = run(
        "finetune", "--target", "mine", "--pretrained", checkpoint, "--method", "qlora", "--epochs", 1, "--rank", 2
    )
    assert "mine, new people" in said
    (model,) = tmp_path.glob("runs/qlora-mine-*/classifier.safetensors")
    said = run("predict", "--model", model, "tables/05.csv", "--hop", 32)
    assert "activity" in said
    assert "Accuracy" in said
    assert "SYNTHETIC" not in said  # for all that the program knows these are real
    rows = (tmp_path / "runs" / "predict" / "05" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + (2250 - 128) // 32
    assert (tmp_path / "runs" / "predict" / "05" / "timeline.png").stat().st_size > 10_000


def test_square_brackets_in_names_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "width", 600)  # nothing is folded
    names = {"sit": "sit [still]", "walk": "walk [/fast]"}
    rows = [[*row[:7], names.get(row[7], row[7]), "[bold]", "7"] for row in rows_of(recording())]
    write(tmp_path / "[red]" / "a.csv", rows, header=(*HEADER, "mag [uT]"))
    cli.main(["data", "import", "[red]/a.csv", "--name", "mine", "--data", str(tmp_path)])
    for command in ("list", "inspect mine --out [red]/a.png"):
        cli.main(["data", *command.split(), "--data", str(tmp_path)])
        said = " ".join(capsys.readouterr().out.split())
        assert "walk [/fast]" in said
        assert "sit [still]" in said
    for part in ("mag [uT]", "[bold]", "[red]/a.png"):
        assert part in said
    shown = io.StringIO()
    with Bars(Console(file=shown, force_terminal=True, width=200)) as bars:
        bars.run("[red]/a.csv", 1, 2)(1, 2, "[/b]")
        bars.say("[/c]")
    for part in ("[red]/a.csv", "[/b]", "[/c]"):
        assert part in shown.getvalue()


def test_the_command_line_says_what_is_synthetic_and_wrong(tmp_path, classifier, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.csv", rows_of(recording()))
    cli.main(["predict", "--model", str(classifier), str(file)])
    assert "SYNTHETIC data: the classifier learned from made-up recordings" in capsys.readouterr().out
    (tmp_path / "way").write_text("in the way")
    for arguments, message in (
        (["--out", "way/out"], "cannot write to way/out"),
        (["--device", "tpu9"], "--device must be cpu, cuda or cuda:0, got 'tpu9'"),
        (["--accel-unit", "g"], "and --accel-unit is g; correct it to m/s2"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["predict", "--model", str(classifier), str(file), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
