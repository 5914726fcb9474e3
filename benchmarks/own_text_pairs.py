"""What learning from sampled text is worth on pairs: signatures and summary lines of documented Python code.

    python benchmarks/own_text_pairs.py --work WORK --minutes 20   # continues where it stopped
    python benchmarks/own_text_pairs.py --work WORK --files 200 --teacher-steps 4 --max-steps 4 --tokens 8192 --texts 8

The pairs are the functions and classes of the standard library and of the installed packages: a prompt is a signature,
its response the first line of the docstring. The pairs of a module are all trained on, or all held out. The teacher is
fine-tuned on them, students are cut from it, and each is trained as in benchmarks/own_text.py. What they write after
held-out signatures is judged by the teacher, and compared with the summaries (ROUGE-L with its standard error). Every
finished run is a line of --results and is not run again.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from own_text import Comparison, arguments, compare_all, opened

from tinygpt2 import (
    EvaluateTextConfig,
    FinetuneConfig,
    PregenerateConfig,
    TruncateStudentConfig,
    evaluate_text,
    finetune,
    pregenerate,
    truncate_student,
)

HERE = Path(__file__).parent / "own_text"
HELD_OUT = 0.05  # share of the modules
LONGEST = 240  # characters of a signature, and of a summary
SHORTEST = 12  # characters of a summary
LEFT_OUT = {"test", "tests", "testing", "idle_test", "lib2to3", "__pycache__"}


def main() -> None:
    """Make pairs, teacher and students that do not exist yet, and run what is missing."""
    parser = arguments(__doc__ or "", HERE / "pairs.jsonl")
    parser.add_argument("--files", type=int, help="evenly spaced files to read; all by default")
    parser.add_argument("--teacher-epochs", type=int, default=2, help="passes over the pairs")
    parser.add_argument("--teacher-steps", type=int, help="steps in the place of passes: for a try")
    options = parser.parse_args()
    study = opened(options)
    work = study.work / "own-text-pairs"
    data, teacher = work / "data", work / "teacher"
    if not data.is_dir():
        write_pairs(work, options.files)
        columns = {"prompt_column": "prompt", "response_column": "response"}
        sources = {"source": [str(work / "train.jsonl")], "test_source": [str(work / "test.jsonl")]}
        length = study.plan["sequence_length"]
        pregenerate(
            PregenerateConfig(**sources, **columns, tokenizer=study.teacher, sequence_length=length, out=str(data))
        )
    if not (teacher / "run.json").is_file():
        shutil.rmtree(teacher, ignore_errors=True)
        steps = options.teacher_steps
        passes = {"num_epochs": options.teacher_epochs} if steps is None else {"max_steps": steps}
        common = {**study.plan["common"], "micro_batch_size": 8, "eval_blocks": options.blocks}
        finetune(FinetuneConfig(model=study.teacher, data=str(data), out=str(teacher), **common, **passes))
    for size in options.sizes:
        if not (out := work / size).is_dir():
            shape = study.plan["sizes"][size]
            truncate_student(TruncateStudentConfig(teacher=str(teacher), data=str(data), out=str(out), **shape))

    def measure(model: str) -> dict[str, Any]:
        how = {"num_prompts": options.texts, "max_new_tokens": 64}
        (found,) = evaluate_text(EvaluateTextConfig(model=[model], judge=str(teacher), data=str(data), **how)).results
        return {key: value for key, value in asdict(found).items() if key not in ("model", "excess")}

    compare_all(study, Comparison("own text, pairs", str(teacher), str(data), work, work / "runs", measure), options)


def write_pairs(work: Path, count: int | None) -> None:
    """Write the pairs of the modules to train on and of those that are held out.

    Args:
        count: evenly spaced files to read; None reads all.
    """
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    modules = {}
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            inside = file.relative_to(root)
            if LEFT_OUT.isdisjoint(inside.parts) and inside.parts[0] not in ("site-packages", "dist-packages"):
                modules[".".join(inside.with_suffix("").parts)] = file
    every = sorted(modules.items())
    chosen = every if count is None else every[:: max(1, len(every) // count)]
    rows: dict[str, list[str]] = {"train": [], "test": []}
    seen = set()
    for module, file in chosen:
        split = "test" if int(sha256(module.encode()).hexdigest(), 16) % 10_000 < 10_000 * HELD_OUT else "train"
        for prompt, response in pairs_of(file):
            if (prompt, response) not in seen:  # generated and vendored code repeats itself
                seen.add((prompt, response))
                rows[split].append(json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False))
    work.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        (work / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{split}: {len(lines):,} pairs")


def pairs_of(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the signature and the summary line of each documented function and class of a file, which is not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the parsed files cause warnings
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            summary = next(iter((ast.get_docstring(node) or "").strip().splitlines()), "").strip()
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                signature = f"class {node.name}({bases})" if bases else f"class {node.name}"
            else:
                returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                signature = f"def {node.name}({ast.unparse(node.args)}){returned}"
            if SHORTEST <= len(summary) <= LONGEST and len(signature) <= LONGEST:
                yield signature, summary


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
