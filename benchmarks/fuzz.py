"""Mutate configurations, tokenizers, weights and corpora, and check that no input ends in an internal error.

Each case changes one file of a small sound model or corpus at random (seeded), and runs one command on it. The command
may succeed, or fail with exit code 2 (configuration), 3 (data), 4 (model) or 6 (machine). Any other exit code is
printed with the case's number, and `--case N` repeats that case alone with its output.

    python benchmarks/fuzz.py --cases 2000 --json
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ALLOWED = (0, 2, 3, 4, 6)
JUNK: list[Any] = [None, True, -1, 0, 1, 3, 1.5, 1e30, "", "x", "gelu", [], [0], {}, {"a": 1}, 10**12, "1e-5", "\ud800"]


def junk(pick: random.Random) -> Any:
    return pick.choice(JUNK)


def mutate_json(file: Path, pick: random.Random) -> None:
    """Replace, remove or add a value somewhere in a JSON file; sometimes cut the file off."""
    text = file.read_text(encoding="utf-8")
    if pick.random() < 0.1:
        file.write_text(text[: pick.randrange(len(text))], encoding="utf-8")
        return
    values = json.loads(text)
    for _ in range(pick.randint(1, 2)):
        place = values
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = pick.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and pick.random() < 0.7:
                place = place[key]
                continue
            if pick.random() < 0.3:
                del place[key]
            else:
                place[key] = junk(pick)
            break
    file.write_text(json.dumps(values), encoding="utf-8")


def mutate_bytes(file: Path, pick: random.Random, most: int | None = None) -> None:
    """Flip, cut, repeat or insert bytes, among the first `most`."""
    content = bytearray(file.read_bytes())
    size = min(len(content), most or len(content))
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(size)
        how = pick.randrange(4)
        if how == 0:
            content[at] = pick.randrange(256)
        elif how == 1:
            del content[at : at + pick.randint(1, 20)]
        elif how == 2:
            content[at:at] = content[at : at + pick.randint(1, 20)]
        else:
            content[at:at] = bytes(pick.randrange(256) for _ in range(pick.randint(1, 5)))
        size = max(1, min(size, len(content)))
        if not content:
            content = bytearray(b"x")
    file.write_bytes(bytes(content))


def make_model(path: Path) -> None:
    """Save a sound GPT-2 of a few thousand weights with a tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tinygpt2 import TrainTokenizerConfig, train_tokenizer

    text = path.parent / "text.txt"
    text.write_text("the cat sat on the mat and then it ran away, far away. " * 40, encoding="utf-8")
    train_tokenizer(TrainTokenizerConfig(source=[str(text)], vocab_size=270, out=str(path)))
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 270}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(path)


def corpora(folder: Path) -> None:
    """Write small files in every format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"document {number} says naïve 你好.\n"} for number in range(20)]
    files = {
        "a.txt": "".join(row["text"] for row in rows).encode(),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "a.json": json.dumps(rows).encode(),
        "a.csv": b"text,n\n" + b"".join(f'"{row["text"].strip()}",1\n'.encode() for row in rows),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    table = pa.table({"text": [row["text"] for row in rows]})
    pq.write_table(table, folder / "a.parquet")
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)


def case_arguments(number: int, sound: Path, texts: list[Path], work: Path) -> list[str]:
    """Mutate one file for a case, and return the command line that meets it."""
    pick = random.Random(number)
    model, out = work / "model", work / "out"
    kind = number % 4
    if kind < 3:
        shutil.copytree(sound, model)
    if kind == 0:
        mutate_json(model / "config.json", pick)
        return pick.choice([
            ["generate", "--model", str(model), "--prompt", "the cat", "--max-new-tokens", "1"],
            ["verify", str(model)],
            ["truncate-student", "--teacher", str(model), "--num-layers", "1", "--out", str(out)],
        ])  # fmt: skip
    if kind == 1:
        file = pick.choice(sorted(model.glob("*token*.json")))
        mutate_json(file, pick)
        return pick.choice([
            ["generate", "--model", str(model), "--prompt", "the cat", "--max-new-tokens", "1"],
            ["pregenerate", str(texts[0]), "--tokenizer", str(model), "--out", str(out), "--sequence-length", "8"],
        ])  # fmt: skip
    if kind == 2:
        file = model / "model.safetensors"
        header = struct.unpack("<Q", file.read_bytes()[:8])[0]
        mutate_bytes(file, pick, 8 + header)
        return pick.choice([["verify", str(model)], ["generate", "--model", str(model), "--max-new-tokens", "1"]])
    text = work / pick.choice(texts).name
    shutil.copy(next(one for one in texts if one.name == text.name), text)
    mutate_bytes(text, pick)
    errors = pick.choice(["strict", "replace", "skip"])
    return [
        "pregenerate", str(text), "--tokenizer", str(sound), "--out", str(out), "--sequence-length", "8",
        "--encoding-errors", errors,
    ]  # fmt: skip


def run(main: Callable[[list[str]], None], arguments: list[str]) -> tuple[int, str]:
    """Run a command line in this process; return its exit code and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(arguments)
        except SystemExit as exit_:
            return int(exit_.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def work_off(numbers: Iterable[int], folder: Path, results: Connection) -> None:
    """Run cases one after the other in this process, and send each number before and each exit code after its case."""
    from tinygpt2.cli import app

    texts = sorted(file for file in (folder / "texts").iterdir() if file.is_file())
    for number in numbers:
        results.send(number)
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        arguments = case_arguments(number, folder / "sound", texts, work)
        code, printed = run(app.main, arguments)
        results.send((code, f"{' '.join(arguments)}\n{printed[-1500:]}"))


def outcomes(numbers: list[int], folder: Path) -> Iterator[tuple[int, int, str]]:
    """Yield number, exit code and output of each case; if the process dies, its signal, and a new one continues."""
    context = get_context("spawn")
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work_off, args=(numbers, folder, sender))
        process.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while numbers:
                number = receiver.recv()
                numbers = [other for other in numbers if other != number]
                try:
                    code, printed = receiver.recv()
                except EOFError:
                    process.join()
                    yield number, process.exitcode or -1, "the process died"
                    raise
                yield number, code, printed
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="number of cases")
    parser.add_argument("--case", type=int, help="run this case alone, and print its output")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args()
    started, codes, wrong = time.perf_counter(), Counter[int](), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        make_model(folder / "sound")
        corpora(folder / "texts")
        numbers = list(range(options.cases)) if options.case is None else [options.case]
        for number, code, printed in outcomes(numbers, folder):
            codes[code] += 1
            if code not in ALLOWED:
                wrong.append(number)
            if options.case is not None or code not in ALLOWED:
                print(f"case {number}: exit {code}: {printed}", file=sys.stderr)
    report = {
        "cases": sum(codes.values()),
        "exit_codes": {str(code): count for code, count in sorted(codes.items())},
        "wrong": wrong,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(report) if options.json else "\n".join(f"{key}: {value}" for key, value in report.items()))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
