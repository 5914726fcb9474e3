"""Choice tasks beside lm-evaluation-harness: are all sums and accuracies equal, and which is faster? Needs lm-eval.

    nox -s harness                               # agreement
    python benchmarks/choice_tasks.py --json     # speed, with GPT-2 small, both in turns on all cores

The questions are made of a held-out novel in the form of each data set on the Hub, as JSON lines and as Parquet: what
follows a place in the novel is the right answer, and what follows other places are the wrong ones. The harness reads
the same files with its own tasks. Figures are compared in float64, because each side rounds float32 in its own way; how
far both are from that in float32 is also reported. Exits with 1 if a sum differs by more than 1e-6 of its size, or an
accuracy or a standard error differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config
from turns import Worker

from tinygpt2 import PplConfig, ppl
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.evaluation.conventions import ModelTokenizer, tokenize_task
from tinygpt2.evaluation.scoring import Scorer
from tinygpt2.evaluation.tasks import load_tasks
from tinygpt2.models.loading import load_model, model_tokenizer, random_model
from tinygpt2.models.saving import save_model
from tinygpt2.runtime.cpu import fast_products

CLOSE = 1e-6
# the harness' folder of each task, its file there, and its task's name
ITS = {
    "hellaswag": ("hellaswag", "hellaswag.yaml"),
    "arc-easy": ("arc", "arc_easy.yaml"),
    "piqa": ("piqa", "piqa.yaml"),
    "winogrande": ("winogrande", "default.yaml"),
    "openbookqa": ("openbookqa", "openbookqa.yaml"),
    "boolq": ("super_glue/boolq", "default.yaml"),
    "blimp": ("blimp", "_template_yaml"),
}
OWN = """
dataset_path: json
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
"""
LAMBADA = """
dataset_path: json
output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
"""
METRICS = "".join(f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n"
                  for name in ("acc", "acc_norm", "acc_bytes"))  # fmt: skip
SPEED = {"hellaswag": 80, "arc-easy": 20, "boolq": 250, "story": 400}
"""Words in the context of each task of which the speed is measured."""


class Novel:
    """Words of a novel, and questions made of them."""

    def __init__(self, file: Path, seed: int) -> None:
        self.words = file.read_text(encoding="utf-8").split()
        self.pick = random.Random(seed)

    def question(self, context: int, choices: int, most: int = 12) -> tuple[str, list[str], int]:
        """Return a context of so many words, choices of up to `most` words, and the right one."""
        at = [self.pick.randrange(context, len(self.words) - most) for _ in range(choices)]
        right = self.pick.randrange(choices)
        ends = [" ".join(self.words[place : place + self.pick.randint(2, most)]) for place in at]
        return " ".join(self.words[at[right] - context : at[right]]), ends, right

    def row(self, task: str, context: int) -> dict[str, Any]:
        """Return a row of a task in the form that its data set has on the Hub."""
        if task == "hellaswag":
            text, ends, right = self.question(context, 4, 30)
            words = text.split()
            return {"activity_label": "Reading", "ctx_a": " ".join(words[:-2]), "ctx_b": " ".join(words[-2:]),
                    "endings": ends, "label": str(right)}  # fmt: skip
        if task in ("arc-easy", "openbookqa"):
            count = self.pick.randint(3, 5)
            text, ends, right = self.question(context, count)
            labels = list("ABCDE"[:count])
            key = "question" if task == "arc-easy" else "question_stem"
            return {key: text, "choices": {"text": ends, "label": labels}, "answerKey": labels[right]}
        text, ends, right = self.question(context, 4 if task == "story" else 2)
        if task == "story":
            return {"context": text, "choices": [f" {end}" for end in ends], "answer": right}
        if task == "piqa":
            return {"goal": text, "sol1": ends[0], "sol2": ends[1], "label": right}
        if task == "winogrande":
            after = f"{text.replace('_', '')}."
            return {"sentence": f"{ends[0]} _ {after}", "option1": ends[0].split()[0], "option2": ends[1].split()[0],
                    "answer": str(right + 1)}  # fmt: skip
        if task == "boolq":
            return {"passage": text, "question": ends[0].lower(), "label": right}
        return {"sentence_good": f"{ends[right]}.", "sentence_bad": f"{ends[1 - right]}."}


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    """Write rows as JSON lines or, under another name, as Parquet."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def its_task(task: str, file: Path, folder: Path) -> str:
    """Write the harness' own task for a file of ours, and return its name."""
    import lm_eval

    name = re.sub(r"\W", "_", f"{task}_{file.suffix[1:]}")
    here = folder / name
    if task in ITS:
        there, template = ITS[task]
        shutil.copytree(Path(lm_eval.__file__).parent / "tasks" / there, here)
        text = (here / template).read_text(encoding="utf-8")
        for other in [*here.rglob("*.yaml"), here / template]:
            other.unlink(missing_ok=True)
        text = re.sub(
            r"(?m)^(task|tag|dataset_path|dataset_name|include|  - super.*|  - ai2.*|  - multiple.*)\b.*\n", "", text
        )
        text = re.sub(r"(?ms)^(tag:.*?|metric_list:.*?)(?=^\w)", "", text)
    else:
        here.mkdir()
        text = LAMBADA if task == "lambada" else OWN
        text = text.replace("dataset_path: json\n", "")
    kind = "json" if file.suffix == ".jsonl" else "parquet"
    data = ", ".join(f"{split}: {file}" for split in ("train", "validation", "test"))
    metrics = "  - {metric: acc, aggregation: mean, higher_is_better: true}\n" if task == "lambada" else METRICS
    head = f"task: {name}\ndataset_path: {kind}\ndataset_kwargs: {{data_files: {{{data}}}}}\nmetric_list:\n{metrics}"
    (here / f"{name}.yaml").write_text(head + text, encoding="utf-8")
    return name


class Harness:
    """lm-evaluation-harness with a model."""

    def __init__(self, model: str, folder: Path, batch_size: int, dtype: str = "float32") -> None:
        from lm_eval.models.huggingface import HFLM

        self.folder = folder
        self.model = HFLM(pretrained=model, dtype=dtype, softmax_dtype=dtype, device="cpu", batch_size=batch_size)

    def __call__(self, name: str) -> tuple[list[list[float]], dict[str, float]]:
        """Return the sum of every candidate of every question, and the accuracies."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        found = simple_evaluate(
            model=self.model,
            tasks=[name],
            task_manager=TaskManager(include_path=str(self.folder), include_defaults=False),
            bootstrap_iters=2,  # with none there are no standard errors, also of means
        )
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        sums = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
        figures = {key.removesuffix(",none"): value for key, value in found["results"][name].items()}
        return sums, {key: value for key, value in figures.items() if key.startswith("acc")}


def asked_of_us(task: str, file: Path) -> dict[str, Any]:
    """Return the options of `ppl` for a file."""
    return {"task": [f"choice:{file}"]} if task == "story" else {"task": [task], "task_data": str(file)}


def our_sums(model: str, task: str, file: Path, *, exact: bool) -> list[list[float]]:
    """Return the sum of every candidate of every question."""
    options = asked_of_us(task, file)
    (found,) = load_tasks(options["task"], options.get("task_data"))
    loaded, directory = load_model(model)
    tokenized = tokenize_task(found, ModelTokenizer(model, loaded.config, model_tokenizer(directory)), "hf", None)
    candidates = tokenized.candidates if len(tokenized.candidates) else None
    with fast_products():
        scorer = Scorer(loaded, "fp32", torch.device("cpu"))
        if exact:
            scorer.model.double()
            scorer.head = scorer.head.double()
        sums = -scorer(tokenized.tokens, tokenized.spans, 2048, candidates=candidates).sums
    counts = np.ones(len(sums), int) if candidates is None else candidates
    return [part.tolist() for part in np.split(sums, np.cumsum(counts)[:-1])]


def difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Return the largest difference of two sums of a candidate, as a share of its size."""
    pairs = [pair for one in zip(ours, theirs, strict=True) for pair in zip(*one, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def agreement(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare every sum and every accuracy on every task and form of file."""
    novel, result = Novel(options.novel, 1), {}
    exact, short = (Harness(model, folder, 8, dtype) for dtype in ("float64", "float32"))
    files: list[tuple[str, Path]] = []
    for task in [*ITS, "story"]:
        rows = [novel.row(task, {"boolq": 120, "story": 150}.get(task, 15)) for _ in range(options.questions)]
        forms = ("jsonl",) if task == "story" else ("jsonl", "parquet")
        files += [(task, write(rows, folder / f"{task}.{form}")) for form in forms]
    passages = options.lambada.read_text(encoding="utf-8").splitlines(keepends=True)[: options.passages]
    (folder / "lambada.jsonl").write_text("".join(passages), encoding="utf-8")
    for task, file in [*files, ("lambada", folder / "lambada.jsonl")]:
        name = its_task(task, file, folder)
        theirs, figures = exact(name)
        (row,) = ppl(PplConfig(model=[model], **asked_of_us(task, file))).results
        keys = {"acc": "accuracy", "acc_norm": "accuracy_norm", "acc_bytes": "accuracy_bytes"}
        keys |= {f"{its}_stderr": f"{own}_stderr" for its, own in keys.items()}
        own = {its: getattr(row, mine) for its, mine in keys.items() if its in figures}
        result[file.name] = {
            "sums": sum(map(len, theirs)),
            "largest_difference": difference(our_sums(model, task, file, exact=True), theirs),
            "ours_in_float32": difference(our_sums(model, task, file, exact=False), theirs),
            "harness_in_float32": difference(short(name)[0], theirs),
            "figures": {its: [value, figures[its]] for its, value in own.items() if value is not None},
        }
    return result


def worker(options: argparse.Namespace) -> None:
    """Measure one side's time for a file, once for every line of the standard input."""
    task, file, folder = options.worker[1], Path(options.worker[2]), Path(options.worker[3])
    run: Callable[[], Any]
    if options.worker[0] == "harness":
        harness, name = Harness(options.model, folder, options.batch_size), its_task(task, file, folder)
        run = lambda: harness(name)  # noqa: E731
    else:
        run = lambda: ppl(PplConfig(model=[options.model], **asked_of_us(task, file)))  # noqa: E731
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


def speed(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turns; the first turn of each does not count."""
    novel, result = Novel(options.novel, 2), {}
    for task, words in SPEED.items():
        file = write([novel.row(task, words) for _ in range(options.questions)], folder / f"{task}.jsonl")
        shared = ["--model", model, "--batch-size", str(options.batch_size), "--worker"]
        sides = {}
        for side in ("harness", "ours"):
            (folder / side / task).mkdir(parents=True)
            sides[side] = Worker(__file__, [*shared, side, task, str(file), str(folder / side / task)])
        for _ in range(options.turns + 1):
            for one in sides.values():
                one.turn()
        for one in sides.values():
            one.end()
        seconds = {side: [turn["seconds"] for turn in one.turns[1:]] for side, one in sides.items()}
        ratios = [a / b for a, b in zip(seconds["harness"], seconds["ours"], strict=True)]
        result[task] = {"questions": options.questions, "context_words": words, "seconds": seconds,
                        "times_as_fast": statistics.median(ratios)}  # fmt: skip
    return result


def gpt2_small(folder: Path, tokenizer: Path) -> str:
    """Save a GPT-2 small with random weights: the time does not depend on the weights."""
    save_model(random_model(GPT2Config(), 0), folder / "gpt2-small", load_tokenizer(str(tokenizer)), "# random\n")
    return str(folder / "gpt2-small")


def main() -> None:
    data = Path(os.environ.get("TINYGPT2_TEST_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agreement", action="store_true", help="compare figures instead of times")
    parser.add_argument(
        "--model", help="a directory; default: novels-6x256 for figures, a random GPT-2 small for times"
    )
    parser.add_argument("--novel", type=Path, default=data / "corpus" / "novels-valid" / "Doyle_Hound_1902.txt")
    parser.add_argument("--lambada", type=Path, default=data / "lambada" / "lambada_test.jsonl")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.agreement:
            result = agreement(options.model or str(data / "models" / "novels-6x256"), folder, options)
        else:
            result = speed(options.model or gpt2_small(folder, data / "tokenizers" / "gpt2"), folder, options)
    print(json.dumps(result, indent=None if options.json else 2))
    if options.agreement:
        worst = max(one["largest_difference"] for one in result.values())
        unequal = any(abs(a - b) > CLOSE for one in result.values() for a, b in one["figures"].values())
        sys.exit(worst > CLOSE or unequal)


if __name__ == "__main__":
    main()
