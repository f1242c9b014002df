"""The report's sections of experiments, from records made by hand."""

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from harlora.errors import InputError
from harlora.report import plots
from harlora.report.build import build_report
from harlora.report.claims import HEADER, measured, rows
from harlora.report.compare import Comparison, adjusted, by_person, compare, macro_f1_of_confusion
from harlora.report.experiments import latex, paper, table
from harlora.report.tables import markdown, pooled
from harlora.train.experiment import PRESETS, Claim, Experiment
from harlora.train.metrics import calibration, scores

PRESET = PRESETS["standard"]


def record(method="qlora", target="uci_hapt", seed=0, people=None, **changes):
    changes = {"protocol": "subject", **changes}
    config = replace(PRESET.finetune, method=method, seed=seed, **changes).for_dataset(target)
    people = people or {"1": [[8, 2], [1, 9]], "2": [[9, 1], [0, 10]]}
    confusion = np.sum(list(people.values()), axis=0)
    truth, predicted = (np.repeat(np.indices(confusion.shape)[axis].ravel(), confusion.ravel()) for axis in (0, 1))
    certain = np.full((len(truth), 2), 0.2)
    certain[np.arange(len(truth)), predicted] = 0.8
    return {
        "preset": "standard",
        "scores": scores(truth, predicted, ["sit", "walk"]),
        "calibration": calibration(certain, truth),
        "confusion_by_subject": people,
        "parameters": {"trainable": 1234, "total": 99999},
        "bytes": {"frozen": 1_000_000, "trainable": 500_000, "gradients": 500_000, "optimizer": 1_000_000,
                  "step_peak": 7_000_000, "matrices": 140, "matrices_float32": 1000},
        "seconds": 12.6,
        "best_epoch": 3,
        "history": [{"loss": 0.5, "validation": 0.8}] * 5,
        "windows": {"train": 60, "validation": 0, "test": 20},
        "test_subjects": list(people),
        "config": config.values(),
        "learning_rate": 0.002,
        "target": target,
        "sources": ["motionsense", "dsa"],
        "synthetic": target.startswith("synthetic"),
        "pretrained": {
            "identity": "x", "loss": 0.1, "seconds": 100.0,
            "config": {**vars(PRESET.pretrain), "model": vars(PRESET.pretrain.model), "seed": seed},
        },
        "identity": "0123456789abcdef",
        "provenance": {"command": "harlora run", "commit": "abc", "dirty": False, "device": "a CPU", "threads": 2,
                       "versions": {"torch": "2.13.0"}},
    }  # fmt: skip


def people(right):
    return {str(who): [[count, 10 - count], [10 - count, count]] for who, count in enumerate(right)}


def page(tmp_path, records, *experiments):
    folder = tmp_path / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(records):
        (folder / f"{number}.json").write_text(json.dumps(one))
    return build_report(folder, tmp_path / "docs" / "page.md", experiments=experiments).read_text()


def test_that_an_encoder_was_pretrained_twice_is_said(tmp_path):
    made = [record(method) for method in ("linear_probe", "full", "qlora", "scratch")]
    made[2]["pretrained"]["loss"] = made[3]["pretrained"]["loss"] = 0.1001
    runs = ({"protocol": ("subject",), "method": ("linear_probe", "full", "qlora", "scratch")},)
    text = page(tmp_path / "twice", made, Experiment(name="twice", title="Twice", runs=runs))
    assert (
        "UCI HAR (raw signals, HAPT): 1 of 3 runs begin from an encoder that was pretrained another time with" in text
    )
    once = page(tmp_path / "once", [*made[:2], made[3]], Experiment(name="once", title="Once", runs=runs))
    assert "another time" not in once


# Person by person


def test_macro_f1_of_one_person_by_hand():
    # sit: precision 8/9, recall 8/10; walk: precision 9/11, recall 9/10; the third label never occurs.
    f1 = (2 * 8 / 19 + 2 * 9 / 20) / 2
    assert macro_f1_of_confusion([[8, 2, 0], [1, 9, 0], [0, 0, 0]]) == pytest.approx(2 * 8 / 19 / 2 + 2 * 9 / 21 / 2)
    assert macro_f1_of_confusion([[8, 2, 0], [0, 9, 1], [0, 0, 0]]) != pytest.approx(f1)
    assert macro_f1_of_confusion([[0, 0], [0, 5]]) == 1


def test_a_person_tested_under_two_seeds_is_one_observation():
    found = by_person([record(people=people([5, 10])), record(seed=1, people=people([9]))])
    assert found == pytest.approx({"0": (0.5 + 0.9) / 2, "1": 1.0})


def test_a_difference_is_paired_by_person_and_seed():
    better, worse = [9, 8, 10, 7, 9, 10, 8], [8, 7, 9, 6, 8, 9, 7]
    found = compare([record(people=people(better))], [record("lora", people=people(worse))])
    assert found.people == 7
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert found.p == pytest.approx(2 / 2**7)  # all of seven differences have one sign
    mixed = compare([record(people=people(better))], [record("lora", people=people(better[::-1]))])
    assert mixed.low < 0 < mixed.high
    assert mixed.p > 0.5
    assert compare([record(people=people(better))], [record("lora", people=people(better))]).p == 1
    assert compare([record(people=people([9] * 5))], [record("lora", people=people([8] * 5))]).p is None
    assert compare([record(seed=0)], [record("lora", seed=1)]) is None
    assert compare([record()], [{**record("lora"), "confusion_by_subject": {}}]) is None


def test_of_many_methods_qlora_is_compared_with_each(tmp_path):
    names = ("scratch", "bitfit", "full", "lora", "qlora")
    made = [record(method, people=people([9 - number] * 8)) for number, method in enumerate(names)]
    experiment = Experiment(name="many", title="Many", runs=({"protocol": ("subject",), "method": names},))
    text = page(tmp_path, made, experiment).partition("## Aims")[0]
    assert text.count(" less ") == text.count("| QLoRA less ") == 4


def test_p_is_adjusted_for_all_that_are_looked_at():
    found = [Comparison(9, 0.1, 0.0, 0.2, p) for p in (0.04, None, 0.01, 0.02)]
    assert adjusted(found) == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.03)]
    assert adjusted([Comparison(5, 0.1, 0.0, 0.2, None)]) == [None]
    assert adjusted([]) == []


# Tables


def test_a_table_has_a_column_for_what_varies():
    made = [record(quant_type=kind, blocksize=size) for kind in ("nf4", "fp4") for size in (64, 256)]
    header, rows = table(pooled(made), ("scores", "cost"))
    assert header == ["method", "quant_type", "blocksize", "accuracy", "macro-F1", "trainable", "held, MB", "seconds",
                      "seeds"]  # fmt: skip
    assert sorted(row[1:3] for row in rows) == [["fp4", "256"], ["fp4", "64"], ["nf4", "256"], ["nf4", "64"]]
    header, rows = table(pooled([record(seed=0), record(seed=1)]), ("calibration",))
    assert header == ["method", "ECE", "MCE", "ACE", "Brier", "seeds"]
    assert rows[0][-1] == "2"


def test_seeds_are_pooled_and_nothing_else_is():
    made = [record(seed=seed, rank=rank, alpha=2.0 * rank) for seed in (0, 1, 2) for rank in (8, 16)]
    made += [record(seed=0, rank_pattern={"fc1": 4})]
    assert sorted(len(one.get("seeds", (0,))) for one in pooled(made)) == [1, 3, 3]


def test_the_papers_figure_stands_beside_the_run_it_belongs_to():
    common = {"protocol": "paper"}
    assert paper(record("full", **common)) == "0.969"
    assert paper(record("lora", rank=64, **common)) == "0.965"
    assert paper(record("qlora", "motionsense", **common)) == "0.949"
    few = {**record("lora", label_fraction=0.429, **common), "windows": {"train": 30, "validation": 0, "test": 30}}
    assert paper(few) == "accuracy 0.926"
    for other in (
        record("full"),
        record("scratch", **common),
        record("full", "dsa", **common),
        record("full", "synthetic_a", **common),
        record("full", windows_per_class=5, **common),
    ):
        assert paper(other) == ""


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown(["a", "b"], [["q|k=4", "1"]]).splitlines()[2] == r"| q\|k=4 | 1 |"


def test_latex_is_what_latex_reads(tmp_path):
    text = latex(["method", "windows_per_class", "95 % interval"], [["a & b", "5", "0.9 ± 0.1"], ["~^\\", "<", "#1"]],
                 "{50 %}")  # fmt: skip
    assert r"windows\_per\_class" in text
    assert r"a \& b & 5 & 0.9 $\pm$ 0.1 \\" in text
    assert r"\textasciitilde{}\textasciicircum{}\textbackslash{} & $<$ & \#1 \\" in text
    assert r"\caption{\{50 \%\}}" in text
    compiler = shutil.which("pdflatex")
    if compiler:
        file = tmp_path / "table.tex"
        file.write_text(f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{text}\\end{{document}}")
        subprocess.run([compiler, "-halt-on-error", file], cwd=tmp_path, check=True, capture_output=True)


# The page

SUBJECTS = Experiment(
    name="subjects", title="New people", about="Nobody on both sides.", seeds=(0, 1),
    runs=({"protocol": ("subject",), "method": ("linear_probe", "full", "lora", "qlora")},),
)  # fmt: skip
RANK = Experiment(
    name="rank", title="Rank", x="rank", runs=({"protocol": ("paper",), "method": ("lora",), "rank": (8, 64)},)
)


def test_rows_tell_what_they_differ_in():
    unlike = record()
    unlike["pretrained"]["config"] = {**unlike["pretrained"]["config"], "rotated": 0.0}
    header, rows = table([record(), unlike], ("scores",))
    assert [row[header.index("pretrain.rotated")] for row in rows] == ["0.0", "0.5"]
    header, rows = table([record(), record(alpha=64.0), record("full")], ("scores",))
    assert [row[header.index("alpha / rank")] for row in rows] == ["–", "2.0", "8.0"]
    header, rows = table([record(blocksize=size) for size in (1024, 64, 256)], ("scores",))
    assert [row[header.index("blocksize")] for row in rows] == ["64", "256", "1024"]
    header, _ = table([record("lora", rank=rank, alpha=2.0 * rank) for rank in (8, 64)], ("scores",))
    assert header == ["method", "accuracy", "macro-F1", "seeds"]


def test_the_papers_figure_is_of_one_rank():
    made = [record("qlora", protocol="paper", rank=rank, alpha=2.0 * rank) for rank in (8, 64)]
    assert [paper(one) for one in made] == ["0.953", ""]


def test_where_a_device_of_ones_own_was_decides_what_is_selected():
    mine = record(target="mine")
    mine["config"] = replace(PRESET.finetune, method="lora").for_dataset("mine", "front pocket").values()
    experiment = Experiment(name="x", title="x", runs=({"method": ("lora",)},))
    assert experiment.select([mine]) == []
    assert len(experiment.select([{**mine, "placement": "front pocket"}])) == 1


def test_results_of_other_experiments_are_left_out(tmp_path):
    text = page(tmp_path, [record("lora", protocol="paper", rank=8), record("full")], RANK)
    assert "from the 1 JSON files" in text
    with pytest.raises(InputError, match="no results of the experiments rank"):
        page(tmp_path / "none", [record("full")], RANK)


def test_an_experiment_has_its_section(tmp_path):
    made = [
        record(method, seed=seed, people=people([10 - number] * 8))
        for number, method in enumerate(("qlora", "lora", "full", "linear_probe"))
        for seed in (0, 1)
    ]
    made += [record("lora", protocol="paper", rank=rank, alpha=2.0 * rank) for rank in (8, 64)]
    text = page(tmp_path, made, SUBJECTS, RANK)
    assert "## New people\n\nNobody on both sides.\n" in text
    assert "### UCI HAR (raw signals, HAPT), new people (subject split)" in text
    assert "| QLoRA less LoRA | 8 | +0.1000 | +0.1000 to +0.1000 | 0.008 |" in text
    assert text.partition("## Aims")[0].count(" less ") == 6
    part = text.partition("## Rank\n")[2]
    assert "| LoRA r=64 |" in part
    assert "0.965" in part
    assert (tmp_path / "docs" / "images" / "rank-uci_hapt-paper.png").read_bytes().startswith(b"\x89PNG")
    tables = {file.name for file in (tmp_path / "docs" / "tables").iterdir()}
    assert tables == {"subjects-uci_hapt-subject.tex", "rank-uci_hapt-paper.tex"}
    nothing = Experiment(name="none", title="Not run", seeds=(7,))
    assert "## Not run" not in page(tmp_path, made, SUBJECTS, nothing)


def test_synthetic_results_say_so_in_every_section(tmp_path):
    made = [record(method, "synthetic_a", seed=seed) for method in ("lora", "full", "qlora") for seed in (0, 1)]
    assert "### SYNTHETIC data: " in page(tmp_path, made, SUBJECTS)
    assert "SYNTHETIC" in (tmp_path / "docs" / "tables" / "subjects-synthetic_a-subject.tex").read_text()


def test_a_curve_shows_each_method_with_its_spread(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, file: drawn.append(figure.axes[0]))
    made = [record("lora", seed=seed, rank=rank, alpha=2.0 * rank, people=people([rank // 8 + seed] * 3))
            for seed in (0, 1) for rank in (8, 64)]  # fmt: skip
    plots.curve(pooled([*made, record("full")]), "rank", tmp_path / "x.png", reference={8: 0.9, 64: 0.95})
    axis = drawn[0]
    labels = axis.get_legend_handles_labels()[1]
    assert sorted(labels) == ["LoRA", "LoRA in the paper", "full"]
    assert axis.get_xscale() == "log"
    (bars,) = (c for c in axis.containers if c.get_label() == "LoRA")
    assert list(bars.lines[0].get_xdata()) == [8, 64]
    segments = bars.lines[2][0].get_segments()
    assert all(abs(low[1] - high[1]) > 0.05 for low, high in segments)
    plots.curve([record(quant_type="nf4"), record(quant_type="fp4")], "quant_type", tmp_path / "y.png", reference={})
    assert [text.get_text() for text in drawn[1].get_xticklabels()] == ["fp4", "nf4"]
    plots.plt.close("all")


# Calibration


def test_calibration_by_hand():
    # Four windows: two at 0.8, both right; two at 0.6, one of them right.
    probabilities = np.array([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.6, 0.4]])
    found = calibration(probabilities, np.array([0, 1, 0, 1]))
    assert found["bins"] == [pytest.approx([2, 0.6, 0.5]), pytest.approx([2, 0.8, 1.0])]
    assert found["ece"] == pytest.approx((2 * 0.1 + 2 * 0.2) / 4)
    assert found["mce"] == pytest.approx(0.2)
    assert found["brier"] == pytest.approx((2 * 2 * 0.04 + 2 * 0.16 + 2 * 0.36) / 4)
    assert found["ace"] == pytest.approx((0.2 + 0.2 + 0.4 + 0.6) / 4)  # a bin is one window, for both labels alike
    certain = calibration(np.eye(3), np.arange(3))
    assert (certain["ece"], certain["mce"], certain["ace"], certain["brier"]) == (0, 0, 0, 0)
    assert sum(count for count, *_ in certain["bins"]) == 3


def test_adaptive_bins_hold_equally_many_windows():
    sure = np.linspace(0.5, 1, 1500, endpoint=False)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    drawn = np.random.default_rng(0).random(1500)
    honest = calibration(probabilities, (drawn >= sure).astype(int))
    boastful = calibration(probabilities, (drawn >= 0.5).astype(int))
    assert honest["ace"] < 0.05
    assert boastful["ace"] == pytest.approx(0.25, abs=0.03)  # the mean of what is claimed above one half


def test_settings_that_are_not_the_presets_stand_with_their_experiment(tmp_path):
    usual = Experiment("usual", "Usual", runs=({"method": ("lora", "qlora")},))
    long = Experiment("long", "Long", runs=({"method": ("lora", "qlora"), "epochs": (50,), "dropped": (0.75,)},))
    made = [
        record(method, **changes) for method in ("lora", "qlora") for changes in ({}, {"epochs": 50, "dropped": 0.75})
    ]
    made += [record("qlora", "motionsense")]
    text = page(tmp_path, made, usual, long)
    assert text.count("Settings of all runs") == 1
    assert text.index("## Long") < text.index("Settings of all runs: epochs 50, dropped 0.75.")
    how = text[text.index("## How these were made") :]
    assert (
        "- For new people (subject split): 20 epochs; windows of MotionSense turned by about 15°, 30% of them half"
        in how
    )
    assert "windows of UCI HAR (raw signals, HAPT) turned by about 5°, 50% of their patches left out." in how
    assert "50 epochs" not in how


def test_sections_stand_in_their_place_and_say_what_is_missing(tmp_path):
    runs = ({"method": ("lora", "qlora")},)
    first = Experiment("z", "First", targets=("uci_hapt", "motionsense"), runs=runs, place=1)
    second = Experiment("a", "Second", targets=("uci_hapt",), runs=runs)
    text = page(tmp_path, [record("lora"), record("qlora"), record("lora", "motionsense")], second, first)
    assert text.index("## First") < text.index("So far 3 of 4 runs") < text.index("## Second")
    assert text.count("So far") == 1
    third = replace(second, title="Third", seeds=(0, 1, 2))
    text = page(tmp_path, [], third, first)
    assert "## Third" not in text
    assert "## Not yet\n\n- Third: 2 of 6 runs\n" in text


# Claims


def test_a_claim_is_judged_by_runs_that_have_all_else_in_common():
    claim = Claim("QLoRA above the probe", {"method": "qlora"}, {"method": "linear_probe"}, more="macro_f1")
    good, poor = people([9] * 8), people([7] * 8)
    records = [
        *(record(seed=seed, people=good) for seed in (0, 1)),
        *(record("linear_probe", seed=seed, people=poor) for seed in (0, 1)),
        record(seed=2, people=poor),  # without a control
        record(seed=0, people=poor, epochs=3),  # nor has this one
        record(seed=0, people=poor, rank=4),
    ]
    (line,) = rows([claim], records)
    told = dict(zip(HEADER, line, strict=True))
    assert told["claim"] == "QLoRA above the probe"
    assert (told["here"], told["control"], told["difference"]) == ("0.9000", "0.7000", "+0.2000")
    assert told["holds"] == "yes, in 2 of 2"
    assert told["p"] == "0.008"
    assert told["95 % interval"] == "+0.2000 to +0.2000"
    (line,) = rows([replace(claim, more=None, less="macro_f1")], records)
    assert line[-1] == "**no**, in 0 of 2"
    (line,) = rows([replace(claim, more=None, less="macro_f1", within=0.3)], records)
    assert line[-1] == "yes, in 2 of 2"
    assert rows([replace(claim, that={"method": "full"})], records) == []
    equal = [record(target=t, people=good) for t in ("uci_hapt", "motionsense")]
    equal += [record("linear_probe", target=t, people=good) for t in ("uci_hapt", "motionsense")]
    first, second = rows([claim], equal)
    assert first[-1] == second[-1] == "**no**, in 0 of 1"
    assert (first[0], second[0]) == (claim.says, "")


def test_a_claim_may_be_about_settings_and_other_measures():
    ours = record(mislabelled=0.3, sampler="quality", sampled=0.5) | {"drawn_wrong": 0.1}
    theirs = record(mislabelled=0.3, sampler="uniform", sampled=0.5) | {"drawn_wrong": 0.3}
    settings = {"mislabelled": 0.3, "sampled": 0.5}
    claim = Claim(
        "fewer wrong", {**settings, "sampler": "quality"}, {**settings, "sampler": "uniform"}, less="drawn_wrong"
    )
    (line,) = rows([claim], [ours, theirs, record()])
    assert line[2:] == ["0.1000", "0.3000", "-0.2000", "", "", "yes, in 1 of 1"]
    by_rank = {"ranks": [1, 2, 4], "cut": [0.1, 0.2, 0.3], "squeezed": [0.2, 0.3, 0.4]}
    cut = record(rank=4, by_rank=True) | {"by_rank": by_rank, "aurac": 0.25}
    assert [measured(cut, name) for name in ("cut_2", "squeezed_4", "aurac")] == [0.2, 0.4, 0.25]
    claim = Claim("squeezed above cut", {"rank": 4}, {"rank": 4}, more="cut_2", at="squeezed_2")
    # A run of the same settings that was not scored by rank is no better a control.
    (line,) = rows([claim], [record(rank=4), cut])
    assert line[-1] == "yes, in 1 of 1"
    assert [measured(record(), name) for name in ("loss", "early_loss", "ece")] == [
        0.5,
        0.5,
        record()["calibration"]["ece"],
    ]


def test_a_section_may_be_of_claims_alone(tmp_path):
    claim = Claim("QLoRA above the probe", {"method": "qlora"}, {"method": "linear_probe"}, more="macro_f1")
    experiment = Experiment(
        "claims", "What is said", targets=("uci_hapt",), show=("claims",), claims=(claim,),
        runs=({"protocol": ("subject",), "method": ("qlora", "linear_probe")},),
    )  # fmt: skip
    text = page(tmp_path, [record(people=people([9] * 8)), record("linear_probe", people=people([7] * 8))], experiment)
    said = text.partition("## What is said")[2].partition("## Memory")[0]
    assert "| QLoRA above the probe | UCI HAR (raw signals, HAPT), new people | 0.9000 | 0.7000 | +0.2000 |" in said
    assert "###" not in said
    synthetic = page(
        tmp_path / "b",
        [record(target="synthetic_a"), record("linear_probe", target="synthetic_a")],
        replace(experiment, targets=()),
    )
    assert "| QLoRA above the probe | SYNTHETIC data: " in synthetic


def test_advice_is_the_cheapest_of_those_that_score_nearly_as_well(tmp_path):
    def made(method, right, seconds, held, **more):
        cost = {"seconds": seconds, "bytes": {**record()["bytes"], "frozen": held}}
        return [record(method, target, people=people(right)) | cost | more for target in ("uci_hapt", "motionsense")]

    records = made("full", [10] * 40, 90.0, 9_000_000)
    records += made("lora", [10] * 39 + [9], 60.0, 8_000_000, adapter_file=800_000)
    records += made("qlora", [10] * 36 + [9] * 4, 70.0, 1_000_000, adapter_file=700_000)
    records += made("linear_probe", [5] * 40, 1.0, 500_000)
    records += made("bitfit", [10] * 40, 2.0, 400_000)[:1]  # not on both
    experiment = Experiment(
        "adapters", "Adapters", targets=("uci_hapt", "motionsense"), show=("scores", "advice"),
        runs=({"protocol": ("subject",), "method": ("full", "lora", "qlora", "linear_probe", "bitfit")},),
    )  # fmt: skip
    said = page(tmp_path, records, experiment).partition("### Which to choose, new people")[2].partition("\n## ")[0]
    assert "The best macro-F1 on MotionSense and UCI HAR (raw signals, HAPT) has full: 1.000." in said
    assert "| memory held in training | LoRA r=8: 10.00 MB, 0.998 | QLoRA r=8: 3.00 MB, 0.990 |" in said
    assert "| time to adapt | LoRA r=8: 60 s, 0.998 | LoRA r=8: 60 s, 0.998 |" in said
    assert "| room on disk for each adapter | LoRA r=8: 0.80 MB, 0.998 | QLoRA r=8: 0.70 MB, 0.990 |" in said
    assert "BitFit" not in said
    synthetic = page(
        tmp_path / "b",
        [record(target="synthetic_a"), record("lora", target="synthetic_a")],
        replace(experiment, targets=(), runs=({"protocol": ("subject",), "method": ("lora", "qlora")},)),
    )
    assert "SYNTHETIC data: the best macro-F1 on" in synthetic
