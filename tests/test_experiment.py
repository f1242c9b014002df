"""Experiments as data: what a file means, which runs it plans, and who carries them out."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harlora.errors import InputError
from harlora.train import execute
from harlora.train.execute import Ledger, Workers, carry_out
from harlora.train.experiment import PRESETS, Experiment, Preset, load_experiment
from harlora.train.finetune import FinetuneConfig
from harlora.train.lodo import Study
from harlora.train.runs import open_run
from small import FINETUNE, PRETRAIN

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


class KilledError(Exception):
    pass


class Quiet:
    def __init__(self):
        self.lines, self.runs = [], []

    def run(self, name, number, total):
        self.runs.append((name, number, total))
        return lambda done, steps, note: None

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "quick", Preset(replace(PRETRAIN, epochs=1), replace(FINETUNE, epochs=1)))


def lodo(study, root, runs, results, *, progress, **options):
    return carry_out(study.experiment().plan(root), Ledger(root, results, CPU), runs, progress=progress, **options)


@pytest.mark.usefixtures("tiny_preset")
def test_a_study_covers_every_combination(tmp_path):
    study = Study(
        targets=("synthetic_a", "synthetic_b"), sources=("synthetic_a", "synthetic_b", "synthetic_c"),
        methods=("zero_shot", "linear_probe", "qlora"), ranks=(2, 4), windows_per_class=(3,),
    )  # fmt: skip
    quiet = Quiet()
    records = lodo(study, tmp_path, tmp_path / "runs", tmp_path / "results", progress=quiet)
    # For a target and protocol: zero-shot, probe and qlora at two ranks, the latter two with all labels and with few.
    assert len(records) == 2 * 2 * (1 + 2 * (1 + 2))
    assert len(list((tmp_path / "results").glob("*.json"))) == len(records)
    assert len(list((tmp_path / "runs").glob("pretrain-*"))) == 2  # once for a target
    assert len(quiet.runs) == len(records) + 2
    assert quiet.runs[-1][1] == quiet.runs[-1][2]
    assert all("SYNTHETIC" in line for line in quiet.lines)
    for record in records:
        assert record["target"] not in record["sources"]
        assert record["config"]["alpha"] == 2 * record["config"]["rank"]
    # Again: nothing is computed anew, and the results are not touched.
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()}
    again = lodo(study, tmp_path, tmp_path / "runs", tmp_path / "results", progress=Quiet())
    assert again == records
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()} == times


@pytest.mark.usefixtures("tiny_preset")
def test_a_study_killed_in_the_middle_ends_the_same(tmp_path, monkeypatch):
    study = Study(targets=("synthetic_a",), sources=("synthetic_b",), methods=("lora",), protocols=("paper",))

    def run(name):
        return lodo(study, tmp_path, tmp_path / name, tmp_path / f"results-{name}", progress=Quiet())

    (expected,) = run("undisturbed")
    original = execute.finetune

    def killed(*args, **options):
        def report(done, total, note):
            if done == 5:
                raise KilledError

        return original(*args, **{**options, "report": report})

    monkeypatch.setattr(execute, "finetune", killed)
    with pytest.raises(KilledError):
        run("killed")
    assert not (tmp_path / "results-killed").exists()
    monkeypatch.setattr(execute, "finetune", original)
    (record,) = run("killed")
    for key in ("scores", "history", "best_epoch", "bytes", "identity"):
        assert record[key] == expected[key], key


def test_wrong_studies_are_refused(tmp_path):
    for options, message in (
        ({"preset": "huge"}, "unknown preset 'huge'; required one of quick, standard"),
        ({"methods": ("qlra",)}, "unknown method 'qlra'"),
        ({"protocols": ("random",)}, "unknown protocol"),
        ({"ranks": (0,)}, "rank must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            Study(**options).experiment()
    with pytest.raises(InputError, match="leaves no dataset to pretrain on"):
        lodo(Study(targets=("synthetic_a",), sources=("synthetic_a",)), tmp_path, tmp_path, tmp_path, progress=Quiet())


# Files


def written(tmp_path, text):
    file = tmp_path / "experiment.toml"
    file.write_text(text)
    return file


WHOLE = """
title = "A question"
about = "Said in a sentence."
preset = "quick"
targets = ["synthetic_a"]
sources = ["synthetic_b", "synthetic_c"]
seeds = [0, 4]
x = "rank"
show = ["scores", "calibration"]

[set]
protocol = "subject"

[[runs]]
method = ["lora", "qlora"]
rank = [2, 6]
pretrain.rescaled = [0.0, 0.2]

[[runs]]
method = "full"
epochs = 1
learning_rate = 1
rank = [2, 6]
"""


@pytest.mark.usefixtures("tiny_preset")
def test_a_file_plans_every_combination_once(tmp_path):
    tasks = load_experiment(written(tmp_path, WHOLE)).plan(tmp_path)
    # Rank says nothing to full fine-tuning, so its two are one.
    assert len(tasks) == len(set(map(repr, tasks))) == 2 * (2 * 2 * 2 + 1)
    assert {task.target for task in tasks} == {"synthetic_a"}
    assert {task.sources for task in tasks} == {("synthetic_b", "synthetic_c")}
    assert {task.finetune.protocol for task in tasks} == {"subject"}
    for task in tasks:
        assert task.pretrain.seed == task.finetune.seed
    lora = [task for task in tasks if task.finetune.method == "lora" and task.finetune.seed == 4]
    assert {(task.finetune.rank, task.finetune.alpha, task.pretrain.rescaled) for task in lora} == {
        (rank, 2.0 * rank, rescaled) for rank in (2, 6) for rescaled in (0.0, 0.2)
    }
    full = [task.finetune for task in tasks if task.finetune.method == "full"]
    assert all(type(config.learning_rate) is float and config.learning_rate == 1 for config in full)
    # The runs of one pretraining follow each other.
    order = [(task.pretrain.seed, task.pretrain.rescaled) for task in tasks]
    assert sum(one != other for one, other in itertools.pairwise(order)) == len(set(order)) - 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A question"', "", "title must be a line of text, got None"),
        ("x = ", "y = ", "unknown key 'y'; required some of title, about"),
        ("rank = [2, 6]\npretrain", "rnk = [2]\npretrain", "'rnk' is no setting of fine-tuning; did you mean rank?"),
        ("pretrain.rescaled", "pretrain.rescald", "'rescald' is no setting of pretraining; did you mean rescaled?"),
        ("pretrain.rescaled", "pretrain.model.heds", "'heds' is no setting of the model; did you mean heads?"),
        (
            "pretrain.rescaled = [0.0, 0.2]",
            "pretrain.model.heads = 5",
            "width must be a multiple of 2·heads=10, got 24",
        ),
        ("pretrain.rescaled = [0.0, 0.2]", "pretrain = 5", "pretrain must be a table of settings, got 5"),
        ('"qlora"]', '"qlra"]', "unknown method 'qlra'"),
        ("epochs = 1", 'epochs = "1"', "epochs must be of type int, got '1'"),
        ("epochs = 1", "epochs = true", "epochs must be of type int, got True"),
        ("epochs = 1", "epochs = 0", "epochs must be above 0, got 0"),
        ('preset = "quick"', 'preset = "huge"', "unknown preset 'huge'"),
        ("seeds = [0, 4]", "seeds = [0.5]", r"seeds must be a list of whole numbers, got \[0.5\]"),
        ('["synthetic_a"]', '"synthetic_a"', "targets must be a list of names, got 'synthetic_a'"),
        ('x = "rank"', 'x = "rang"', "x must be a setting of fine-tuning, got 'rang'"),
        (
            '"calibration"]',
            '"colours"]',
            "show must be some of scores, cost, calibration, pareto, advice, claims; got colours",
        ),
        ('[set]\nprotocol = "subject"', "set = 3", "set must be a table of settings, got 3"),
        ("[set]", "[set", "not a TOML file"),
    ],
)
@pytest.mark.usefixtures("tiny_preset")
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, old, new, message):
    assert old in WHOLE
    with pytest.raises(InputError, match=r"experiment\.toml: .*" + message):
        load_experiment(written(tmp_path, WHOLE.replace(old, new)))


CLAIM = """
[[claims]]
says = "QLoRA above the probe"
this = { method = "qlora", rank = 2 }
that = { method = "linear_probe" }
more = "macro_f1"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ('more = "macro_f1"', 'more = "cut_2"\nat = "squeezed_2"', None),
        ('more = "macro_f1"', "", "claim 'QLoRA above the probe': required one of more and less"),
        ('more = "macro_f1"', 'more = "fun"', "can be about macro_f1, ece, .* such as cut_4; got 'fun'"),
        ("rank = 2", "rnk = 2", "'rnk' is no setting of fine-tuning; did you mean rank?"),
        ("says", "said", "unexpected keyword argument 'said'"),
        ("[[claims]]", "[claims]", "claims must be an array of tables"),
    ],
)
@pytest.mark.usefixtures("tiny_preset")
def test_a_file_may_make_claims(tmp_path, old, new, message):
    assert old in CLAIM
    file = written(tmp_path, WHOLE + CLAIM.replace(old, new))
    if message is None:
        (claim,) = load_experiment(file).claims
        assert claim.this == {"method": "qlora", "rank": 2}
    else:
        with pytest.raises(InputError, match=r"experiment\.toml: .*" + message):
            load_experiment(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        load_experiment(tmp_path / "none.toml")


def test_settings_that_would_be_overlooked_are_refused():
    with pytest.raises(InputError, match=r"seed is no setting of a run; write seeds = "):
        Experiment(name="x", title="x", runs=({"seed": (1, 2)},)).check()
    with pytest.raises(InputError, match="test_people must be a list of values, got '12'; in a file a list within"):
        Experiment(name="x", title="x", runs=({"test_people": ("12",)},)).check()
    for model, message in (({"window": 64}, "model.window must be 128"), ({"channels": 3}, "model.channels must be 6")):
        grid = {f"pretrain.model.{key}": (value,) for key, value in model.items()}
        with pytest.raises(InputError, match=message):
            Experiment(name="x", title="x", runs=(grid,)).check()
    with pytest.raises(InputError, match="rotated must be from 0 to 1"):
        Experiment(name="x", title="x", runs=({"pretrain.rotated": (2.0,)},)).check()


def test_drawing_by_quality_is_one_run_however_it_is_written():
    short, long = FinetuneConfig(method="tsqlora"), FinetuneConfig(method="tsqlora", sampler="quality", sampled=0.5)
    assert short.for_dataset("uci_hapt") == long.for_dataset("uci_hapt")
    assert FinetuneConfig().for_dataset("uci_hapt").values().keys().isdisjoint({"sampler", "sampled"})


def test_rslora_scales_by_the_root_of_the_rank_at_every_rank():
    grid = {"method": ("lora",), "rank": (8, 32), "rslora": (True,)}
    assert [c.alpha for _, c in Experiment(name="x", title="x", runs=(grid,)).configurations(0)] == [16, 16]


def test_one_encoder_may_serve_all_seeds():
    shared = Experiment(name="x", title="x", seeds=(0, 1), runs=({"pretrain.seed": (5,)},))
    ((before, config),) = shared.configurations(1)
    assert (before.seed, config.seed) == (5, 1)
    ((before, config),) = Experiment(name="x", title="x", seeds=(0, 1)).configurations(1)
    assert (before.seed, config.seed) == (1, 1)


def test_the_studys_own_experiments_can_be_planned(tmp_path):
    files = sorted((ROOT / "experiments").rglob("*.toml"))
    assert files
    for file in files:
        experiment = load_experiment(file)
        assert experiment.about
        synthetic = replace(experiment, targets=(), sources=())
        assert synthetic.plan(tmp_path)


@pytest.mark.usefixtures("tiny_preset")
def test_an_experiment_finds_its_own_results_and_no_others(tmp_path):
    mine = load_experiment(written(tmp_path, WHOLE))
    ledger = Ledger(tmp_path, tmp_path / "results", CPU)
    small = replace(mine, seeds=(0,), runs=({"method": ("lora", "scratch"), "rank": (2,)},))
    records = carry_out(small.plan(tmp_path), ledger, tmp_path / "runs", progress=Quiet())
    assert small.select(records) == records
    assert [r["config"]["method"] for r in replace(small, runs=({"method": ("lora",)},)).select(records)] == ["lora"]
    for other in (
        {"seeds": (1,)},
        {"targets": ("synthetic_b",)},
        {"preset": "standard"},
        {"runs": ({"method": ("lora", "scratch"), "rank": (2,), "epochs": (7,)},)},
    ):
        assert replace(small, **other).select(records) == []
    # Pretraining decides what LoRA begins from, and nothing of training from scratch.
    longer = replace(small, runs=({"method": ("lora", "scratch"), "rank": (2,), "pretrain.epochs": (7,)},))
    assert [record["config"]["method"] for record in longer.select(records)] == ["scratch"]
    assert small.select([{**records[0], "config": {"method": "of another version"}}]) == []


# Who carries it out


def deciding(record):
    keys = ("scores", "history", "best_epoch", "identity", "calibration", "confusion_by_subject", "parameters")
    return {key: record[key] for key in keys}


@pytest.mark.usefixtures("tiny_preset")
def test_a_result_counts_wherever_it_was_computed(tmp_path):
    study = Study(targets=("synthetic_a",), sources=("synthetic_b",), methods=("linear_probe",), protocols=("paper",))
    first = lodo(study, tmp_path, tmp_path / "here", tmp_path / "results", progress=Quiet())
    quiet = Quiet()
    again = lodo(study, tmp_path, tmp_path / "elsewhere", tmp_path / "results", progress=quiet)
    assert again == first
    assert quiet.lines == ["1 of 1 runs have results already"]
    assert not (tmp_path / "elsewhere").exists()
    (file,) = (tmp_path / "results").iterdir()
    file.write_text("{")
    with pytest.raises(InputError, match="not a JSON file .*delete it, the run is done again"):
        lodo(study, tmp_path, tmp_path / "here", tmp_path / "results", progress=Quiet())


SMALL = """
title = "Small"
preset = "quick"
targets = ["synthetic_a"]
sources = ["synthetic_b"]

[[runs]]
protocol = ["paper", "subject"]
method = ["linear_probe", "qlora"]
epochs = 2
rank = 2
max_windows = 200

[runs.pretrain]
epochs = 1
max_windows = 150
model = { width = 24, depth = 2, heads = 2, ffn = 48, decoder_width = 16, decoder_heads = 2, decoder_ffn = 32 }
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    tasks = load_experiment(written(folder, SMALL)).plan(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    records = carry_out(tasks, Ledger(folder, folder / "results", CPU), folder / "runs", progress=Quiet())
    torch.set_num_threads(threads)
    return tasks, records


def workers_of(on):
    """Process numbers of the workers that are at work for this process or its Ray cluster."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, parent = (
                (folder / "cmdline").read_bytes(),
                (folder / "stat").read_text().rpartition(")")[2].split()[1],
            )
        except OSError:  # ended meanwhile
            continue
        mine = command.startswith(b"ray::_") if on == "ray" else b"spawn_main" in command and int(parent) == os.getpid()
        if mine:
            yield int(folder.name)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("on", ["cores", "ray"])
def test_workers_find_the_same(tmp_path, undisturbed, on, killed):
    """Also when one of two workers is killed while it works."""
    tasks, expected = undisturbed
    runs = tmp_path / "runs"
    victims = []

    def kill():
        while not victims and not stop.wait(0.02):
            if any(runs.glob("qlora-*/config.json")) and (found := sorted(workers_of(on))):
                os.kill(found[0], signal.SIGKILL)
                victims.append(found[0])

    stop = threading.Event()
    killer = threading.Thread(target=kill)
    if killed:
        killer.start()
    quiet = Quiet()
    ledger = Ledger(tmp_path, tmp_path / "results", CPU)
    workers = Workers(on=on, jobs=2, address="local")
    try:
        records = carry_out(tasks, ledger, runs, workers=workers, progress=quiet)
    finally:
        stop.set()
        if killed:
            killer.join()
    assert len(victims) == killed
    assert [deciding(record) for record in records] == [deciding(record) for record in expected]
    assert len(list((tmp_path / "results").glob("*.json"))) == len(tasks)
    assert len(quiet.lines) == len(tasks)


@pytest.mark.parametrize("on", ["process", "cores", "ray"])
def test_a_run_that_its_data_do_not_allow_is_left_out(tmp_path, on):
    runs = (
        "[[runs]]\nmethod = 'linear_probe'\nwindows_per_class = [100000, 2]\nepochs = 1\nmax_windows = 200\n"
        "[runs.pretrain]" + SMALL.partition("[runs.pretrain]")[2]
    )
    tasks = load_experiment(written(tmp_path, SMALL.partition("[[runs]]")[0] + runs)).plan(tmp_path)
    assert len(tasks) == 2
    ledger = Ledger(tmp_path, tmp_path / "results", CPU)
    workers = Workers(on=on, jobs=on != "process", address="local")
    told = []
    records = carry_out(
        tasks, ledger, tmp_path / "runs", workers=workers, progress=Quiet(),
        impossible=lambda task, error: told.append((task, str(error))),
    )  # fmt: skip
    assert [record["config"]["windows_per_class"] for record in records] == [2]
    ((task, error),) = told
    assert task == tasks[0]
    assert error.startswith("synthetic_a: ")
    assert error.endswith("fewer than the 100000 windows per class asked for")
    with pytest.raises(InputError, match="^synthetic_a: "):
        carry_out(tasks, ledger, tmp_path / "runs", workers=workers, progress=Quiet())


def test_wrong_workers_are_refused(tmp_path):
    for options, message in (
        ({"on": "slurm"}, "on must be one of process, cores, ray; got 'slurm'"),
        ({"jobs": -1}, "jobs must be at least 0, got -1"),
        ({"threads_each": 0}, "threads_each must be at least 1, got 0"),
        ({"jobs": 2}, "jobs and threads_each are of runs that go at a time, got 2 and 1 with on process"),
        ({"on": "ray", "jobs": 2}, "jobs: a Ray cluster takes as many runs as it has cores for, got 2"),
    ):
        with pytest.raises(InputError, match=message):
            carry_out([], Ledger(tmp_path, tmp_path, CPU), tmp_path, workers=Workers(**options), progress=Quiet())


# A kill at any moment


def test_what_a_killed_process_was_writing_is_no_file_of_the_study(tmp_path):
    with open_run(tmp_path, "a", {"kind": "test"}) as run:
        for name in ("metrics.json", "encoder.safetensors"):
            code = (
                "import os, sys; from pathlib import Path; from harlora.files import replacing\n"
                "with replacing(Path(sys.argv[1])) as file: file.write_text('{'); os._exit(9)"
            )
            done = subprocess.run([sys.executable, "-c", code, run.folder / name], check=False)
            assert done.returncode == 9
        left = [path for path in run.folder.iterdir() if path.name.endswith(".part")]
        assert len(left) == 2
        assert {path.name for path in run.folder.glob("*.json")} == {"config.json"}
        assert not list(run.folder.glob("*.safetensors"))
    with open_run(tmp_path, "a", {"kind": "test"}) as run:
        assert not any(path.exists() for path in left)


KILLS = """
import os, random, signal, sys, time
import torch
from harlora import cli

torch.set_num_threads(1)
random.seed(5)
kills = 0
while True:
    child = os.fork()  # with everything imported, so that nearly all of its life is work
    if not child:
        sys.stdout = open(os.devnull, "w")
        try:
            cli.main(sys.argv[1:])
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    if kills < 10:
        time.sleep(random.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        break
    kills += 1
print(kills, status)
"""


def test_ten_kills_change_nothing(tmp_path, undisturbed, monkeypatch):
    """SIGKILL at ten random moments: the experiment ends with what it would have ended with, and no file is broken."""
    _, expected = undisturbed
    folder = tmp_path / "killed"
    folder.mkdir()
    file = written(folder, SMALL)
    monkeypatch.delenv("HARLORA_DATA", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", KILLS, "run", file, "--results", "results", "--threads", "1"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "10 0", done.stdout + done.stderr
    found = [json.loads(each.read_text()) for each in (folder / "results").glob("*.json")]
    assert {record["identity"]: deciding(record) for record in found} == {
        record["identity"]: deciding(record) for record in expected
    }
    for part in folder.rglob("*.json"):
        json.loads(part.read_text())
    for part in folder.rglob("*.safetensors"):
        load_file(part)
