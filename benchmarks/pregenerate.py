"""Measure speed and memory of `pregenerate`, of other ways and of tiktoken alone, and the speed of reading the result.

    python benchmarks/pregenerate.py SOURCE --json

SOURCE is any source that `tinygpt2 pregenerate` accepts. Every variant runs in its own process, one after another, and
this is repeated `--rounds` times. Speeds are medians. The clock starts when the libraries are imported and stops when
the result is on disk. Peak memory is that of the process and its children together, sampled from outside.

Variants:
- `ours_1` and `ours_2`: pregenerate with 1 and 2 workers, from the source to the finished dataset.
- `tinygpt2`: TinyGPT2's way: one `tokenizer(text)` call per document with `dataset.map`, shuffled, split, and packed
  into JSON lines.
- `batched`: batched `dataset.map` with two processes, grouped as in transformers' `run_clm.py`, saved by
  `save_to_disk`.
- `engine`: tiktoken's `encode_ordinary` in one thread, with documents in memory. The result is discarded.

For the last three, the documents are read and decoded before the clock starts. `reader` draws shuffled batches of 8
from the dataset that `ours` made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LENGTH, SEED = 1024, 42
VARIANTS = ("engine", "ours_2", "ours_1", "batched", "tinygpt2")


# --- runs in a variant's own process -------------------------------------------------------------------


def documents(options: argparse.Namespace) -> list[str]:
    from tinygpt2.data.corpus.sources import Corpus, whole

    return [piece.text for piece in whole(Corpus(options.source).pieces())]


def ours(options: argparse.Namespace, workers: int) -> float:
    import datasets  # noqa: F401
    import tiktoken  # noqa: F401
    from transformers import GPT2TokenizerFast  # noqa: F401

    from tinygpt2 import PregenerateConfig, pregenerate
    from tinygpt2.runtime.cpu import keep_memory

    keep_memory()  # as the command line does
    config = PregenerateConfig(
        source=options.source, tokenizer=options.tokenizer, out=str(Path(options.out) / "ours"), sequence_length=LENGTH,
        num_workers=workers, overwrite=True,
    )  # fmt: skip
    started = time.perf_counter()
    pregenerate(config)
    return time.perf_counter() - started


def engine(options: argparse.Namespace) -> float:
    import tiktoken

    from tinygpt2.data.encoding import parsed, reproduce
    from tinygpt2.data.tokenizer import END_OF_TEXT, GPT2_PATTERN, load_tokenizer

    ranks = reproduce(parsed(load_tokenizer(options.tokenizer).backend_tokenizer.to_str()))
    assert ranks, "tiktoken does not reproduce this tokenizer"
    fast = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 1 + max(ranks.values())}
    )
    texts = documents(options)
    started = time.perf_counter()
    for text in texts:
        fast.encode_ordinary(text)
    return time.perf_counter() - started


def tokenizer_of(options: argparse.Namespace) -> Any:
    from tinygpt2.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.model_max_length = 10**9  # as in run_clm.py: long inputs are cut into blocks afterwards
    return tokenizer


def batched(options: argparse.Namespace) -> float:
    import datasets

    datasets.disable_caching()
    table, tokenizer = datasets.Dataset.from_dict({"text": documents(options)}), tokenizer_of(options)

    def group(rows: dict[str, Any]) -> dict[str, Any]:
        joined = {key: [token for row in values for token in row] for key, values in rows.items()}
        total = len(joined["input_ids"]) // LENGTH * LENGTH
        return {key: [values[i : i + LENGTH] for i in range(0, total, LENGTH)] for key, values in joined.items()}

    started = time.perf_counter()
    tokens = table.map(lambda rows: tokenizer(rows["text"]), batched=True, num_proc=2, remove_columns=["text"])
    grouped = tokens.map(group, batched=True, num_proc=2)
    grouped.train_test_split(test_size=0.05, seed=SEED).save_to_disk(str(Path(options.out) / "batched"))
    return time.perf_counter() - started


def tinygpt2(options: argparse.Namespace) -> float:
    import datasets

    datasets.disable_caching()
    table, tokenizer = datasets.Dataset.from_dict({"text": documents(options)}), tokenizer_of(options)
    started = time.perf_counter()
    tokens = table.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    splits = tokens.shuffle(seed=SEED).train_test_split(test_size=0.05)
    for name, split in splits.items():
        with (Path(options.out) / f"{name}_dataset.json").open("w") as file:
            held: dict[str, list[int]] = {"input_ids": [], "attention_mask": []}
            for row in split:
                for key, values in held.items():
                    values.extend(row[key])
            for start in range(0, len(held["input_ids"]) - LENGTH + 1, LENGTH):
                file.write(json.dumps({key: values[start : start + LENGTH] for key, values in held.items()}) + "\n")
    return time.perf_counter() - started


def reader(options: argparse.Namespace) -> float:
    """Return the tokens per second when reading shuffled batches."""
    from tinygpt2.data.batches.order import Shuffle
    from tinygpt2.data.dataset import load_packed_dataset

    blocks = load_packed_dataset(str(Path(options.out) / "ours")).train
    order, batches = Shuffle(len(blocks), SEED), 2000
    started = time.perf_counter()
    for batch in range(batches):
        blocks.batch(order[batch * 8 : batch * 8 + 8])
    return batches * 8 * LENGTH / (time.perf_counter() - started)


def work(options: argparse.Namespace) -> float:
    if options.work.startswith("ours"):
        return ours(options, int(options.work[-1]))
    return {"engine": engine, "batched": batched, "tinygpt2": tinygpt2, "reader": reader}[options.work](options)


# --- runs in the process that measures -----------------------------------------------------------------


def resident(process: Any) -> int:
    """Return the resident memory of a process and its children, in bytes."""
    import psutil

    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def run(variant: str, options: argparse.Namespace, out: str) -> tuple[float, int]:
    """Run a variant in its own process; return the number that it printed, and its peak memory in bytes."""
    import psutil

    command = [
        sys.executable,
        __file__,
        *options.source,
        "--tokenizer",
        options.tokenizer,
        "--work",
        variant,
        "--out",
        out,
    ]
    silent = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "true"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=silent) as process:
        peak, over = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.1):
                try:
                    peak = max(peak, resident(psutil.Process(process.pid)))
                except psutil.NoSuchProcess:
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        answer, talk = process.communicate()
        over.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{variant} failed:\n{talk[-2000:]}")
    return float(answer.splitlines()[-1]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", metavar="SOURCE")
    data = os.environ.get("TINYGPT2_TEST_DATA")
    parser.add_argument("--tokenizer", default=f"{data}/tokenizers/gpt2" if data else "gpt2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help="variants to run, comma-separated, in this order"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of one line per figure")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(work(options))
        return
    size = sum(len(text.encode()) for text in documents(options))
    names = options.variants.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0)
    found: dict[str, Any] = {"source": options.source, "bytes": size, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(options.rounds):
            for name in names:
                took, peak = run(name, options, out)
                seconds[name].append(took)
                memory[name] = max(memory[name], peak)
        for name in names:
            median = statistics.median(seconds[name])
            found[name] = {"mb_per_second": size / 1e6 / median, "seconds": median, "peak_memory_bytes": memory[name]}
        if "ours_2" in names or "ours_1" in names:
            found["reader"] = {"tokens_per_second": run("reader", options, out)[0]}
    for other, factor in (("tinygpt2", 1), ("batched", 1), ("engine", 2)):
        if other in names and "ours_2" in names:
            ratio = found["ours_2"]["mb_per_second"] / found[other]["mb_per_second"] / factor
            found[f"ours_2_over_{'2_' if factor == 2 else ''}{other}"] = ratio
    print(json.dumps(found) if options.json else "\n".join(f"{key}: {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
