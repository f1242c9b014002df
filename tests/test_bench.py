"""The CPU bench runs, writes what it promises, and its picture can be drawn. Its numbers are not judged here."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


def run(script, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# From the repository's root, where a folder named `kernels` lies that bitsandbytes must not find.
def test_cpu_bench_writes_what_it_promises(tmp_path):
    out = tmp_path / "result.json"
    done = run(
        "cpu.py", "--quick", "--cases", "layer", "encoder", "step", "ceilings", "--shapes", "192x192", "100x192",
        "--rows", 1, "--windows", 1, "--seconds", 0.05, "--threads", 1, "--out", out, cwd=BENCH.parent,
    )  # fmt: skip
    result = json.loads(out.read_text())

    facts = result["provenance"]
    assert {"command", "commit", "dirty", "device", "cpu_flags", "threads", "time", "taken_by_others"} <= set(facts)
    assert {"python", "torch", "harlora", "bitsandbytes", "peft"} <= set(facts["versions"])
    assert facts["threads"] == result["ceilings"]["threads"] == 1
    assert re.search(r"/\w+/", facts["command"].replace("bench/", "")) is None
    assert str(tmp_path) not in out.read_text()
    assert set(result["kernels"]) == {"H", "P"}
    for key in ("mm_float32_gflops", "copy_gb_s"):
        assert result["ceilings"][key] > 0
    assert (result["ceilings"]["fma_float32_gflops"] or 0) > 0 or "skipped" in result["ceilings"]["fma_note"]

    rows = {(row["case"], row.get("in_features"), row["competitor"]): row for row in result["rows"]}
    competitors = {
        "layer": ("H", "H16", "H8", "P", "D"),
        "encoder": ("H", "H16", "H8", "P", "D", "F"),
        "step": ("H", "P", "D"),
    }
    assert {key[::2] for key in rows} == {(case, name) for case, names in competitors.items() for name in names}
    timed = [row for row in rows.values() if row["status"] == "ok"]
    for row in timed:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["rounds"] >= 5
        assert row["relative_error"] < (5e-2 if row["competitor"] in {"P", "H16", "H8"} else 1e-4)
    # bitsandbytes has no right answer for every shape, and not every processor has products in fewer bits; what
    # happened is said, and the others are measured all the same.
    failed = {key for key, row in rows.items() if row["status"] != "ok"}
    assert failed <= {("layer", 100, "P")} | {key for key in rows if key[2] in {"H16", "H8"}}

    ratios = [entry for entry in result["ratios"] if entry["ratio"] is not None]
    ours = [entry for entry in ratios if entry["of"] == "H"]
    assert len(ours) == sum(row["competitor"] not in {"H", "H16", "H8"} for row in timed)
    for entry in ours:
        assert entry["reached"] == (entry["ratio"] >= entry["target"])
    assert f"of {len(ours)} targets reached" in done.stdout
    assert "encoder model B, 1 windows" in done.stdout

    picture = tmp_path / "picture.png"
    run("roofline.py", out, picture, cwd=tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_cpu_bench_measures_memory_and_sees_a_dense_weight(tmp_path):
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda name: run("memory.py", name, 1, 1, cwd=tmp_path), "HP")
        ours, dense = (json.loads(each.stdout.splitlines()[-1]) for each in done)
    for key in ("extra_torch_bytes", "extra_native_bytes"):  # the latter is None where /proc does not let us measure
        assert ours[key] is None or ours[key] < 2**21
        assert dense[key] is None or dense[key] > 60 * 2**20  # the weight in float32: 64 MiB
    assert ours["native_note"]
