"""The regression gate's arithmetic. Its counts come from valgrind: `make instructions`."""

import json

import pytest
from needs import needs_extension

from harlora.bench import instructions

FILE = """\
version: 1
creator: callgrind-3.19.0
desc: Trigger: Client Request: qlora_linear
positions: line
events: Ir
summary: 175

ob=(1) /usr/bin/python3.11
fl=(1) ???
fn=(1) call
0 20
cob=(2) /somewhere/harlora/kernels/_C.so
cfn=(2) multiply
calls=1 0
0 150

ob=(2)
fn=(2)
0 100
+3 30
cob=(3) /lib/libc.so.6
cfn=(3) memcpy
calls=2 0
* 20

ob=(3)
fn=(3)
-1 25

totals: 175
"""


def test_what_the_extension_itself_costs_is_told_from_the_rest():
    assert instructions.parsed(FILE) == {"extension": 130, "process": 175}


def counts(**calls):
    return {name: {"extension": value, "process": 2 * value} for name, value in calls.items()}


@pytest.mark.parametrize(
    ("now", "status", "said"),
    [
        (counts(a=1000, b=500), 0, "no count grew by more than 3%"),
        (counts(a=1029, b=500), 0, "no count grew"),
        (counts(a=1031, b=500), 1, "2 counts grew"),
        (counts(a=900, b=500), 0, "some calls need fewer instructions: --update"),
        (counts(a=1000), 1, "missing"),
        (counts(a=1000, b=500, c=1), 1, "missing"),
        ({"a": {"extension": 1000, "process": 2061}, "b": {"extension": 500, "process": 1000}}, 1, "1 counts grew"),
    ],
)
def test_growth_beyond_three_percent_fails(now, status, said):
    text, found = instructions.verdict(instructions.compared(counts(a=1000, b=500), now))
    assert found == status
    assert said in text


def test_the_call_that_grew_is_named():
    text, _ = instructions.verdict(instructions.compared(counts(a=1000, b=500), counts(a=1000, b=600)))
    failed = [line for line in text.splitlines() if "FAILED" in line]
    assert len(failed) == 2
    assert all(line.startswith("b ") and "+20.00%" in line for line in failed)


@needs_extension
def test_another_toolchain_is_not_compared(tmp_path, capsys):
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"toolchain": {**instructions.toolchain(), "torch": "1.0"}, "calls": {}}))
    assert instructions.main(["--baseline", str(file)]) == 3
    assert "torch 1.0 -> " in capsys.readouterr().err


@needs_extension
def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    assert instructions.main(["--baseline", str(tmp_path / "none.json")]) == 2
    assert "make one with --update" in capsys.readouterr().err
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main(["--update", "--baseline", str(tmp_path / "none.json")]) == 2
    assert "valgrind is not installed; install it" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


@needs_extension
def test_every_call_runs_and_has_its_baseline():
    names = []
    for name, call in instructions.calls():
        assert call() is not None
        names.append(name)
    baseline = json.loads(instructions.BASELINE.read_text())
    assert names == list(baseline["calls"])
