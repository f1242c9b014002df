"""The bench runs, writes what it promises, and says who failed. Its numbers are not judged here."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from harlora import cli, configure
from harlora.bench import cases, energy, machine, peers, report, run, ways
from harlora.errors import InputError
from harlora.kernels import configurations
from harlora.kernels.configurations import Configuration
from harlora.models import MAE, Classifier
from harlora.train.capture import TrainingStep

CPU = torch.device("cpu")
UNWATCHED = machine.Watch(())
NEEDS_COMPILER = pytest.mark.skipif(machine.shutil.which("cc") is None, reason="no C compiler here, as cc")
OURS, PEER, DENSE, COMPILED = "harlora", "bitsandbytes + PEFT", "dense + PEFT", "dense + PEFT, compiled"
CAPTURED = "harlora captured"
SOME = (OURS, "harlora int8", PEER, "dequantise + matmul", DENSE, "dense")


def bench(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "harlora", "bench", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in {"src", "href"}]


# From the sources' root, where a folder named `kernels` lies that bitsandbytes must not find.
def test_a_run_writes_what_it_promises(tmp_path, request):
    done = bench(
        "--quick", "--cases", "ceilings", "layer", "encoder", "step", "--shapes", "192x192", "100x192", "--rows", 1,
        "--seconds", 0.05, "--threads", 1, "--competitors", *SOME, "--out", tmp_path / "run",
        cwd=request.config.rootpath,
    )  # fmt: skip
    result = report.load(tmp_path / "run")
    assert result["complete"]
    assert not result["stopped"]

    facts = result["provenance"]
    assert {"command", "commit", "dirty", "device", "cpu_flags", "cpu_mhz", "threads", "time", "seconds"} <= set(facts)
    assert {"python", "torch", "harlora"} <= set(facts["versions"])
    assert facts["threads"] == 1
    text = (tmp_path / "run" / "result.json").read_text()
    assert str(tmp_path) not in text
    assert str(request.config.rootpath) not in text
    assert result["competitors"][PEER]["versions"].keys() == {"bitsandbytes", "peft"}
    rates = result["ceilings"]
    assert min(rates[key] for key in ("mm_float32_gflops", "mm_bfloat16_gflops", "copy_gb_s", "launch_us")) > 0
    assert (rates["fma_float32_gflops"] or 0) > 0 or "skipped" in rates["fma_note"]
    assert result["method"]["energy"].startswith(("RAPL", "not reported"))
    assert result["machine"]["looks"] > 10 or result["machine"]["watched"].startswith("nothing")

    rows = {(r["case"], r.get("in_features"), r["direction"], r["competitor"]): r for r in result["rows"]}
    found = {}
    for case, _, direction, name in rows:
        found.setdefault((case, direction), set()).add(name)
    trained = set(SOME) - {"dense", "harlora int8"}
    assert found == {
        ("encoder", "forward"): set(SOME), ("step", "both"): trained, ("layer", "forward"): set(SOME) - {"dense"},
        ("layer", "backward"): trained, ("layer", "both"): trained,
    }  # fmt: skip
    for row in rows.values():
        if row["status"] == "ok":
            assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
            assert row["rounds"] + row["rounds_left_out"] >= 12
            assert bool(row["over"]) == row["competitor"].startswith(OURS)
            assert row["relative_error"] < (5e-2 if row["competitor"] in {PEER, "harlora int8"} else 1e-4)
            assert row["peak_bytes"] > 0
    # bitsandbytes has no right answer for every shape, and not every processor has products in fewer bits; what
    # happened is said, and the others are measured all the same.
    failed = {key[1::2] for key, row in rows.items() if row["status"] != "ok"}
    assert failed <= {(100, PEER)} | {(size, "harlora int8") for size in (None, 100, 192)}

    page = (tmp_path / "run" / "index.html").read_text()
    sources = Sources()
    sources.feed(page)
    assert len(sources.found) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources.found)
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {
        "models.png", "layers.png", "training.png", "roofline.png",
    }  # fmt: skip
    for text in ("Whole models", "Where harlora loses", "Peak memory", facts["device"], PEER):
        assert (text in page) == (text != "Peak memory")  # memory was not asked for
    assert "192→192, M=1, " in done.stdout


def test_compiled_layers_take_part_where_they_are_asked_for(tmp_path):
    names = (OURS, DENSE, COMPILED)
    bench(
        "--cases", "layer", "--shapes", "64x32", "--rows", 3, "--seconds", 0.01, "--competitors", *names,
        "--out", tmp_path, cwd=tmp_path,
    )  # fmt: skip
    rows = report.load(tmp_path)["rows"]
    assert {(row["direction"], row["competitor"]) for row in rows} == {(d, n) for d in cases.DIRECTIONS for n in names}
    assert {row["status"] for row in rows} == {"ok"}


def test_memory_is_measured_and_a_dense_weight_seen(tmp_path):
    def measure(name):
        code = f"from harlora.bench import memory; import json; print(json.dumps(memory.measure({name!r}, 1, 1)))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)

    with ThreadPoolExecutor() as pool:
        ours, dense = (json.loads(done.stdout) for done in pool.map(measure, (OURS, PEER)))
    for key in ("extra_torch_bytes", "extra_native_bytes"):  # the latter is None where /proc does not let us measure
        assert ours[key] is None or ours[key] < 2**21
        assert dense[key] is None or dense[key] > 60 * 2**20  # the weight in float32: 64 MiB
    assert ours["native_note"]


FACTS = {"case": "layer", "in_features": 8, "out_features": 8, "rows": 4, "direction": "forward", "dtype": "float32",
         "rank": 16, "weight_copies": 1, "flop": 1000, "packed_bytes": 36}  # fmt: skip


def contender(error, calls=None):
    return lambda: cases.Contender(lambda: calls.append(1) if calls is not None else torch.ones(9).sum(), error)


def test_who_is_wrong_raises_or_is_absent_is_named_and_not_timed(monkeypatch):
    def raises():
        raise RuntimeError("no kernel in /opt/secret/place.so")

    monkeypatch.setattr(peers, "absent", lambda name: "not installed: x" if name == "torchao NF4" else "")
    called = []
    case = cases.Case(
        FACTS,
        {OURS: contender(1e-7), DENSE: contender(2e-4, called), PEER: raises, "torchao NF4": contender(0.0, called),
         "dequantise + matmul": contender(float("nan"), called)},
        grad=False,
    )  # fmt: skip
    measured = run.Measured(case, CPU, UNWATCHED)
    measured.sample(0.001, 3)
    rows = {row["competitor"]: row for row in measured.rows}
    assert rows[OURS]["status"] == "ok"
    assert rows[DENSE]["status"] == "wrong: relative error 0.0002, above 0.0001"
    assert rows["dequantise + matmul"]["status"].startswith("wrong")
    assert rows["dequantise + matmul"]["relative_error"] is None
    assert rows[PEER]["status"] == "raised RuntimeError: no kernel in place.so"
    assert rows["torchao NF4"]["status"] == "not installed: x"
    assert [name for name, row in rows.items() if "median_us" in row] == [OURS]
    assert len(called) <= 2  # what measures peak memory


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    assert peers.absent(PEER) == "not installed: peft"
    assert peers.absent(OURS) == ""


def small_run(monkeypatch, tmp_path, **options):
    layers = (cases.Layers(64, 32, (1, 2, 3)),)
    monkeypatch.setattr(run, "plan", lambda preset, device: cases.Plan(layers, (), (), (OURS, DENSE)))
    chosen = run.Options("quick", cases=("layer",), seconds=0.001, **options)
    return run.measure(chosen, tmp_path / "result.json", Console(quiet=True))


def test_what_was_measured_before_an_error_is_kept(monkeypatch, tmp_path):
    real, count = run.Measured, []

    def failing(*arguments):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("CUDA error in /opt/secret/kernel.cu")
        return real(*arguments)

    monkeypatch.setattr(run, "Measured", failing)
    monkeypatch.setattr(run, "plan", lambda *_: cases.Plan((cases.Layers(64, 32, (1, 2, 3)),), (), (), (OURS, DENSE)))
    options = run.Options("quick", cases=("layer",), seconds=0.001)
    with pytest.raises(RuntimeError, match="CUDA error"):
        run.measure(options, tmp_path / "result.json", Console(quiet=True), {"statuses": {"tests": 1}})
    result = report.load(tmp_path)
    assert [row["rows"] for row in result["rows"]] == [1, 1, 2, 2]
    assert result["statuses"] == {"tests": 1}
    assert report.summary(result)[-1].startswith("The run did not finish (RuntimeError: CUDA error in kernel.cu);")


def test_models_that_memory_has_no_room_for_do_not_keep_later_ones_out(monkeypatch, tmp_path):
    sizes = (cases.Layers(64, 32, (1, 2)), cases.Layers(256, 128, (1, 2)), cases.Layers(32, 64, (1, 2)))
    monkeypatch.setattr(run, "plan", lambda *_: cases.Plan(sizes, (), (), (OURS, DENSE)))
    held = [case.held_bytes for case in cases.Plan(sizes, (), (), (OURS, DENSE)).cases(CPU, 2**25)][::2]
    monkeypatch.setattr(run, "_memory_bytes", lambda _: (held[0] + held[2] + 1) / run.KEPT)
    released = []
    monkeypatch.setattr(run.Measured, "release", lambda self: released.append(self.rows[0]["in_features"]))
    run.measure(run.Options("quick", cases=("layer",), seconds=0.001), tmp_path / "result.json", Console(quiet=True))
    assert released == [256, 256]


def test_what_was_measured_before_ctrl_c_is_kept(monkeypatch, tmp_path):
    real, count = run.Measured, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "Measured", interrupted)
    result = small_run(monkeypatch, tmp_path)
    assert result == report.load(tmp_path)
    assert (result["stopped"], result["complete"]) == (True, False)
    assert [row["rows"] for row in result["rows"]] == [1, 1, 2, 2]
    assert any("did not finish" in line for line in report.summary(result))
    assert report.write_page(result, tmp_path).exists()


# Calls of `_lasts` for a case: five for each competitor to find `inner`, then one for each sample.
CALLS = 2 * (5 + run.ROUNDS["quick"] // run.SWEEPS["quick"])


@pytest.mark.parametrize(
    ("last", "rows"), [(2 * CALLS + 12, [1, 1, 2, 2]), (3 * CALLS + 2, [1, 1, 2, 2, 3, 3])], ids=["first", "second"]
)
def test_ctrl_c_in_the_middle_of_a_sweeps_round_loses_nothing(last, rows, monkeypatch, tmp_path):
    real, count = run._lasts, []

    def interrupted(call, inner, device):
        count.append(1)
        if len(count) == last:
            raise KeyboardInterrupt
        return real(call, inner, device)

    monkeypatch.setattr(run, "_lasts", interrupted)
    result = small_run(monkeypatch, tmp_path)
    assert result == report.load(tmp_path)
    assert result["stopped"]
    assert [row["rows"] for row in result["rows"]] == rows
    assert all(row["median_us"] > 0 for row in result["rows"])


def test_what_time_did_not_allow_is_reported(monkeypatch, tmp_path):
    result = small_run(monkeypatch, tmp_path, minutes=1e-9)
    assert {row["status"] for row in result["rows"]} == {"left out: 1e-09 minutes were over"}
    assert not result["complete"]
    assert report.tables(result)[-1].title == report.FAILED


@pytest.mark.parametrize(
    "name", [n for n in peers.COMPETITORS if peers.COMPETITORS[n].precision == "float32" and n != COMPILED]
)
def test_every_competitor_computes_the_layer_and_its_gradients(name):
    if reason := peers.absent(name):
        pytest.skip(reason)
    base = nn.Sequential(nn.Linear(192, 128))
    x = torch.randn(5, 192)
    model = peers.adapt(name, base, ["0"] if name != "dense" else [], rank=4)
    if name == "dense":
        assert torch.equal(model(x), base(x))
        return
    made = cases._Adapted([model.train()[0]], [cases._flat(model)], peers.exact(model, base, ["0"])[0])
    for direction in ("backward", "both"):
        assert cases._trained_layer(direction, lambda: made, x).relative_error < 1e-5
    for parameter in cases._flat(model):
        assert parameter.requires_grad
        assert parameter.abs().sum() > 0


def test_bitsandbytes_dequantises_to_the_dtype_of_the_model():
    if reason := peers.absent(PEER):
        pytest.skip(reason)
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(192, 128, dtype=dtype)
        layer = peers._bitsandbytes_layer(linear)
        assert layer.weight.quant_state.dtype == dtype
        assert layer.bias is linear.bias
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_compiled_layer_that_is_asked_for_is_measured_at_every_number_of_rows():
    asked = run.Options(device="cuda", competitors=(OURS, COMPILED)).plan(torch.device("cuda"))
    assert asked.compiled_rows == (1, 8, 32, 128, 512, 2048, 8192)
    assert run.Options(device="cuda").plan(torch.device("cuda")).compiled_rows == ()


def test_a_captured_step_is_compared_with_captured_steps_too():
    times = {OURS: 10.0, CAPTURED: 2.0, PEER: 60.0, f"{PEER}, captured": 8.0, f"{DENSE}, captured": 3.0}
    rows = [
        {"case": "step", "model": "A", "windows": 64, "direction": "both", "dtype": "bfloat16", "rank": 16,
         "competitor": name, "status": "ok", "relative_error": 1e-3, "median_us": time, "rounds": 3,
         "rounds_left_out": 1,
         "over": {other: dict.fromkeys(("median", "p20", "p80"), t / time) for other, t in times.items()}}
        for name, time in times.items()
    ]  # fmt: skip
    result = {**result_of(), "rows": rows, "method": {"least_rounds": 5}}
    (table,) = report._leads("Steps", result, "step")
    assert table.heads == [
        "case", OURS, f"over {PEER}", f"{CAPTURED} over {PEER}", f"{CAPTURED} over {PEER}, captured",
        f"{CAPTURED} over {DENSE}, captured",
    ]  # fmt: skip
    assert table.body[0][1:] == ["10.0 µs", "6.00", "30.00", "4.00", "1.50"]
    assert report.losses(result) == []  # an eager step is not behind a captured one of another
    assert "5 of 5 rows have fewer than the 5 rounds that were meant, the fewest 4" in report.summary(result)[1]


def test_a_captured_step_takes_part_in_the_steps_of_a_gpu_alone():
    cuda = torch.device("cuda")
    plans = {(preset, device): cases.plan(preset, device) for preset in run.ROUNDS for device in (CPU, cuda)}
    for (_, device), plan in plans.items():
        assert (CAPTURED in plan.competitors) == (device == cuda)
    asked = cases.Plan((cases.Layers(64, 32, (1,)),), ("B",), (1,), (OURS, CAPTURED))
    made = list(asked.cases(CPU, 0))
    assert asked.count() == len(made)
    assert {name for case in made for name in case.contenders} == {OURS}
    if not torch.cuda.is_available():
        assert peers.absent(CAPTURED) == "CUDA graphs need an NVIDIA GPU"


def test_the_captured_step_is_checked_by_the_gradients_of_its_first_call(monkeypatch):
    def eager(*arguments, capture):
        assert capture
        return TrainingStep(*arguments)

    monkeypatch.setattr(cases, "TrainingStep", eager)
    config = cases.MODELS["B"]
    base = Classifier(MAE(config).encoder, cases.CLASSES)
    base.head[3].p = 0.0
    x, labels = torch.randn(4, config.window, config.channels), torch.arange(4)
    contender = cases._step(CAPTURED, base, x, labels)
    assert contender.relative_error < 1e-4
    assert contender.call().isfinite()


def test_an_error_in_one_row_of_a_gradient_is_seen():
    base = nn.Sequential(nn.Linear(192, 128))
    model = peers.adapt(DENSE, base, ["0"])
    exact = peers.exact(model, base, ["0"])[0]
    exact.lora_B.data[7] += 1e-2
    made = cases._Adapted([model[0]], [cases._flat(model)], exact)
    assert cases._trained_layer("both", lambda: made, torch.randn(5, 192)).relative_error > peers.ERROR_LIMIT


def result_of(*rows):
    """A result with a median and a relative spread for each number of rows and competitor."""
    made = [
        {**FACTS, "rows": m, "competitor": name, "status": "ok", "relative_error": 1e-7, "median_us": t,
         "p20_us": t * (1 - s), "p80_us": t * (1 + s),
         "over": {
             other: {"median": u / t, "p20": u / t * (1 - v), "p80": u / t * (1 + v)}
             for n, other, u, v in rows
             if (n, name) == (m, OURS) and other != name
         }}
        for m, name, t, s in rows
    ]  # fmt: skip
    return {
        "bench": "harlora", "format": run.FORMAT, "complete": True, "stopped": False, "ceilings": None,
        "provenance": {"taken_by_others": 0.0}, "competitors": {}, "method": {}, "rows": made,
    }  # fmt: skip


def test_ratios_losses_and_noise():
    result = result_of((1, OURS, 10.0, 0.01), (1, PEER, 20.0, 0.01), (1, DENSE, 5.0, 0.01),
                       (2, OURS, 10.0, 0.01), (2, PEER, 9.9, 0.06))  # fmt: skip
    assert [each.text for each in report.ratios(result)] == ["2.00", "0.50", "0.99~"]
    (lost,) = report.losses(result)
    assert (lost.over["competitor"], lost.value) == (DENSE, 0.5)
    said = report.summary(result)
    assert said[0].startswith("Over bitsandbytes + PEFT: faster in 1, slower in 0, equal within 3 % in 1 of 2 cases")
    assert said[1].startswith("Over dense + PEFT: faster in 0, slower in 1")
    assert "1 of 3 ratios are marked ~" in said[2]


def test_a_ratio_that_is_not_known_well_is_told_from_one_that_is():
    # Medians of 36 rounds each lie within ±5 % of the ratio in 95 of 100 runs where the bound says so, and not beyond.
    generator = torch.Generator().manual_seed(0)
    for sigma, wide in ((0.10, False), (0.14, True)):
        rounds = torch.empty(20_000, 36).normal_(1.0, sigma, generator=generator)
        share = ((rounds.quantile(0.5, dim=1) - 1).abs() < 0.05).float().mean()
        assert (share < 0.95) == wide
        p20, p80 = (1 + sigma * z for z in (-0.8416, 0.8416))
        found = {"median": 1.0, "p20": p20, "p80": p80, "rounds": 36, "unsteady": False}
        assert run.uncertain(found) == wide
    found = {"median": 2.0, "p20": 1.9, "p80": 2.1, "rounds": 36, "unsteady": False}
    assert not run.uncertain(found)
    assert run.uncertain(found | {"rounds": 8})
    assert run.uncertain(found | {"p80": 2.4})
    assert run.uncertain(found | {"unsteady": True})
    for counted, text in (
        ({}, "2.00"),
        ({"rounds": 36}, "2.00"),
        ({"rounds": 3}, "2.00~"),
        ({"unsteady": True}, "2.00~"),
    ):
        result = result_of((1, OURS, 10.0, 0.01), (1, PEER, 20.0, 0.04))
        result["rows"][0]["over"][PEER] |= {"rounds": 36, "unsteady": False} | counted if counted else {}
        assert report.ratios(result)[0].text == text


def test_the_limit_counts_memory_only_where_the_weight_comes_from_memory():
    rates = {"fma_float32_gflops": 100.0, "mm_float32_gflops": 50.0, "mm_bfloat16_gflops": 200.0, "copy_gb_s": 1.0,
             "launch_us": 1.0}  # fmt: skip
    row = {**FACTS, "flop": 10**6, "packed_bytes": 10**6}
    assert report.limit_us(row, rates) == pytest.approx(10.0)
    assert report.limit_us({**row, "dtype": "bfloat16"}, rates) == pytest.approx(5.0)
    assert report.limit_us({**row, "weight_copies": 4}, rates) == pytest.approx(1e3, rel=1e-3)
    del rates["fma_float32_gflops"]  # a GPU
    assert report.limit_us({**row, "flop": 1}, rates) == pytest.approx(1.0)


def test_a_comparison_tells_a_change_from_a_slower_machine():
    old = result_of(*((m, name, 10.0, 0.02) for m in (1, 2) for name in (OURS, PEER, DENSE)))
    # Everything takes 1.5 times as long; harlora at M = 2 twice that.
    new = result_of(
        *((m, name, 30.0 if (m, name) == (2, OURS) else 15.0, 0.02) for m in (1, 2) for name in (OURS, PEER, DENSE))
    )
    beyond = [(each.where, each.competitor, each.value) for each in report.changes(old, new) if each.beyond_noise]
    assert ("8→8, M=2, forward, float32", OURS, pytest.approx(2.0)) in beyond
    assert not [each for each in beyond if "M=1," in each[0]]
    changed, agree = report.comparison(old, new)
    assert changed.body[0][:4] == ["8→8, M=2, forward, float32", OURS, "2.00", "slower"]
    assert agree.body == [["agree within 10 %", "2 of 4 (50%)"]]


def test_the_command_compares_results(tmp_path, capsys):
    for name, time_us in (("old", 10.0), ("new", 20.0)):
        result = result_of((1, OURS, time_us, 0.01), (1, PEER, 10.0, 0.01))
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    cli.main(["bench", "--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert re.search(r"8→8, M=1.*harlora.*2\.00.*slower", re.sub(r"\s+", " ", capsys.readouterr().out))


def test_a_document_is_written_from_the_newest_results_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = small_run(monkeypatch, tmp_path)
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    for name, stamp, device in (("old", "2020", "One"), ("new", "2021", "One"), ("first", "2019", "Other")):
        facts = result["provenance"] | {"time": stamp, "device": device}
        (folder / f"{name}.json").write_text(json.dumps(result | {"provenance": facts}))
    (folder / "other.json").write_text('{"bench": "cpu", "rows": []}')
    document = tmp_path / "benchmarks.md"
    document.write_text("before\n<!-- measured -->\nstale\n<!-- /measured -->\nafter\n")
    report.write_document(tmp_path / "results", document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /measured -->\nafter\n")
    assert "stale" not in text
    assert "new.json" in text
    assert "old.json" not in text
    assert text.index("## CPU: One") < text.index("## CPU: Other")  # the newest of each machine, newest first
    assert "| 64→32 |" in text
    assert (tmp_path / "images" / "new-layers.png").exists()
    document.write_text("no markers")
    with pytest.raises(InputError, match="markers|no <!-- measured"):
        report.write_document(tmp_path / "results", document)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "tpu"), "--device must be cpu, cuda or cuda:0, got 'tpu'"),
        (("--shapes", "192"), "--shapes must be like 192x768 (in_features x out_features), got '192'"),
        (("--rows", "0"), "--rows must be at least 1, got 0"),
        (("--threads", "999"), "--threads must be 1 to"),
        (("--competitors", "me"), "--competitors must be of harlora, "),
        (("--minutes", "0"), "--minutes must be above 0, got 0"),
        (("--quick", "--full"), "--quick and --full exclude each other"),
        (("--compare", "no.json", "no.json"), "no.json: no such file; give the result.json of `harlora bench`"),
    ],
)
def test_mistakes_are_named(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_result_of_another_format_is_refused(tmp_path):
    (tmp_path / "result.json").write_text('{"bench": "cpu"}')
    with pytest.raises(InputError, match=r"result\.json: not a result of this version"):
        report.load(tmp_path)


def test_rapl_is_read_through_its_wrap(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    for folder in (zone, tmp_path / "intel-rapl:0:0"):  # the second is a part of the first
        folder.mkdir()
        (folder / "energy_uj").write_text("900000\n")
        (folder / "max_energy_range_uj").write_text("1000000\n")
    read, source = energy.counter(CPU, tmp_path)
    assert source.startswith("RAPL, 1 package,")
    (zone / "energy_uj").write_text("950000\n")
    assert read() == pytest.approx(0.05)
    (zone / "energy_uj").write_text("50000\n")
    assert read() == pytest.approx(0.15)
    (zone / "energy_uj").write_text("secret")
    assert energy.counter(CPU, tmp_path)[0] is None
    assert energy.counter(CPU, tmp_path / "none")[0] is None


def test_nvml_is_asked_for_the_card_that_computes(monkeypatch):
    class NVMLError(Exception):
        pass

    def handle(uuid):
        if uuid != "GPU-abc":
            raise NVMLError("Not Found")
        return 7

    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda card: 2500 * card,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    read, source = energy.counter(torch.device("cuda"))
    assert (read(), source) == (17.5, "NVML, the whole GPU")
    properties.uuid = "other"
    assert energy.counter(torch.device("cuda")) == (None, "not reported: NVML says Not Found")


def test_energy_of_a_call_is_in_its_row(monkeypatch):
    monkeypatch.setattr(run, "ENERGY_S", 0.01)
    read = iter(range(100))
    case = cases.Case(FACTS, {OURS: contender(0.0)}, grad=False)
    measured = run.Measured(case, CPU, UNWATCHED)
    measured.energy(lambda: float(next(read)))
    assert 0 < measured.rows[0]["joules"] <= 1


def test_samples_of_all_sweeps_count_and_ratios_are_of_one_round(monkeypatch):
    case = cases.Case(FACTS, {OURS: contender(0.0), DENSE: contender(0.0)}, grad=False)
    measured = run.Measured(case, CPU, UNWATCHED)
    # The machine is twice as slow in the second sweep; the ratio is 3 in both.
    lasts = iter([1.0] * 10 + [1.0, 3.0, 3.0, 1.0] + [2.0, 6.0, 6.0, 2.0])
    monkeypatch.setattr(run, "_lasts", lambda call, count, device: next(lasts))
    measured.sample(0.0, 2)
    measured.sample(0.0, 2)
    ours, dense = measured.rows
    assert (ours["rounds"], ours["median_us"], dense["median_us"]) == (4, 1.5e6, 4.5e6)
    assert ours["over"] == {DENSE: {"median": 3, "p20": 3, "p80": 3, "rounds": 4, "unsteady": False}}
    assert report.ratio({OURS: ours, DENSE: dense}, DENSE).text == "3.00"


def test_samples_of_an_unusual_machine_do_not_count(monkeypatch):
    case = cases.Case(FACTS, {OURS: contender(0.0), DENSE: contender(0.0)}, grad=False)
    watch = machine.Watch(())
    measured = run.Measured(case, CPU, watch)
    # In rounds 3 and 4 of 12 the cores are far apart, which is slow for one of two.
    far = [False, False, True, True] + 8 * [False]
    monkeypatch.setattr(watch, "look", lambda now=False: 1)
    monkeypatch.setattr(watch, "steady", lambda looks: not far[looks])
    for competitor, slow in ((OURS, 1.1), (DENSE, 9.0)):
        measured._samples[competitor] = [run.Sample(slow if one else 1.0, i) for i, one in enumerate(far)]
    measured.describe()
    ours, dense = measured.rows
    for row in (ours, dense):
        assert (row["rounds"], row["rounds_left_out"], row["unsteady"]) == (10, 2, False)
        assert row["p80_us"] == 1e6
    assert ours["over"][DENSE] == {"median": 1, "p20": 1, "p80": 1, "rounds": 10, "unsteady": False}
    assert ours["left_out_us"] is None  # of two alone it would be no median
    assert not measured.unsure()

    far[:] = 10 * [True] + 2 * [False]  # too few are left: all count, and it is said
    measured.describe()
    assert (ours["rounds"], ours["unsteady"], ours["over"][DENSE]["rounds"]) == (12, True, 12)
    assert report.ratio({OURS: ours, DENSE: dense}, DENSE).text == "1.00~"
    assert measured.unsure()


def test_how_much_longer_the_samples_took_that_do_not_count_is_said(monkeypatch):
    watch = machine.Watch(())
    measured = run.Measured(cases.Case(FACTS, {OURS: contender(0.0), PEER: contender(0.0)}, grad=False), CPU, watch)
    monkeypatch.setattr(watch, "steady", lambda looks: looks < 8)
    for competitor, slow in ((OURS, 1.1), (PEER, 1.6)):
        measured._samples[competitor] = [run.Sample(1.0 if i < 8 else slow, i) for i in range(16)]
    measured.describe()
    result = result_of() | {"rows": measured.rows, "machine": {"usual": 0.5, "looks": 17}}
    assert [row["left_out_us"] for row in measured.rows] == [1.1e6, 1.6e6]
    assert report.summary(result)[-1] == (
        "In 50.0% of 17 looks the cores were slower, or farther from each other, than usual on this machine; samples"
        " taken then do not count. They took 1.10 times as long with harlora, 1.60 with bitsandbytes + PEFT (the mean"
        " of 1 cases)."
    )


def test_a_case_whose_ratio_is_not_known_well_is_measured_in_further_sweeps(monkeypatch, tmp_path):
    swept = []
    monkeypatch.setattr(run.Measured, "unsure", lambda self: self.rows[0]["rows"] == 2)
    monkeypatch.setattr(
        run, "_take_turns", lambda calls, found, inner, device, watch, seconds, rounds: swept.append(rounds)
    )
    small_run(monkeypatch, tmp_path)
    sweeps = run.SWEEPS["quick"]
    assert swept == 3 * sweeps * [run.ROUNDS["quick"] // sweeps] + sweeps * [1]


@NEEDS_COMPILER
def test_cores_are_looked_at_and_the_caller_may_run_where_it_did():
    before = os.sched_getaffinity(0)
    watch = machine.Watch(sorted(before))
    for count in (1, 2, 3):
        assert watch.look(now=True) == count
    assert watch.look() == 3  # not again at once
    assert all(state.gflops > 0 for state in watch.states)
    assert all((state.handover_ns > 0) == (len(before) > 1) for state in watch.states)
    assert watch.facts()["looks"] == 3
    assert os.sched_getaffinity(0) == before
    rate, _ = machine.fma_gflops(sorted(before)[:1])
    assert rate > 0


def test_the_usual_state_is_neither_the_very_best_nor_a_frequent_worse_one():
    watch = machine.Watch(())
    usual, shared, far, first = (machine.State(*pair) for pair in ((100, 30), (50, 30), (100, 170), (180, 10)))
    watch.states += [first, *10 * [usual, shared, far, shared, far]]
    assert watch.usual() == usual
    # After so many looks: before and after the sample, both count.
    watch.states[:] = [usual, usual, shared, usual, far, usual, usual]
    assert [watch.steady(looks) for looks in range(1, 7)] == [True, False, False, False, False, True]
    assert watch.facts() | {"watched": ""} == {
        "watched": "", "looks": 7, "gflops": 100, "handover_ns": 30, "usual": round(5 / 7, 4),
    }  # fmt: skip


@NEEDS_COMPILER
def test_a_core_that_is_taken_away_ends_the_watch_and_not_the_run(monkeypatch):
    watch = machine.Watch(sorted(os.sched_getaffinity(0)))
    assert watch.look(now=True) == 1
    monkeypatch.setattr(watch, "_cores", [10**6])
    assert watch.look(now=True) == 1
    assert watch.note.endswith(", until threads cannot be placed on cores: Invalid argument")
    assert watch.look(now=True) == 1
    assert watch.facts()["watched"] == watch.note


def test_without_a_compiler_or_such_a_core_nothing_is_watched(monkeypatch):
    assert machine.Watch([10**6]).note.startswith("nothing: ")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    machine._library.cache_clear()
    watch = machine.Watch([0])
    assert watch.note == "nothing: no C compiler here"
    assert watch.look(now=True) == 0
    assert watch.steady(0)
    assert watch.facts() == {"watched": watch.note}
    assert machine.fma_gflops([0]) == (None, "skipped: no C compiler here")


@NEEDS_COMPILER
def test_machine_c_has_no_warnings(tmp_path):
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-c", machine.SOURCE, "-o"]
    done = subprocess.run([*command, tmp_path / "machine.o"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_ways_of_cuda_are_measured_against_the_tables(monkeypatch):
    """What is compared and shown; no kernel runs, and the times are made up."""

    def times(operator, device, dtype, rows, shape, candidates):
        assert (device, dtype, shape) == (CPU, torch.bfloat16, (4096, 4096))
        assert len(candidates) == len(set(candidates))
        assert all(each.way in configurations.CUDA_WAYS for each in candidates[1:])
        return {str(each): 10.0 + 5 * i for i, each in enumerate(candidates)}

    launches = str(Configuration("launches"))
    of_encoder = {"title": "encoder_blocks 16", "shape": [16, 192], "rows": 16, "times_us": {launches: 90.0}}
    monkeypatch.setattr(configure, "times", times)
    monkeypatch.setattr(configure, "measure_encoders", lambda device, sizes, report: ({}, [of_encoder]))
    told = []
    found = list(ways.measure(CPU, told.append, rows=(1, 128)))
    assert [(each["title"], each["rows"]) for each in found] == [
        ("encoder_blocks 16", 16), ("qlora_linear 16", 1), ("qlora_linear 16", 128), ("qlora_linear_backward 16", 1),
        ("qlora_linear_backward 16", 128),
    ]  # fmt: skip
    assert told[0] == "qlora_linear 16, 4096→4096, 1 rows"
    assert all(each["table"] in each["times_us"] for each in found)
    assert any("gemv" in name for name in found[1]["times_us"])
    (table,) = [each for each in report.tables({"rows": [], "ceilings": None, "ways": found}) if "Ways" in each.title]
    assert table.body[0][1] == "launches"
    first, second = table.body[1:3]
    assert first[0] == "qlora_linear 16, 4096→4096, 1 rows"
    assert first[2:] == ["10.0", "1.00", "yes"]
    assert second[1:] == ["gemv", "15.0", "1.50", ""]
