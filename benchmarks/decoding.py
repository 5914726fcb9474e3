"""Measure greedy decoding beside transformers' generate, in turns, and beside onnxruntime where it is installed.

    python benchmarks/decoding.py --json
    python benchmarks/decoding.py --models quickstart,novels-6x256 --turns 5 --json

The models have random weights, which are as fast as trained ones: quickstart's student, novels-6x256, 4 layers of 312
with GPT-2's vocabulary, and GPT-2 small. The figures are those of `tinygpt2 bench`: tokens/s with float32, bf16 and
int8 weights for one text and for eight, the share of the memory bandwidth, and transformers' tokens/s with float32
weights. `ratio` is our tokens/s divided by transformers'. `bytes_per_second` is what the weights take of the
bandwidth. onnxruntime decodes one text, in float32 and int8, right after the model's other figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from tinygpt2 import BenchConfig, bench
from tinygpt2.models.loading import random_model

SHAPES: dict[str, dict[str, int]] = {
    "quickstart": {"n_layer": 1, "n_embd": 160, "n_head": 5, "vocab_size": 2048, "n_positions": 128},
    "novels-6x256": {"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 8192, "n_positions": 256},
    "4x312": {"n_layer": 4, "n_embd": 312, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
}


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model."""
    model = random_model(GPT2Config(**SHAPES[name], bos_token_id=None, eos_token_id=None), 0).eval()
    path = folder / name
    model.save_pretrained(path)
    how = {"new_tokens": options.new_tokens, "prompt_tokens": options.prompt_tokens, "turns": options.turns}
    found = bench(BenchConfig(model=[str(path)], **how))
    rows = [
        {
            "precision": row.precision,
            "batch": row.batch,
            "first_token_seconds": row.first_token_seconds,
            "tokens_per_second": row.tokens_per_second,
            "transformers_tokens_per_second": row.transformers_tokens_per_second,
            "ratio": row.tokens_per_second / row.transformers_tokens_per_second,
            "bytes_per_token": row.bytes_per_token,
            "bytes_per_second": row.bandwidth_share * found.bandwidth,
            "bandwidth_share": row.bandwidth_share,
        }
        for row in found.results
    ]
    return {"model": name, "bandwidth": found.bandwidth, "rows": rows, "onnxruntime": onnx(path, options)}


def onnx(path: Path, options: argparse.Namespace) -> dict[str, float] | None:
    """Return the tokens/s of onnxruntime by the type of the weights; None if it is not installed."""
    if not (find_spec("onnx") and find_spec("onnxruntime")):
        return None
    from tinygpt2 import ExportConfig, export
    from tinygpt2.exporting.engines import OnnxEngine
    from tinygpt2.exporting.onnx_folder import onnx_file

    prompt = torch.randint(0, 2048, (options.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    speeds = {}
    for kind in ("f32", "int8"):
        out = path.with_name(f"{path.name}-{kind}")
        export(ExportConfig(model=str(path), out=str(out), to="onnx", type=kind, check=False))
        engine = OnnxEngine(onnx_file(out)[0])
        speeds[kind] = max(engine.greedy(prompt, options.new_tokens)[1] for _ in range(options.turns + 1))
        engine.close()
    return speeds


def show(found: dict[str, Any]) -> None:
    """Print the figures of one model as lines."""
    print(f"{found['model']}, memory bandwidth {found['bandwidth'] / 1e9:.1f} GB/s")
    for row in found["rows"]:
        print(
            f"  {row['precision']:5} batch {row['batch']}  {row['tokens_per_second']:8,.1f} tokens/s  "
            f"{row['ratio']:5.2f} times transformers' {row['transformers_tokens_per_second']:8,.1f}  "
            f"{row['bytes_per_second'] / 1e9:5.1f} GB/s, {row['bandwidth_share']:.0%} of the bandwidth"
        )
    for kind, speed in (found["onnxruntime"] or {}).items():
        print(f"  onnxruntime {kind}  {speed:8,.1f} tokens/s")


def main() -> None:
    """Measure every model, and print lines or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            results.append(measure(name, Path(folder), options))
            if not options.json:
                show(results[-1])
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
