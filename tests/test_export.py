"""What is exported computes what the checkpoint's model computes, says what it is, and is refused where it does not."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from harlora import cli
from harlora import export as export_module
from harlora.data import load_windows
from harlora.data.windows import Normalizer
from harlora.errors import InputError
from harlora.export import FORMATS, export
from harlora.files import save_tensors
from harlora.kernels import dequantize_4bit, quantize_4bit
from harlora.models import MAE
from harlora.nn import QLoRALinear, adapted_layers
from harlora.train.finetune import build_classifier, load_classifier
from small import FINETUNE, MODEL

LABELS = ("sit", "walk", "run")
NORMALIZER = Normalizer((0.5, -1.0, 9.0, 0.0, 0.1, -0.2), (3.0, 2.0, 2.5, 0.7, 0.9, 1.1))
QLORA = replace(FINETUNE, method="qlora")


@pytest.fixture(autouse=True)
def _no_time(monkeypatch):
    monkeypatch.setattr(export_module, "_TIMED_S", 0.0)


def checkpoint(folder, config, *, target="elsewhere", spoil=None, model=MODEL):
    """A checkpoint as `finetune` writes it, with nothing left at the values that layers start from."""
    torch.manual_seed(1)
    # An odd width within the blocks, so that blocks of scales cross rows.
    encoder = MAE(replace(model, ffn=37)).encoder
    classifier = build_classifier(config, encoder, len(LABELS)).eval()
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if parameter.ndim == 1 or name.endswith("lora_B") or (".adapter." in name and parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        norm = classifier.head[1]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        classifier.head[4].weight.mul_(3)  # so that labels differ from window to window
        if spoil is not None:
            spoil(classifier)
    info = {
        "config": config.values(), "model": asdict(encoder.config), "normalizer": asdict(NORMALIZER),
        "labels": list(LABELS), "target": target,
    }  # fmt: skip
    file = folder / "classifier.safetensors"
    save_tensors(file, classifier.state_dict(), kind="classifier checkpoint", info=info)
    return file


def windows(count):
    """Windows of phones held in many ways, some at rest."""
    random = np.random.default_rng(count)
    gravity = random.standard_normal((count, 1, 6)) * [5.0, 5.0, 5.0, 0.5, 0.5, 0.5]
    moved = random.standard_normal((count, 128, 6)) * [3.0, 3.0, 3.0, 1.0, 1.0, 1.0]
    return (gravity + moved * random.uniform(0, 1, (count, 1, 1))).astype(np.float32)


def logits_of(file, signals):
    model, normalizer, _ = load_classifier(file)
    with torch.no_grad():
        return model(torch.from_numpy(normalizer(signals))).numpy()


def run_onnx(path, signals):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits", "probabilities"], {"windows": signals})


def run_torch(path, signals):
    with torch.no_grad():
        return [output.numpy() for output in torch.export.load(path).module()(torch.from_numpy(signals))]


CASES = {
    "full": ("onnx", replace(FINETUNE, method="full")),
    "lora": ("onnx", replace(FINETUNE, method="lora", rslora=True)),
    "merged qlora": ("onnx", QLORA),
    "nf4": ("onnx-4bit", replace(QLORA, rslora=True)),
    "fp4": ("onnx-4bit", replace(QLORA, quant_type="fp4", blocksize=512, double_quant=False, train_norms=False)),
    "some layers": ("onnx-4bit", replace(QLORA, target_modules=("q", "fc2"), rank_pattern={"fc2": 3})),
    "torch lora": ("torch", replace(FINETUNE, method="lora", train_norms=False)),
    "torch qlora": ("torch", replace(QLORA, quant_type="fp4", blocksize=4096)),
    "dora": ("onnx-4bit", replace(QLORA, method="qdora")),
    "ia3": ("onnx-4bit", replace(QLORA, method="qia3")),
    "merged hydra": ("onnx", replace(FINETUNE, method="hydra")),
    "torch adalora": ("torch-4bit", replace(QLORA, method="qadalora")),
    "torch 4-bit": ("torch-4bit", replace(QLORA, blocksize=32, rslora=True)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The checkpoint, the exported file and the report of a case, made once."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("export")
            form, config = CASES[case]
            file = checkpoint(folder, config)
            report = export(file, folder / "out", form, data=folder)
            made[case] = file, folder / "out" / FORMATS[form], report
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, while it loads a program
def test_each_format_gives_the_outputs_of_pytorch(exported, case):
    file, path, report = exported(case)
    run = run_torch if path.suffix == ".pt2" else run_onnx
    for count in (1, 3, 64):
        signals = windows(count)
        expected = logits_of(file, signals)
        logits, probabilities = run(path, signals)
        assert logits.shape == (count, len(LABELS))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(probabilities, torch.from_numpy(expected).softmax(1), rtol=0, atol=1e-5)
    assert report["check"]["max_logit_error"] < 1e-4
    assert report["check"]["equal_labels"] == 1.0
    assert report["changed_by_merge"] is None
    in_4bit = {"some layers": 4} | dict.fromkeys(("nf4", "fp4", "torch 4-bit", "dora", "ia3", "torch adalora"), 12)
    assert report["layers"]["4bit"] == in_4bit.get(case, 0)
    assert sum(report["layers"].values()) == 15
    assert report == json.loads((path.parent / "export.json").read_text())
    assert report["bytes"]["file"] == path.stat().st_size > report["bytes"]["weights"] > 0
    assert [row["batch"] for row in report["latency_ms"]] == [1, 64]
    assert all(row["pytorch"] > 0 and row["exported"] > 0 for row in report["latency_ms"])
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted([path.name, "export.json"])


def test_the_adapter_stays_beside_4_bit_weights_that_are_not_changed(exported):
    import onnx

    file, path, _ = exported("nf4")
    model = load_classifier(file)[0]
    graph = onnx.load(path).graph
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulBnb4"]
    layers = [layer for _, layer in adapted_layers(model)]
    assert len(nodes) == len(layers) == 12
    packed = {layer.weight.numpy().tobytes() for layer in layers}
    assert {stored[node.input[1]].tobytes() for node in nodes} == packed
    assert all(node.domain == "com.microsoft" for node in nodes)
    for layer in layers:  # as they are or transposed, whichever the exporter likes
        factor = (layer.lora_B.detach() * layer.scaling).numpy()
        assert any(np.array_equal(value, each) for value in stored.values() for each in (factor, factor.T))


class AllLayers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x[..., : layer.attributes["K"]]) for layer in self.layers)


def test_every_4_bit_format_and_odd_sizes_are_exact_in_onnx_runtime(tmp_path):
    sizes = ((1, 1), (3, 5), (7, 33), (17, 63), (33, 31), (48, 24), (129, 65))
    layers, expected = [], []
    for number, blocksize in enumerate((32, 64, 128, 256, 512, 1024, 2048, 4096)):
        for quant_type in ("nf4", "fp4"):
            for double_quant in (False, True):
                for out_features, in_features in (sizes[number % 7], sizes[-1]):
                    layer = QLoRALinear(
                        in_features, out_features, bias=False, rank=0, quant_type=quant_type, blocksize=blocksize,
                        double_quant=double_quant,
                    )  # fmt: skip
                    layers.append(export_module._Bnb4Linear(layer))
                    expected.append(dequantize_4bit(layer.quantized_weight()))
    width = max(weight.shape[1] for weight in expected)
    x = torch.eye(width)  # brings out each weight, without a sum
    with export_module._quiet():
        program = torch.onnx.export(AllLayers(layers).eval(), (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "layers.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "layers.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for weight, y in zip(expected, found, strict=True):
        np.testing.assert_array_equal(y[: weight.shape[1]].T, weight.numpy())


def test_the_model_says_what_it_takes_and_gives(exported):
    import onnx

    for case, domains in (("merged qlora", {""}), ("nf4", {"", "com.microsoft"})):
        _, path, report = exported(case)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        assert metadata == report["metadata"]
        assert json.loads(metadata["labels"]) == list(LABELS)
        assert json.loads(metadata["config"])["method"] == "qlora"
        assert metadata["rate_hz"] == "50"
        assert metadata["units"] == "accel in m/s^2 with gravity, gyro in rad/s"
        assert {each.domain for each in onnx.load(path).opset_import} == domains
        assert [each.shape for each in session.get_inputs()] == [["batch", 128, 6]]
        assert [each.name for each in session.get_outputs()] == ["logits", "probabilities"]
    _, path, report = exported("torch 4-bit")
    extra = {"harlora.json": ""}
    with export_module._quiet():
        torch.export.load(path, extra_files=extra)
    assert json.loads(extra["harlora.json"]) == report["metadata"]


@pytest.mark.parametrize("case", ["merged qlora", "nf4", "torch qlora", "torch 4-bit"])
def test_no_path_of_this_machine_is_in_the_file(exported, case):
    content = exported(case)[1].read_bytes()
    assert str(Path(export_module.__file__).resolve().parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b"stack_trace" not in content


def in_another_process(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("case", ["merged qlora", "nf4"])
def test_onnx_runs_without_torch_and_harlora(exported, tmp_path, case):
    file, path, _ = exported(case)
    np.save(tmp_path / "windows.npy", windows(64))
    code = (
        "import sys, json\n"
        "for name in ('torch', 'harlora', 'onnx', 'scipy', 'safetensors'): sys.modules[name] = None\n"
        "import numpy as np, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "labels = json.loads(session.get_modelmeta().custom_metadata_map['labels'])\n"
        "logits, _ = session.run(None, {'windows': np.load(sys.argv[2])})\n"
        "print(*[labels[i] for i in logits.argmax(axis=1)])\n"
    )
    found = in_another_process(code, path, tmp_path / "windows.npy")
    assert found == [LABELS[i] for i in logits_of(file, windows(64)).argmax(axis=1)]
    assert len(set(found)) > 1


def test_a_torch_program_of_float_weights_runs_without_harlora(exported, tmp_path):
    file, path, _ = exported("torch lora")
    np.save(tmp_path / "windows.npy", windows(3))
    code = (
        "import sys\n"
        "sys.modules['harlora'] = None\n"
        "import numpy as np, torch\n"
        "logits, _ = torch.export.load(sys.argv[1]).module()(torch.from_numpy(np.load(sys.argv[2])))\n"
        "print(*logits.argmax(dim=1).tolist())\n"
    )
    found = in_another_process(code, path, tmp_path / "windows.npy")
    assert found == [str(i) for i in logits_of(file, windows(3)).argmax(axis=1)]


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merging_into_4_bits_is_that_and_says_how_much_it_changes(tmp_path, method):
    config = replace(FINETUNE, method=method, quant_type="fp4", blocksize=128)
    file = checkpoint(tmp_path, config)
    report = export(file, tmp_path / "out", "torch-4bit", data=tmp_path, merge=True)
    model, normalizer, _ = load_classifier(file)
    with torch.no_grad():
        for block in model.encoder.blocks:
            for owner, names in ((block.attention, "q k v o"), (block, "fc1 fc2")):
                for name in names.split():
                    layer = getattr(owner, name)
                    merged = layer.merge() if isinstance(layer, QLoRALinear) else layer
                    merged.weight.copy_(dequantize_4bit(quantize_4bit(merged.weight.detach(), "fp4", 128, False)))
                    setattr(owner, name, merged)
        expected = model(torch.from_numpy(normalizer(windows(16)))).numpy()
    logits, _ = run_torch(tmp_path / "out" / FORMATS["torch-4bit"], windows(16))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    changed = report["changed_by_merge"]
    assert changed["max_logit_error"] > 100 * report["check"]["max_logit_error"]
    assert report["metadata"]["requantized"] == "true"
    assert report["layers"] == {"4bit": 12, "float32": 3}


# What is refused


def left(folder):
    return sorted(entry.name for entry in folder.rglob("*")) if folder.exists() else []


def double(model):
    """A merged model with one row of one weight wrong."""
    export_module_merge(model)
    model.classifier.encoder.blocks[1].fc1.weight.data[0] *= 2
    return model


export_module_merge = export_module.merge_adapters


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_wrong_weight_is_found_and_nothing_is_written(tmp_path, monkeypatch, form):
    file = checkpoint(tmp_path, QLORA)
    monkeypatch.setattr(export_module, "merge_adapters", double)
    with pytest.raises(InputError, match="what was exported disagrees with the model: logits differ by up to"):
        export(file, tmp_path / "out", form, data=tmp_path)
    assert left(tmp_path / "out") == []


def test_a_wrong_scale_is_found_and_what_was_there_stays(tmp_path, monkeypatch):
    file = checkpoint(tmp_path, QLORA)
    export(file, tmp_path / "out", "onnx-4bit", data=tmp_path)
    path = tmp_path / "out" / FORMATS["onnx-4bit"]
    before, files = path.read_bytes(), left(tmp_path / "out")
    right = export_module.scales
    monkeypatch.setattr(export_module, "scales", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(InputError, match="disagrees with the model"):
        export(file, tmp_path / "out", "onnx-4bit", data=tmp_path)
    assert path.read_bytes() == before
    assert left(tmp_path / "out") == files


def test_a_model_that_gives_nan_is_refused(tmp_path):
    file = checkpoint(tmp_path, QLORA, spoil=lambda model: model.head[4].bias.fill_(float("nan")))
    with pytest.raises(InputError, match="logits differ by up to nan"):
        export(file, tmp_path / "out", "torch", data=tmp_path)
    assert left(tmp_path / "out") == []


def test_labels_and_probabilities_count_too():
    good = {"max_logit": 5.0, "max_logit_error": 4e-4, "max_probability_error": 1e-5, "equal_labels": 0.995}
    export_module._require(good, "onnx")
    for wrong in ({"max_logit_error": 6e-4}, {"max_probability_error": 1e-3}, {"equal_labels": 0.98}):
        with pytest.raises(InputError, match="disagrees"):
            export_module._require(good | wrong, "onnx")


def test_arguments_that_cannot_be_used_are_named(tmp_path):
    file = checkpoint(tmp_path, replace(FINETUNE, method="lora"))

    def refused(match, *, out=tmp_path / "out", form="torch", file=file, **options):
        with pytest.raises(InputError, match=match):
            export(file, out, form, data=tmp_path, **options)
        assert left(tmp_path / "out") == []

    refused("--format must be one of onnx, onnx-4bit, torch, torch-4bit, got 'tflite'", form="tflite")
    refused("--merge requires --format onnx-4bit or torch-4bit, got torch", merge=True)
    refused("--threads must be at least 1, got 0", threads=0)
    refused("was finetuned by lora and has no 4-bit layers; use --format torch, or --merge", form="torch-4bit")
    refused("nowhere.safetensors: no such file; give the classifier.safetensors", file=tmp_path / "nowhere.safetensors")
    refused("classifier.safetensors: cannot make the folder", out=file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "export.json").write_text('{"format": "onnx"}')
    refused("other has an export in the format onnx, got torch; choose another folder", out=other)


def test_a_damaged_checkpoint_and_one_of_another_kind_are_refused(tmp_path):
    file = checkpoint(tmp_path, QLORA)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="checksum does not match its contents"):
        export(file, tmp_path / "out", "torch", data=tmp_path)
    file.write_bytes(content[:100])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        export(file, tmp_path / "out", "torch", data=tmp_path)
    save_tensors(file, {"x": torch.zeros(1)}, kind="encoder checkpoint", info={})
    with pytest.raises(InputError, match="required a harlora classifier checkpoint file, found encoder checkpoint"):
        export(file, tmp_path / "out", "torch", data=tmp_path)
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"--format onnx requires {name}, .*extra export"):
        export(tmp_path / "unread.safetensors", tmp_path / "out", "onnx", data=tmp_path)


def test_torch_programs_need_no_library_of_onnx(tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    export(checkpoint(tmp_path, replace(FINETUNE, method="full")), tmp_path / "out", "torch", data=tmp_path)


# What it is compared on


def test_windows_are_the_targets_where_it_is_found(tmp_path):
    found, source = export_module._windows("synthetic_a", tmp_path, 128)
    assert source == "256 of synthetic_a"
    everything = {each.tobytes() for each in load_windows("synthetic_a", tmp_path).signals}
    assert all(each.tobytes() in everything for each in found)
    found, source = export_module._windows("motionsense", tmp_path, 128)
    assert source == "256 random, since motionsense was not found"
    assert found.shape == (256, 128, 6)
    assert found.dtype == np.float32
    assert 8 < np.linalg.norm(found[..., :3].mean(axis=1), axis=1).mean() < 12


def test_the_command(tmp_path, capsys):
    file = checkpoint(tmp_path, QLORA, target="synthetic_a")
    threads = torch.get_num_threads()
    cli.main(["export", "--model", str(file), "--out", str(tmp_path / "out"), "--format", "torch-4bit", "--merge"])
    said = capsys.readouterr().out
    assert "classifier-4bit.pt2: 12 layers in 4 bits, 3 in float32; 1 thread(s); compared on windows: 256 of" in said
    assert "Merging the adapters and quantising anew changed the classifier" in said
    assert f"report: {tmp_path / 'out' / 'export.json'}" in said.replace("\n", "")
    assert torch.get_num_threads() == threads
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "--model", str(file), "--out", str(tmp_path / "b"), "--format", "torchscript"])
    assert stopped.value.code == 2
    assert "--format must be one of" in capsys.readouterr().err
