"""The command line: what a user types, sees and gets wrong."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
from rich.console import Console

from harlora import __main__ as program
from harlora import cli
from harlora.data import DATASETS
from harlora.train.experiment import PRESETS, Preset
from small import FINETUNE, PRETRAIN


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARLORA_DATA", raising=False)
    monkeypatch.setitem(PRESETS, "quick", Preset(replace(PRETRAIN, epochs=1), replace(FINETUNE, epochs=1)))


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


LODO = ("lodo", "--targets", "synthetic_a", "--sources", "synthetic_b", "--protocols", "subject")


def test_lodo_prints_the_table_and_writes_results(capsys, tmp_path):
    run(*LODO, "--methods", "linear_probe", "qlora")
    said = capsys.readouterr().out
    assert said.startswith("SYNTHETIC data: no dataset under data")
    assert "QLoRA r=8" in said
    assert "macro-F1" in said
    results = tmp_path / "bench" / "results" / "lodo" / "quick-synthetic"
    files = sorted(results.glob("*.json"))
    assert len(files) == 2
    record = json.loads(files[1].read_text())
    assert record["provenance"]["command"]
    page = (results / "report" / "results.md").read_text()
    assert page.startswith("# Results on SYNTHETIC data")
    assert len(list((results / "report" / "images").glob("*.png"))) == 2
    run(*LODO, "--methods", "linear_probe", "qlora")  # finished: read, not repeated


def test_pretrain_then_finetune(capsys, tmp_path):
    small = (
        "--width", 24, "--depth", 1, "--heads", 2, "--ffn", 32, "--decoder-width", 16,
        "--decoder-heads", 2, "--epochs", 1, "--max-windows", 200,
    )  # fmt: skip
    run("pretrain", "--sources", "synthetic_b", "synthetic_c", *small)
    assert "masked MSE" in capsys.readouterr().out
    (checkpoint,) = tmp_path.glob("runs/pretrain-*/encoder.safetensors")
    for method in ("lora", "zero_shot"):
        run("finetune", "--target", "synthetic_a", "--pretrained", checkpoint, "--method", method, "--epochs", 1,
            "--max-windows", 200, "--rank", 2)  # fmt: skip
        said = capsys.readouterr().out
        assert "SYNTHETIC data" in said
        assert "classifier: runs" in said
    said = fails(capsys, "finetune", "--target", "synthetic_b", "--pretrained", checkpoint)
    assert "pretrained on synthetic_b, which has the people of synthetic_b" in said


def test_data_list_and_inspect(capsys, tmp_path):
    run("data", "list")
    said = capsys.readouterr().out
    assert "motionsense" in said
    assert "synthetic_e" in said
    assert "motionsense is missing: `harlora data download motionsense`, or put https://github.com/mma" in said
    run("data", "inspect", "synthetic_a")
    assert (tmp_path / "synthetic_a.png").read_bytes().startswith(b"\x89PNG")


def test_data_list_can_be_read_where_the_terminal_is_narrow(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=100))
    run("data", "list", "--data", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for entry in (DATASETS["uci_hapt"], DATASETS["pamap2"]):
        (line,) = [line for line in lines if entry.download in line]  # whole
        assert line.endswith(str(tmp_path / entry.folder / entry.file))
    top = next(i for i, line in enumerate(lines) if "pamap2" in line)
    assert not any("pamap2" in line for line in lines[top + 1 : top + 5])
    assert "├" in "".join(lines[top + 1 : top + 6])


def test_data_list_shows_what_cannot_be_read_and_goes_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=160))
    zipfile.ZipFile(tmp_path / "x.zip", "w").close()
    for name in ("dsa", "mine"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "x.zip").rename(tmp_path / "data" / "dsa" / "x.zip")
    (tmp_path / "data" / "mine" / "recordings.safetensors").write_bytes(b"x")
    with pytest.raises(SystemExit):
        run("data", "list")
    said, wrong = capsys.readouterr()
    assert "dsa cannot be read: data/dsa/x.zip: no files named like a01/p1/s01.txt" in wrong
    assert "mine cannot be read: data/mine/recordings.safetensors: not a complete safetensors file" in wrong
    assert sum("cannot be read │" in " ".join(line.split()) for line in said.splitlines()) == 2
    assert "synthetic_e" in said


def test_data_list_shows_what_was_left_out(capsys, tmp_path, monkeypatch):
    names = ("Index", "Arrival_Time", "Creation_Time", "x", "y", "z", "User", "Model", "Device", "gt")
    for sensor, devices in (("accelerometer", "12"), ("gyroscope", "1")):
        rows = [
            f"{i},{1424696633000 + 20 * i},{1424696631000000000 + 20000000 * i},0,0,9.8,a,s3,s3_{device},{activity}"
            for device in devices
            for i, activity in enumerate(["stand"] * 300 + ["null"] * 150 + ["sit"] * 50)
        ]
        file = tmp_path / "data" / "hhar" / f"Phones_{sensor}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([",".join(names), *rows]))
    monkeypatch.setattr(cli, "console", Console(width=600))  # nothing is folded
    run("data", "list")
    said = capsys.readouterr().out
    assert "stand 3" in said
    assert "null 1; 1 stretches too short; 1 devices without gyroscope" in said
    run("data", "inspect", "hhar")
    assert (tmp_path / "hhar.png").read_bytes().startswith(b"\x89PNG")


def test_report_from_json_alone(capsys, tmp_path):
    run(*LODO, "--methods", "linear_probe", "qlora", "--ranks", 2, 4, "--results", "results")
    for folder in ("runs", "cache"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-gone")
    run("report", "results", "--out", "docs/page.md")
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "SYNTHETIC" in page
    for link in page.split("](")[1:]:
        target = link.split(")")[0]
        assert (tmp_path / "docs" / target).exists(), target


def bad_archive(tmp_path, name="motionsense", content=b"PK\x03\x04 not really"):
    folder = tmp_path / "mine" / name
    folder.mkdir(parents=True)
    (folder / "archive.zip").write_bytes(content)
    return folder.parent


def test_memory_without_any_dataset(capsys):
    run("memory", "--methods", "linear_probe", "--batch-size", "8")
    said = capsys.readouterr().out
    assert said.startswith("Memory in training, batches of 8 windows, cpu")
    assert "saved activations" in said
    run("memory", "--methods", "linear_probe", "linear_probe", "--batch-size", "8", "--json")
    (size,) = json.loads(capsys.readouterr().out).values()
    assert size["batch"] == 8 * (4 * 128 * 6 + 8)
    assert "unknown method 'qlra'; required one of zero_shot" in fails(capsys, "memory", "--methods", "full", "qlra")
    assert "--classes must be at least 1" in fails(capsys, "memory", "--classes", "0")
    assert "batch_size must be at least 2" in fails(capsys, "memory", "--methods", "linear_probe", "--batch-size", "1")


def test_wrong_names_are_named(capsys):
    assert "unknown dataset 'motionsens'; did you mean motionsense?" in fails(capsys, *LODO, "--targets", "motionsens")
    assert "unknown method 'qlra'; required one of zero_shot" in fails(capsys, *LODO, "--methods", "qlra")
    assert "unknown preset 'huge'" in fails(capsys, "lodo", "--preset", "huge")
    assert "unknown protocol 'fair'" in fails(capsys, *LODO, "--protocols", "fair")
    assert "rank must be at least 1" in fails(capsys, *LODO, "--ranks", "0")
    assert "--threads must be at least 0" in fails(capsys, *LODO, "--threads", "-1")
    assert "--device must be cpu, cuda or cuda:0, got 'tpu9'" in fails(capsys, *LODO, "--device", "tpu9")
    assert "capture: on requires a CUDA device, got cpu; use auto or off" in fails(capsys, *LODO, "--capture", "on")
    assert "unknown dataset 'nope'" in fails(capsys, "data", "inspect", "nope")
    assert "unknown method" in fails(
        capsys, "finetune", "--target", "synthetic_a", "--pretrained", "x", "--method", "x"
    )


def test_missing_files_are_named(capsys, tmp_path, monkeypatch):
    said = fails(capsys, "finetune", "--target", "synthetic_a", "--pretrained", "none.safetensors")
    assert "none.safetensors: no such file; give the encoder.safetensors of a `harlora pretrain` run" in said
    assert "has no results JSON; run `harlora lodo` first" in fails(capsys, "report", "nowhere")
    said = fails(capsys, "data", "inspect", "uci_hapt")
    assert "uci_hapt: no archive in data/uci_hapt; run `harlora data download uci_hapt`, or download https://" in said
    monkeypatch.setenv("HARLORA_DATA", "nowhere")
    assert "HARLORA_DATA names nowhere, which is no folder" in fails(capsys, "data", "list")
    assert "--data names elsewhere, which is no folder" in fails(capsys, "data", "list", "--data", "elsewhere")


def test_damaged_files_are_named(capsys, tmp_path):
    root = bad_archive(tmp_path)
    said = fails(capsys, "data", "list", "--data", root)
    assert "archive.zip: not a complete zip archive" in said
    assert "download it again" in said
    assert not list((tmp_path / "cache").glob("motionsense*"))
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    said = fails(capsys, "finetune", "--target", "synthetic_a", "--pretrained", "broken.safetensors")
    assert "broken.safetensors: not a complete safetensors file" in said
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text('{"scores": 1}')
    assert "a.json: not a result of `harlora lodo`" in fails(capsys, "report", "results")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a;b\n1;2\n", "required columns gravity.x"),
        (",".join(f"{s}.{a}" for s in ("gravity", "userAcceleration", "rotationRate") for a in "xyz")
         + "\n" + "0,1,0,0,0,0,0,0,nan\n" * 200, "row 2 has a value that is not a finite number"),
        (",".join(f"{s}.{a}" for s in ("gravity", "userAcceleration", "rotationRate") for a in "xyz")
         + "\n" + "0,1,0,0,0,0,0,0,0\n" * 100, "the recording has 100 samples at 50 Hz, required at least one window"),
    ],
)  # fmt: skip
def test_bad_recordings_are_named(capsys, tmp_path, content, message):
    root = tmp_path / "mine"
    (root / "motionsense").mkdir(parents=True)
    with zipfile.ZipFile(root / "motionsense" / "a.zip", "w") as archive:
        archive.writestr("wlk_1/sub_1.csv", content)
    said = fails(capsys, "data", "inspect", "motionsense", "--data", root)
    assert "wlk_1/sub_1.csv" in said
    assert message in said
    assert not (tmp_path / "motionsense.png").exists()


def test_unwritable_output_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = fails(capsys, *LODO, "--out", "file/runs")
    assert "cannot write the run folder" in said
    assert "choose another with --out" in said


def test_a_missing_option_is_explained(capsys):
    said = fails(capsys, "finetune")
    assert "--target" in said
    assert "--pretrained" in said
    assert "harlora" in fails(capsys, "frobnicate")


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "carry_out", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run(*LODO)


def test_interruption_says_that_it_goes_on(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "carry_out", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(*LODO)
    assert stopped.value.code == 130
    assert "goes on from here" in capsys.readouterr().err


EXPERIMENT = """
title = "A question"
preset = "quick"
targets = ["synthetic_a", "synthetic_b"]
sources = ["synthetic_c"]
seeds = [0, 1]
"""


def test_a_part_of_an_experiment(capsys, tmp_path):
    (tmp_path / "x.toml").write_text(EXPERIMENT)
    for chosen, count in (((), 4), (("--seeds", "1"), 2), (("--targets", "synthetic_b", "--seeds", "1"), 1)):
        run("run", "x.toml", "--plan", *chosen)
        assert f"{count} runs, {count} to do" in capsys.readouterr().out
    assert "no experiment has runs on these targets with these seeds" in fails(capsys, "run", "x.toml", "--seeds", "7")


@pytest.mark.parametrize("command", [(), ("data",), ("data", "list"), ("data", "inspect"), ("data", "import"),
                                     ("pretrain",), ("finetune",), ("predict",), ("lodo",), ("run",),
                                     ("report",)])  # fmt: skip
def test_help_suffices(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        run(*command, "--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "usage: harlora" in said
    # No option without a word on what it does: a default alone, on a line of its own, is the sign of one.
    assert not [line for line in said.splitlines() if line.strip(" │").startswith("(default:") and "--" in line]


def test_the_program_is_installed():
    done = subprocess.run([sys.executable, "-m", "harlora", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "lodo" in done.stdout
    (script,) = entry_points(group="console_scripts", name="harlora")
    assert script.load() is program.main


def test_without_the_extra_the_program_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None\nfrom harlora.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("harlora: the program requires tyro, which is not installed; install harlora with")
    assert len(done.stderr.splitlines()) == 1
