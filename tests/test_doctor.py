"""The doctor finds what is wrong, names it, and says what to do; tables that it measures are obeyed."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from needs import needs_extension

from harlora import cli, configure, doctor
from harlora.kernels import configurations, cpp, cuda, dispatch, eager, reference, tuning
from harlora.kernels.configurations import Configuration, Rule
from harlora.models import MAEConfig

CPU = torch.device("cpu")


PROBLEM = cache(doctor._problem)  # what is right takes a third of a self-test, and is the same in each


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(doctor, "_problem", PROBLEM)
    monkeypatch.delenv("HARLORA_BACKEND", raising=False)
    monkeypatch.delenv("HARLORA_CPU", raising=False)
    forget()
    yield
    forget()


BACKENDS = dispatch.backends


def forget():
    BACKENDS.cache_clear()
    dispatch.agrees.cache_clear()
    tuning.table.cache_clear()
    eager.reset()


@pytest.fixture
def table_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HARLORA_TUNING", str(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


def write(file, **changes):
    table = {"build": tuning.build(cpp.extension_path()), "order": {}} | changes
    file.write_text(json.dumps({"format": 1, "devices": {tuning.device_name("cpu"): table}}))


def test_nothing_is_wrong_here():
    test = doctor.self_test(CPU)
    assert test.problems == []
    assert test.comparisons > 300
    covered = set(test.covered)
    for operator in dispatch.OPERATORS:
        assert f"{operator}, reference" in covered
        assert f"{operator}, what harlora chooses" in covered
    if not cpp.load_extension():
        for operator in (*dispatch.OPERATORS, "qlora_qkv", "qlora_mlp", "attention", "encoder"):
            assert f"{operator}, cpp portable" in covered


@needs_extension
def test_the_kernels_that_serve_are_the_same_afterwards():
    cpp.select_kernels("portable")
    doctor.self_test(CPU)
    doctor.state(CPU)
    assert cpp.selected_kernels() == "portable"
    cpp.select_kernels()


def off(function, changed, when=lambda *arguments: True):
    """``function`` with one of its results changed for some arguments."""

    def wrong(*arguments):
        results = function(*arguments)
        if not when(*arguments):
            return results
        if isinstance(results, tuple):
            return tuple(changed(each) if i == 0 else each for i, each in enumerate(results))
        return changed(results)

    return wrong


def one_value(tensor):
    tensor = tensor.clone()
    if tensor.numel():
        tensor.view(-1)[-1] += 1
    return tensor


@needs_extension
@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_one_wrong_value_is_named_with_operator_backend_and_shape(operator, monkeypatch):
    monkeypatch.setattr(cpp, operator, off(getattr(cpp, operator), one_value))
    problems = [each.problem for each in doctor.self_test(CPU).problems]
    composed = [name for name, of in cpp._COMPOSED.items() if of == operator]
    assert all(problem.partition(", backend cpp ")[0] in (operator, *composed) for problem in problems)
    problems = [problem for problem in problems if problem.startswith(f"{operator}, ")]
    assert any("cpp portable on cpu" in problem and "5 rows, 63→129, rank 3" in problem for problem in problems)


@pytest.fixture
def _triton_asked_for(monkeypatch):
    """Triton's kernels on few sizes, where there is no GPU under the interpreter."""
    if dispatch.load_triton():
        pytest.skip(dispatch.load_triton())
    monkeypatch.setenv("HARLORA_BACKEND", "triton")
    monkeypatch.setattr(configurations, "choose", lambda *_: Configuration("direct", 16, 32, 32))
    monkeypatch.setattr(doctor, "SIZES", (doctor.Size(5, 64, 30, 3),))
    monkeypatch.setattr(doctor, "PARTS", ((1, 5, 64, 64),))
    monkeypatch.setattr(doctor, "ENCODER", MAEConfig(window=32, width=64, depth=1, heads=4, ffn=64))
    monkeypatch.setattr(doctor, "_variants", dict)  # the CPU's kernels are not asked for
    forget()


@pytest.fixture
def _float32_alone(monkeypatch):
    monkeypatch.setattr(cpp, "DTYPES", (torch.float32,))


TRITON = [*dispatch.OPERATORS, "qlora_qkv", "qlora_mlp"]


@pytest.mark.usefixtures("_triton_asked_for")
def test_triton_is_tested_where_it_is_asked_for():
    test = doctor.self_test(CPU)
    assert test.problems == []
    assert {f"{operator}, triton" for operator in (*TRITON, "encoder")} <= set(test.covered)


@pytest.mark.usefixtures("_triton_asked_for", "_float32_alone")
@pytest.mark.parametrize(
    ("function", "named"),
    [("encoder_blocks", "in inference the tokens"), ("encoder_blocks_backward", "in training the gradient")],
)
def test_a_mistake_in_an_encoders_blocks_is_named(function, named, monkeypatch):
    module = dispatch._module("encoder")
    right = getattr(module, function)

    def wrong(*arguments, **options):
        results = list(right(*arguments, **options))
        if len(arguments[0]) != 3:  # as many windows prove a configuration; were that wrong, the modules would run
            results[0] = one_value(results[0])
        return results

    monkeypatch.setattr(module, function, wrong)
    forget()
    problems = [each.problem for each in doctor.self_test(CPU).problems]
    assert any(problem.startswith("encoder, backend triton on cpu") and named in problem for problem in problems), (
        problems
    )


@pytest.mark.usefixtures("_triton_asked_for", "_float32_alone")
@pytest.mark.parametrize("operator", [*TRITON, "qlora_qkv_backward"])
def test_a_mistake_in_one_of_tritons_operators_is_named(operator, monkeypatch):
    name, configured = dispatch._TRITON[operator]
    module = dispatch._module(name)
    right = getattr(module, operator)

    def wrong(*arguments, **options):
        results = right(*arguments, **options)
        x = next(each for each in arguments if isinstance(each, torch.Tensor))
        # Where a configuration would be proven wrong, which is done on more rows, the reference would serve.
        if configured and x.numel() // x.shape[-1] != 5:
            return results
        one, *others = results if isinstance(results, tuple) else (results,)
        return (one_value(one), *others) if others else one_value(one)

    monkeypatch.setattr(module, operator, wrong)
    forget()
    problems = [each.problem for each in doctor.self_test(CPU).problems]
    named = f"{operator.removesuffix('_backward') if 'qkv' in operator else operator}, backend triton on cpu, float32, "
    assert any(problem.startswith(named) for problem in problems), problems
    if "qkv" in operator:
        assert all((" output " in problem) == (operator == "qlora_qkv") for problem in problems)


@needs_extension
def test_what_is_wrong_in_one_dtype_and_shape_alone_is_found(monkeypatch):
    def when(x, *_):
        return x.dtype == torch.bfloat16 and x.shape[-1] == 1088 and len(x) == 15

    monkeypatch.setattr(cpp, "qlora_linear", off(cpp.qlora_linear, lambda y: y * 1.1, when))
    problems = doctor.self_test(CPU).problems
    assert problems
    for each in problems:
        assert "bfloat16, 15 rows, 1088→70, rank 4, nf4, blocksize 64: y is off by" in each.problem
        assert "HARLORA_BACKEND=reference" in each.remedy


@needs_extension
@pytest.mark.parametrize("changed", [lambda y: y * float("nan"), lambda y: y[:0]])
def test_nan_and_a_wrong_shape_are_found(changed, monkeypatch):
    monkeypatch.setattr(cpp, "qlora_linear", off(cpp.qlora_linear, changed))
    assert doctor.self_test(CPU).problems


@needs_extension
@pytest.mark.parametrize("name", ["qlora_qkv", "qlora_mlp", "attention"])
def test_wrong_groups_are_named(name, monkeypatch):
    right = getattr(eager, name)
    monkeypatch.setattr(doctor.eager, name, lambda *a: off(right, lambda y: y + 1e-2)(*a))
    problems = [each.problem for each in doctor.self_test(CPU).problems]
    assert problems
    assert all(problem.startswith((f"{name}, backend cpp ", "encoder, backend cpp ")) for problem in problems)
    assert any("2 windows, 16 tokens, width 192" in problem for problem in problems)


@needs_extension
def test_a_backend_that_raises_is_a_problem_not_a_crash(monkeypatch):
    def raises(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(cpp, "dequantize_4bit", raises)
    assert any("raises RuntimeError: broken" in each.problem for each in doctor.self_test(CPU).problems)


def test_a_missing_extension_is_a_problem_with_a_remedy(monkeypatch):
    monkeypatch.setattr(cpp, "load_extension", lambda: "it was not built")
    monkeypatch.setattr(dispatch, "backends", lambda o: (dispatch.Backend("reference", getattr(reference, o)),))
    state, problems = doctor.state(CPU)
    assert state["extension"] == "it was not built"
    assert problems[0].problem == "the compiled extension does not serve: it was not built"
    assert "pip install" in problems[0].remedy
    assert {line["serves"] for line in state["backends"]} == {"reference"}
    assert all("cpp: it was not built" in line["others"] for line in state["backends"])


def test_a_backend_that_disagrees_is_a_problem(monkeypatch):
    wrong = dispatch.Backend("cpp", off(reference.dequantize_4bit, one_value), "cpu")

    def backends(operator):
        first = (wrong,) if operator == "dequantize_4bit" else ()
        return (*first, dispatch.Backend("reference", getattr(reference, operator)))

    monkeypatch.setattr(dispatch, "backends", backends)
    state, problems = doctor.state(CPU)
    assert [each.problem for each in problems if "disagrees" in each.problem] == [
        "backend cpp of dequantize_4bit disagrees with the reference on cpu"
    ]
    line = next(line for line in state["backends"] if line["operator"] == "dequantize_4bit")
    assert (line["serves"], line["others"]) == ("reference", "cpp: disagrees with the reference")


def run(capsys, *arguments, status=0):
    if status:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["doctor", "--no-speed", *arguments])
        assert stopped.value.code == status
    else:
        cli.main(["doctor", "--no-speed", *arguments])
    return capsys.readouterr().out


@needs_extension
def test_the_command_says_what_serves_and_that_all_is_well(capsys):
    said = run(capsys)
    for text in ("This installation", "Backends", "why others do not", "Self-test", "Nothing is wrong."):
        assert text in said


@needs_extension
def test_the_command_fails_where_something_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(cpp, "quantize_4bit", off(cpp.quantize_4bit, one_value))
    said = run(capsys, status=1)
    assert "PROBLEM: quantize_4bit, backend cpp" in said
    assert "problems, of which the first 20 are shown; --json has all" in said
    found = json.loads(run(capsys, "--json", status=1))
    assert len(found["problems"]) > 20
    assert set(found["problems"][0]) == {"problem", "remedy"}


def test_the_speed_summary_is_part_of_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "harlora", "doctor", "--json"], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={**os.environ, "HARLORA_TUNING": "0"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["problems"] else 0)
    assert found["speed"]["ceilings"]["copy_gb_s"] > 0
    assert {row["competitor"] for row in found["speed"]["rows"]} == {"harlora", "bitsandbytes + PEFT", "dense + PEFT"}


@needs_extension
def test_tuning_measures_and_is_obeyed(table_file, monkeypatch):
    calls = []
    monkeypatch.setattr(doctor, "_compare", lambda who, device: calls.append(who) or dict.fromkeys(who, 1.0))
    table = doctor.tune(CPU, [])
    assert table["order"]["qlora_linear float32"] == ["cpp", "reference"]
    assert table["kernels"] == cpp.select_kernels()
    assert json.loads(table_file.read_text())["devices"][tuning.device_name("cpu")] == table
    # Each is slower than the one after it; what is found wrong takes no part.
    monkeypatch.setattr(doctor, "_compare", lambda who, device: {n: 1 / (i + 1) for i, n in enumerate(who)})
    assert doctor.tune(CPU, [])["kernels"] == "portable"
    forget()
    assert dispatch.select("dequantize_4bit", CPU, torch.float32) is reference.dequantize_4bit
    assert "measured 20" in doctor.state(CPU)[0]["tuning"]
    monkeypatch.setenv("HARLORA_BACKEND", "cpp")
    forget()
    assert dispatch.select("dequantize_4bit", CPU, torch.float32) is cpp.dequantize_4bit
    monkeypatch.delenv("HARLORA_BACKEND")
    known = [name for name, why in doctor._variants().items() if not why]
    wrong = doctor.Problem(f"qlora_linear, backend cpp {known[0]} on cpu, …", "")
    table = doctor.tune(CPU, [wrong])
    assert table["kernels"] == "portable"
    assert known[0] not in table["measured"]["CPU kernels"]
    assert table["order"] == {}


@needs_extension
def test_a_timing_is_compared_in_turns():
    turns = []

    def call(name, seconds):
        turns.append(name)
        end = doctor.time.perf_counter() + seconds
        while doctor.time.perf_counter() < end:
            pass

    found = doctor._compare({"a": [partial(call, "a", 1e-3)], "b": [partial(call, "b", 4e-3)]}, CPU, rounds=3)
    assert found["a"] == 1
    assert found["b"] > 2
    assert turns[:4] == ["a", "b", "a", "b"]
    assert doctor._faster_first(["a", "b"], {"a": 1.0, "b": 0.98}) == ["a", "b"]
    assert doctor._faster_first(["a", "b", "c"], {"a": 1.0, "b": 0.5, "c": 0.9}) == ["b", "c", "a"]


@needs_extension
@pytest.mark.parametrize(
    ("changes", "environment", "kernels"),
    [
        ({"kernels": "portable"}, {}, "portable"),
        ({"kernels": "portable"}, {"HARLORA_CPU": "avx2"}, "avx2"),
        ({"kernels": "portable", "build": "another"}, {}, None),
        ({"kernels": "sse9"}, {}, None),
    ],
)
def test_a_table_chooses_the_kernels_of_a_new_process(table_file, changes, environment, kernels, use_kernels):
    if environment:
        use_kernels("avx2")
    write(table_file, **changes)
    code = "from harlora.kernels import cpp; print(cpp.load_extension() or cpp.selected_kernels())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.stdout.strip() == (kernels or cpp.select_kernels())


@pytest.mark.parametrize(
    "content",
    ["no json", '{"format": 9}', '{"format": 1, "devices": {"x": 3}}', '{"format": 1, "devices": {"x": {"order": 3}}}'],
)
def test_a_damaged_table_is_ignored_with_one_warning(table_file, content):
    table_file.write_text(content)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json .* is not used; delete it, or measure anew"):
        dispatch.select("qlora_linear", CPU, torch.float32)
    for operator in dispatch.OPERATORS:
        dispatch.select(operator, CPU, torch.float32)  # a second warning would be an error
    problems = doctor.state(CPU)[1]
    assert any("tuning table" in each.problem and "delete it" in each.remedy for each in problems)


def test_a_table_of_another_device_or_build_does_not_count(table_file):
    write(table_file, order={"dequantize_4bit float32": ["reference"]}, build="another")
    assert tuning.table("cpu", cpp.extension_path()) == {}
    assert "another build" in doctor.state(CPU)[0]["tuning"]
    table_file.write_text('{"format": 1, "devices": {"cpu: other": {"order": {}}}}')
    assert "not measured here" in doctor.state(CPU)[0]["tuning"]


@pytest.mark.parametrize("variable", [pytest.param("HARLORA_CPU", marks=needs_extension), "HARLORA_BACKEND"])
def test_a_wrong_variable_is_named_without_a_traceback(variable, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "harlora", "doctor", "--no-speed"], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={**os.environ, variable: "sse9"},
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{variable} must be " in done.stderr
    assert "Traceback" not in done.stderr


def test_tables_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.setenv("HARLORA_TUNING", "0")
    assert "switched off" in doctor.state(CPU)[0]["tuning"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--no-speed", "--tune"])
    assert stopped.value.code == 2
    assert "--tune: HARLORA_TUNING=0 switches tables off; unset it to tune" in capsys.readouterr().err


def test_configurations_are_measured_and_obeyed(table_file, monkeypatch):
    """Triton's, here under its interpreter: two sizes, few candidates."""
    if dispatch.load_triton():
        pytest.skip(dispatch.load_triton())
    one, other = Configuration("direct", 16, 32, 64), Configuration("split", 16, 32, 32, programs=8)
    wrong = Configuration("direct", 16, 16, 32)
    monkeypatch.setattr(configurations, "candidates", lambda *_: [one, other, wrong])
    serves = dispatch.serves
    monkeypatch.setattr(dispatch, "serves", lambda operator, c, *rest: c != wrong and serves(operator, c, *rest))
    sizes = {"weights": [((64, 32), 2**12), ((128, 32), None)], "rows": [1, None], "dtypes": [torch.float32]}
    monkeypatch.setattr(configure, "MANY_ROWS", 5)
    told = []
    table, measured = configure.measure(CPU, lambda *said: told.append(said), **sizes)
    assert [len(table[f"{operator} 32"]) for operator in configurations.OPERATORS] == [4, 4]
    assert [case["rows"] for case in measured] == [1, 5] * 4
    assert all(set(case["times_us"]) == {str(one), str(other)} for case in measured)
    assert told[0][:2] == (0, 8)
    for case, rule in zip(measured, itertools.chain(*table.values()), strict=True):
        assert str(Configuration(**rule["use"])) == min(case["times_us"], key=case["times_us"].__getitem__)
    facts = {"build": "", "order": {}, "triton": configurations.fingerprint(), "configurations": table}
    table_file.write_text(json.dumps({"format": 1, "devices": {tuning.device_name("cpu"): facts}}))
    tuning.measured_configurations.cache_clear()
    found = tuning.measured_configurations(CPU)
    assert found["qlora_linear 32"][-1].use in (one, other)
    facts["triton"] = "another"
    table_file.write_text(json.dumps({"format": 1, "devices": {tuning.device_name("cpu"): facts}}))
    tuning.measured_configurations.cache_clear()
    assert tuning.measured_configurations(CPU) == {}
    facts["configurations"] = {"qlora_linear 32": [{"use": {"way": "direct", "tile": 3}}]}
    table_file.write_text(json.dumps({"format": 1, "devices": {tuning.device_name("cpu"): facts}}))
    tuning.measured_configurations.cache_clear()
    with pytest.warns(RuntimeWarning, match="is damaged: the rules of qlora_linear 32"):
        assert tuning.measured_configurations(CPU) == {}
    tuning.measured_configurations.cache_clear()


def test_after_a_way_of_cuda_comes_one_that_serves_every_call(monkeypatch):
    """On a machine of which only the times are known."""
    fast, dense, slow = Configuration("gemm", 64), Configuration("dense"), Configuration("direct", 16, 32, 64)
    monkeypatch.setattr(configurations, "candidates", lambda *_: [fast, slow, dense])
    monkeypatch.setattr(configure, "times", lambda *_, **__: {str(slow): 3.0, str(fast): 1.0, str(dense): 2.0})
    table, _ = configure.measure(CPU, weights=[((64, 64), None)], rows=[8, None], dtypes=[torch.bfloat16])
    for rules in configurations.read(table).values():
        assert rules == (Rule(fast, 8), Rule(fast), Rule(dense))
    monkeypatch.setattr(configure, "times", lambda *_, **__: {str(fast): 1.0})
    assert configure.measure(CPU, weights=[((64, 64), None)], rows=[None], dtypes=[torch.bfloat16])[0] == {}


def test_what_no_rule_would_be_followed_for_is_not_measured(monkeypatch):
    ways = [Configuration("gemm", 64), Configuration("mma", 16)]
    monkeypatch.setattr(cuda, "serves", lambda *_: True)
    monkeypatch.setattr(cuda, "worth", lambda chosen, *_: chosen.way != "gemm")
    monkeypatch.setattr(dispatch, "serves", lambda *_: True)
    monkeypatch.setattr(dispatch, "launcher", lambda *_: lambda *_: None)
    for worth, found in ((True, ways[1:]), (False, ways)):
        times = configure.times("qlora_linear", CPU, torch.float32, 3, (64, 32), ways, worth=worth)
        assert list(times) == [str(each) for each in found]


def test_what_the_table_has_for_a_backward_may_be_a_way_of_cuda(monkeypatch):
    dx, dense = Configuration("dx", 32), Configuration("dense")
    table = {f"{operator} 16": (Rule(dx, 64), Rule(dense)) for operator in configurations.OPERATORS}
    monkeypatch.setattr(dispatch, "_table", lambda _: table)
    # As on a GPU of compute capability 9.0.
    monkeypatch.setattr(cuda, "serves", lambda operator, way, *arguments: cuda._SERVES[way](*arguments))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    size = ("qlora_linear_backward", CPU, torch.bfloat16)
    assert configure.of_table(*size, 64, (192, 128)) == dx
    assert configure.of_table(*size, 64, (200, 128)) == dense  # in_features are not whole blocks
    assert configure.of_table(*size, 65, (192, 128)) == dense


@pytest.mark.parametrize("fastest", ["launches", "encoder"])
def test_whether_an_encoder_is_one_launch_is_measured_and_obeyed(fastest, monkeypatch):
    """On a machine of which only the times are known."""
    names = [str(each) for each in configurations.ENCODER_CANDIDATES]
    best = next(each for each in names[::-1] if fastest in each)

    def times(x, blocks, device):
        assert (tuple(x.shape[1:]), len(blocks[0]), blocks[2]) == ((16, 192), 6, 6)
        return {name: 1.0 if name == best and len(x) > 1 else 2.0 for name in names[:1] + names[:0:-1]}

    monkeypatch.setattr(configure, "_encoder_samples", times)
    monkeypatch.setattr(configure, "_in_turn", lambda samples: samples)
    told = []
    table, measured = configure.measure_encoders(
        CPU, (16, 6, 192, 512, 6), lambda *said: told.append(said), windows=(1, 4, None)
    )
    assert [case["rows"] for case in measured] == [16, 64, 4096]
    assert told[0] == (0, 3, "encoder_blocks 16")
    if fastest == "launches":
        assert table == {}
        return
    (rules,) = configurations.read(table).values()
    assert [rule.rows for rule in rules] == [16, 64, None, None]
    assert [rule.use.way for rule in rules] == ["launches", "encoder", "encoder", "launches"]
    assert configure.gain(CPU, measured) == {
        "configurations of encoder_blocks 16": {"before": 1.0, "fastest": round(0.25 ** (1 / 3), 4)}
    }


@pytest.mark.parametrize("operator", configurations.OPERATORS)
def test_candidates_suit_the_rows(operator):
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 16, 100, 512, 8192):
            found = configurations.candidates(operator, dtype, rows)
            assert len(found) == len(set(found)) <= 40
            assert all(each.block_rows <= max(16, 2 * rows) for each in found)
            assert any(each.way == "dense" for each in found) == (rows >= 64)


COMPILE_AHEAD = """
from types import SimpleNamespace
from unittest.mock import patch
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from harlora import configure
from harlora.kernels import configurations, dispatch

def main():
    device, target = torch.device("meta"), GPUTarget("cuda", 90, 32)
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_target=lambda: target, get_current_stream=lambda device: 0))
    every = configurations.candidates
    configurations.candidates = lambda *of: [
        c for c in every(*of) if c.way == "dense" or (c.block_rows, c.block_out, c.num_stages) == (16, 64, 3)]
    configure.DTYPES, configure.ROWS = (torch.bfloat16,), (16, 64)
    print(configure.compile_ahead(device))
    hits = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.append((src.name, cache_hit))
    run = JITFunction.run
    with patch.object(JITFunction, "run", lambda *given, warmup, **options: run(*given, warmup=True, **options)):
        for operator in configurations.OPERATORS:
            for rows in (16, 64):
                for candidate in configurations.candidates(operator, torch.bfloat16, rows):
                    sizes = [(rows, 512, 512), (rows, 768, 3072)]
                    if candidate.block_rows:
                        sizes.append((33, 512, 144))  # what it is proven on
                    for size in sizes:
                        call = dispatch.problem(operator, device, torch.bfloat16, *size, 16, "nf4", 64, False)
                        dispatch.launcher(operator, candidate)(*call)
    print(len(hits), sum(hit for _, hit in hits), *sorted({name for name, _ in hits}))

if __name__ == "__main__":
    main()
"""
SOME_KEYS = """
import sys
from harlora.kernels.triton import qlora_linear
print(*sorted((name, getattr(qlora_linear, name).cache_key) for name in sys.argv[1:]))
"""


def without_interpreter(*command, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=kept | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_compiled_ahead_is_found_when_it_is_launched(tmp_path):
    """For an sm_90, which need not be here: the processes that compile see no GPU, and launches compile nothing."""
    pytest.importorskip("triton")
    (tmp_path / "ahead.py").write_text(COMPILE_AHEAD)
    compiled, launched = without_interpreter(
        tmp_path / "ahead.py", TRITON_CACHE_DIR=str(tmp_path / "cache")
    ).splitlines()
    total, hits, *names = launched.split()
    assert total == hits == compiled
    assert {"_qlora_linear_fwd_kernel", "_qlora_linear_dx_split_kernel", "_dequantize_blocks_kernel"} <= set(names)


def test_keys_of_kernels_do_not_depend_on_which_is_used_first():
    pytest.importorskip("triton")
    names = ["_qlora_linear_fwd_kernel", "_qlora_linear_fwd_split_kernel", "_qlora_linear_dx_split_kernel"]
    assert without_interpreter("-c", SOME_KEYS, *names) == without_interpreter("-c", SOME_KEYS, *reversed(names))


def test_candidates_that_spill_are_not_timed(monkeypatch):
    """The kernels' own count, which their launch leaves, decides."""
    if dispatch.load_triton():
        pytest.skip(dispatch.load_triton())
    right, spilling = Configuration("direct", 16, 32, 32), Configuration("split", 16, 32, 32)

    @contextmanager
    def launches():
        found = []
        yield found
        found += [(SimpleNamespace(n_spills=n), (1,), (), {}) for n in (0, 8 if made[-1] == spilling else 0)]

    made, launcher = [], dispatch.launcher
    monkeypatch.setattr(
        dispatch, "launcher", lambda operator, chosen: made.append(chosen) or launcher(operator, chosen)
    )
    monkeypatch.setattr(dispatch, "serves", lambda *_: True)
    monkeypatch.setattr(configure.replay, "launches", launches)
    monkeypatch.setattr(configurations, "candidates", lambda *_: [right, spilling])
    candidates = configurations.candidates("qlora_linear", torch.float32, 3)
    times = configure.times("qlora_linear", CPU, torch.float32, 3, (64, 32), candidates)
    assert set(times) == {str(right)}
