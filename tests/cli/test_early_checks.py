"""Mistakes in paths, names and shapes are reported before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = {"torch", "transformers", "datasets", "accelerate"}

MISTAKES = [
    (3, "no such dataset: nowhere", "pretrain --data nowhere --out o --model m"),
    (3, "not a pregenerated dataset: it is a file", "pretrain --data text.txt --out o --model m"),
    (2, "--out full is not empty", "pretrain --data data --out full --model m"),
    (2, "--out text.txt is a file", "pretrain --data data --out text.txt --model m"),
    (4, "no such directory: model ./nowhere", "pretrain --data data --out o --model ./nowhere"),
    (4, "there are no weights in model bare", "pretrain --data data --out o --model bare"),
    (4, "model full has no config.json", "pretrain --data data --out o --model full"),
    (4, "model text.txt is a file", "pretrain --data data --out o --model text.txt"),
    (2, "did you mean 'gpt2'", "pretrain --data data --out o --model-config gpt2-smal"),
    (2, "n_heads (did you mean 'n_head'?)", "pretrain --data data --out o --model-config keys.yaml"),
    (2, "n_embd 17 is not a multiple of n_head 2", "pretrain --data data --out o --model-config odd.yaml"),
    (2, "n_positions is 'abc': expected a whole number", "pretrain --data data --out o --model-config word.yaml"),
    (2, "unknown task 'wikitex', did you mean 'wikitext'", "pretrain --data data --out o --model m --eval-task wikitex"),
    (3, "no such file or directory: gone.txt", "pretrain --data data --out o --model m --eval-data gone.txt"),
    (2, "--report-to: expected", "pretrain --data data --out o --model m --report-to tensorbord"),
    (4, "no such directory: teacher ./t", "distill --teacher ./t --student m --data data --out o"),
    (2, "unknown keys", "distill --teacher m --student keys.yaml --data data --out o"),
    (2, "no recipe", "distill --teacher m --student m --data data --out o --recipe none"),
    (3, "no such file or directory: gone.txt", "finetune --model m --data gone.txt --out o"),
    (2, "--num-layers 9: the teacher has only 2 layers", "truncate-student --teacher m --num-layers 9 --out o"),
    (2, "share the hidden size equally", "truncate-student --teacher m --n-embd 15 --n-head 2 --out o --data data"),
    (2, "layer 5 does not exist", "truncate-student --teacher m --layers 0,5 --out o"),
    (3, "no such file or directory: gone.txt", "pregenerate gone.txt --tokenizer tok --out o"),
    (4, "no such directory: tokenizer ./gone", "pregenerate text.txt --tokenizer ./gone --out o"),
    (4, "no tokenizer in m", "pregenerate text.txt --tokenizer m --out o"),
    (2, "full is not empty", "pregenerate text.txt --tokenizer tok --out full"),
    (3, "no file matches x*.txt", "pregenerate x*.txt --tokenizer tok --out o"),
    (2, "--out full is not empty", "train-tokenizer text.txt --out full"),
    (2, "unknown task 'nonsense'", "ppl --model m --task nonsense"),
    (3, "wikitext: no such file: gone", "ppl --model m --task wikitext --task-data gone"),
    (3, "full has no file named wiki.test.raw", "ppl --model m --task wikitext --task-data full"),
    (4, "no such directory: model ./gone", "ppl --model ./gone --task text.txt"),
    (2, "the directory does not exist", "ppl --model m --task text8 --plot no/where.png"),
    (3, "cannot read gone.txt", "generate --model m --prompt-file gone.txt"),
    (3, "no such directory: gone", "verify ./gone"),
    (3, "neither a pregenerated dataset nor a model", "verify full"),
    (0, "wikitext-103", "ppl --list-tasks"),
    (0, "distilgpt2", "presets"),
    (0, "max_steps: 3", "pretrain --data data --out o --model m --max-steps 3 --print-config"),
]  # fmt: skip

CODE = """
import contextlib, io, json, sys
from tinygpt2.cli import app
said = []
for line in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            app.main(line.split())
        except SystemExit as end:
            said.append((end.code, out.getvalue(), sorted(set(sys.modules) & set(json.loads(sys.argv[2])))))
print(json.dumps(said))
"""


def test_mistakes_are_found_without_torch(tmp_path: Path) -> None:
    """All in one process: an import by any of them would be seen by all that follow."""
    for name in ("full", "m", "bare", "tok", "data"):
        (tmp_path / name).mkdir()
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "model_type": "gpt2"}
    for name, content in {
        "text.txt": "text", "full/x": "x", "m/config.json": json.dumps(shape), "m/model.safetensors": "",
        "bare/config.json": json.dumps(shape), "tok/tokenizer.json": "{}", "data/pregenerate.json": "{}",
        "keys.yaml": "n_layers: 3\nn_heads: 2\n", "odd.yaml": "n_embd: 17\nn_head: 2\n", "word.yaml": "n_positions: abc",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    lines = json.dumps([line for _, _, line in MISTAKES])
    done = subprocess.run(
        [sys.executable, "-c", CODE, lines, json.dumps(sorted(HEAVY))],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == len(MISTAKES)
    for (code, part, line), (ended, text, imported) in zip(MISTAKES, said, strict=True):
        assert (ended, imported) == (code, []), f"{line}\n{text}"
        assert part in text, f"{line}\n{text}"
    assert not (tmp_path / "o").exists()
