"""Check that `ppl --convention lm-eval` gives the same numbers as lm-evaluation-harness. Needs lm-eval.

    nox -s harness -- --json

Measures one model with the harness' own tasks `wikitext` and `lambada_openai` on local texts, and with tinygpt2 on the
same texts. Exits with 1 if the relative difference of any figure is larger than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tinygpt2 import PplConfig, ppl
from tinygpt2.evaluation.detokenize import pages

WIKITEXT = """
task: wikitext
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: !function its.wikitext_detokenizer
process_results: !function its.process_results
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
LAMBADA = """
task: lambada_openai
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def harness(model: str, folder: Path, wikitext: str, lambada: Path) -> dict[str, float]:
    """Run the harness on its own tasks and return the figures by `task/metric`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = "".join(json.dumps({"page": page}) + "\n" for page in pages(wikitext))
    (folder / "pages.jsonl").write_text(rows, encoding="utf-8")
    (folder / "its.py").write_text("from lm_eval.tasks.wikitext.preprocess_wikitext import *\n")
    (folder / "wikitext.yaml").write_text(WIKITEXT.format(file=folder / "pages.jsonl"))
    (folder / "lambada_openai.yaml").write_text(LAMBADA.format(file=lambada))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32", "device": "cpu"},
        tasks=["wikitext", "lambada_openai"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=8,
        bootstrap_iters=0,
    )
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, figures in found["results"].items()
        for metric, value in figures.items()
        if metric.endswith(",none") and isinstance(value, float)
    }


def ours(model: str, folder: Path, wikitext: str, lambada: Path) -> dict[str, float]:
    (folder / "wiki.test.raw").write_text(wikitext, encoding="utf-8")
    found: dict[str, float] = {}
    for task, file in (("wikitext", folder / "wiki.test.raw"), ("lambada", lambada)):
        (row,) = ppl(PplConfig(model=[model], task=[task], task_data=str(file), convention="lm-eval")).results
        if task == "wikitext":
            keys = ("word_perplexity", "byte_perplexity", "bits_per_byte")
            found |= {f"wikitext/{key}": getattr(row, key) for key in keys}
        else:
            found |= {"lambada_openai/perplexity": row.perplexity, "lambada_openai/acc": row.accuracy or 0.0}
    return found


def main() -> None:
    data = Path(os.environ.get("TINYGPT2_TEST_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(data / "models" / "novels-6x256"))
    parser.add_argument("--wikitext", type=Path, default=data / "wikitext-2" / "wiki.test.raw")
    parser.add_argument("--lambada", type=Path, default=data / "lambada" / "lambada_test.jsonl")
    parser.add_argument("--limit", type=int, help="number of documents of each task; all by default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    text = "\n".join(pages(options.wikitext.read_text(encoding="utf-8"))[: options.limit])
    lines = options.lambada.read_text(encoding="utf-8").splitlines(keepends=True)[: options.limit]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "lambada_test.jsonl").write_text("".join(lines), encoding="utf-8")
        own = ours(options.model, folder, text, folder / "lambada_test.jsonl")
        wanted = harness(options.model, folder, text, folder / "lambada_test.jsonl")
    differences = {key: abs(own[key] - wanted[key]) / max(wanted[key], 1e-9) for key in wanted}
    result = {key: {"harness": wanted[key], "ours": own[key], "difference": differences[key]} for key in wanted}
    worst = max(differences.values())
    print(json.dumps({"figures": result, "largest_difference": worst}, indent=None if options.json else 2))
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
