"""Measure greedy decoding: our loop, transformers' generate and onnxruntime, in turns, for four sizes of GPT-2.

    python benchmarks/decoding.py --json
    python benchmarks/decoding.py --models novels-6x256 --turns 5

Every row is what `tinygpt2 bench` measures: tokens/s, the bytes that a token reads, and the share of the machine's
memory bandwidth. The model of 6 layers of 256 is models/novels-6x256 of the folder that TINYGPT2_TEST_DATA names; the
others have random weights, because a speed does not depend on them. `ratio` is tokens/s divided by transformers' with
float32 weights. `onnxruntime` is float32 at batch 1, with onnx and onnxruntime installed. A few minutes, and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from tinygpt2 import BenchConfig, ExportConfig, bench, export
from tinygpt2.models.loading import load_model, random_model
from tinygpt2.models.saving import save_model
from tinygpt2.runtime.threads import enough_threads

SHAPES: dict[str, dict[str, int] | None] = {
    "quickstart": {"n_layer": 1, "n_embd": 160, "n_head": 5, "n_positions": 128, "vocab_size": 2048},
    "novels-6x256": None,
    "4x312": {"n_layer": 4, "n_embd": 312, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
}
"""Shapes by name; None is a trained model of the test data."""


def prepare(name: str, folder: Path) -> str:
    """Return the directory of a model."""
    shape = SHAPES[name]
    if shape is None:
        return str(Path(os.environ["TINYGPT2_TEST_DATA"]) / "models" / name)
    model = random_model(GPT2Config(**shape, bos_token_id=0, eos_token_id=0), 1)
    save_model(model.eval(), folder / name, None, f"# {name}\n")
    return str(folder / name)


def onnxruntime_speed(model: str, folder: Path, options: argparse.Namespace) -> float | None:
    """Return the best tokens/s of the model's ONNX graph at batch 1; None without onnxruntime."""
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return None
    from tinygpt2.exporting.engines import OnnxEngine

    export(ExportConfig(model=model, to="onnx", out=str(folder / "onnx"), check=False, overwrite=True))
    config = load_model(model)[0].config
    prompt = list(range(1, 1 + min(options.prompt_tokens, config.n_positions - 1)))
    count = min(options.new_tokens, config.n_positions - len(prompt))
    engine = OnnxEngine(folder / "onnx" / "onnx" / "model.onnx")
    times = []
    for _ in range(options.turns + 1):
        started = time.perf_counter()
        engine.greedy(prompt, count)
        times.append(time.perf_counter() - started)
    engine.close()
    return count / min(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES), help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="in one line")
    options = parser.parse_args()
    result: dict[str, Any] = {"models": {}}
    with tempfile.TemporaryDirectory() as name:
        for one in options.models.split(","):
            model = prepare(one, Path(name))
            sizes = {key: getattr(options, key) for key in ("new_tokens", "prompt_tokens", "turns")}
            found = bench(BenchConfig(model=[model], **sizes))
            rows = [asdict(row) | {"ratio": row.tokens_per_second / row.transformers_tokens_per_second} for row in
                    found.results]  # fmt: skip
            with enough_threads(2.0 * found.results[0].bytes_per_token / 4):  # as many threads as the loop takes
                other = onnxruntime_speed(model, Path(name), options)
            result["bandwidth"] = found.bandwidth
            result["models"][one] = {"onnxruntime_tokens_per_second": other, "rows": rows}
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
