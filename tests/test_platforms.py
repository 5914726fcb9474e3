"""Without the extras, and without what only Linux and macOS have, every module loads and a model trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

PROGRAM = """
import os, pkgutil, signal, sys
import accelerate, datasets, psutil, torch, transformers  # their own modules are for this system
from transformers import GPT2LMHeadModel, GenerationConfig, LogitsProcessorList

for name in ("matplotlib", "h5py", "tensorboard", "wandb", "resource", "fcntl", "termios", "pty", "readline"):
    for loaded in [one for one in sys.modules if one == name or one.startswith(name + ".")]:
        del sys.modules[loaded]
    sys.modules[name] = None
del os.sched_getaffinity, signal.SIGKILL, os.kill

import importlib.util
real = importlib.util.find_spec
absent = ("matplotlib", "h5py", "tensorboard", "wandb")
importlib.util.find_spec = lambda name, package=None: None if name in absent else real(name, package)

psutil.Process.memory_info = (lambda plain: lambda self: type("Info", (), {
    "rss": plain(self).rss, "peak_wset": plain(self).rss})())(psutil.Process.memory_info)

import tinygpt2
for module in pkgutil.walk_packages(tinygpt2.__path__, "tinygpt2."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from tinygpt2.cli.app import _run
corpus, data, teacher, shape, out = sys.argv[1:]
for line in (
    ["train-tokenizer", corpus, "--vocab-size", "300", "--out", out + "/t"],
    ["pretrain", "--model-config", shape, "--data", data, "--out", out + "/m", "--max-steps", "2"],
    ["distill", "--teacher", teacher, "--student", out + "/m", "--data", data, "--out", out + "/s", "--max-steps", "2"],
    ["ppl", "--model", out + "/s", "--task", data],
    ["generate", "--model", out + "/s", "--prompt", "the", "--max-new-tokens", "2"],
    ["verify", out + "/s"],
):
    code = _run(line, as_json=False)
    assert code == 0, (line, code)
assert _run(["pretrain", "--model-config", shape, "--data", data, "--out", out + "/n", "--report-to", "tensorboard"],
            as_json=False) == 2
"""


def test_commands_work_without_extras_and_without_unix(corpus: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32}))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(corpus), str(data), str(teacher), str(shape), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pictures are skipped: pip install 'tinygpt2[plots]'" in done.stderr
    assert "pip install 'tinygpt2[tensorboard]'" in done.stderr
    assert not (tmp_path / "out" / "s" / "curves.png").exists()
