"""One training over two processes of ``torchrun``, against the same in one."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from harlora.data import load_windows
from harlora.errors import InputError
from harlora.files import load_tensors
from harlora.train.pretrain import pretrain
from small import PRETRAIN

RUN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from harlora.data import load_windows
from harlora.errors import InputError
from harlora.models import MAE
from harlora.train.finetune import finetune
from harlora.train.pretrain import Pretrained, pretrain
sys.path.insert(0, sys.argv[1])
from small import FINETUNE, PRETRAIN

torch.set_num_threads(1)
root, cache, device = Path(sys.argv[2]), Path(sys.argv[3]), torch.device("cpu")
sources = [load_windows(f"synthetic_{letter}", root, cache) for letter in "bc"]
pretrain(PRETRAIN, sources, root / "runs", device=device)
pretrain(PRETRAIN, sources, root / "runs", device=device)  # finished: found, by both
for call in (
    lambda: pretrain(replace(PRETRAIN, batch_size=63), sources, root / "runs", device=device),
    lambda: finetune(FINETUNE, sources[0], Pretrained(MAE(PRETRAIN.model).encoder, "x", PRETRAIN, ("synthetic_a",), 1.0,
                     1.0), root / "runs", device=device),
):
    try:
        call()
    except InputError as error:
        Path(sys.argv[2], f"refused-{torch.distributed.get_rank()}.txt").open("a").write(f"{error}\\n")
"""


def test_two_processes_take_the_steps_of_one(tmp_path, tmp_path_factory):
    folder, cache = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("cache")
    sources = [load_windows(f"synthetic_{letter}", folder, cache) for letter in "bc"]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script,
         os.path.dirname(__file__), folder, cache],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = pretrain(PRETRAIN, sources, tmp_path / "runs", device=torch.device("cpu"))
    (together,) = (folder / "runs").glob("pretrain-*/encoder.safetensors")
    assert together.parent.name == alone.parent.name  # the same run, however many took part
    one, two = (json.loads((file.parent / "metrics.json").read_text()) for file in (alone, together))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(two["history"]) == PRETRAIN.epochs
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
    weights = [load_tensors(file, kind="encoder checkpoint", remedy="")[0] for file in (alone, together)]
    for name, value in weights[0].items():
        if name.endswith("attention.k.bias"):
            continue  # softmax does not see it: its gradient is rounding alone, which AdamW makes steps of
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    for rank in (0, 1):
        uneven, adaptation = (folder / f"refused-{rank}.txt").read_text().splitlines()
        assert uneven.startswith(
            "batch_size, or the number of windows where that is less, must be a multiple of the 2 processes"
        )
        assert adaptation.startswith("torchrun: one adaptation is of one process")


def test_several_processes_need_accelerate(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"requires Accelerate; install harlora with its extra scale"):
        pretrain(replace(PRETRAIN, epochs=1), [load_windows("synthetic_b", tmp_path, tmp_path)], tmp_path,
                 device=torch.device("cpu"))  # fmt: skip
