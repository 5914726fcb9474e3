"""Export models in every format and type, and print size, loss, KL and speed of each.

    python benchmarks/export.py MODEL... --data TEXT --json

The figures are those that `tinygpt2 export` reports. Speed needs a quiet machine. Needs tinygpt2[gguf,onnx,llamacpp].
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tinygpt2 import ExportConfig, export
from tinygpt2.config.workflows import TYPES


def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+")
    parser.add_argument("--data", help="text or pregenerated dataset to compare on; by default Python's documentation")
    parser.add_argument("--json", action="store_true", help="in one line")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in options.model:
        for to, types in TYPES.items():
            for kind in types:
                with tempfile.TemporaryDirectory() as folder:
                    out = str(Path(folder) / "out")
                    result = export(ExportConfig(model=model, to=to, type=kind, out=out, data=options.data))
                found = result.checked
                assert found is not None
                rows.append(
                    {
                        "model": Path(model).name, "format": to, "type": kind, "bytes": result.bytes,
                        "loss": found.loss, "float_loss": found.float_loss, "kl": found.kl,
                        "greedy_equal": found.greedy_equal, "engine": found.engine,
                        "tokens_per_second": found.tokens_per_second,
                    }
                )  # fmt: skip
    print(json.dumps(rows, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
