"""Make a tiny student, export it for the page, and note its greedy texts: what `nox -s browser` compares with.

python examples/browser/make_student.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import yaml
from transformers import AutoTokenizer

import tinygpt2
from tinygpt2.exporting.engines import OnnxEngine
from tinygpt2.exporting.onnx_folder import onnx_file

SHAPE = {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 128}
PROMPTS = ["The value of", "If the file", "a list (or a tuple),", "Grüße, 世界"]
TOKENS = 40


def make_student(out: Path) -> str:
    """Train a teacher of two layers for a minute, and distil it into one layer; return the student's directory."""
    source = out / "topics.txt"  # Python's own help, without line ends: a tiny model would write nothing else
    source.write_text("\n".join(" ".join(text.split()) for text in topics.values()), encoding="utf-8")
    tokenizer = tinygpt2.train_tokenizer(
        tinygpt2.TrainTokenizerConfig(source=[str(source)], vocab_size=2048, out=f"{out}/tokenizer")
    ).tokenizer
    data = f"{out}/data"
    tinygpt2.pregenerate(
        tinygpt2.PregenerateConfig(source=[str(source)], tokenizer=tokenizer, sequence_length=128, out=data)
    )
    shape = out / "shape.yaml"
    shape.write_text(yaml.safe_dump(SHAPE), encoding="utf-8")
    teacher = tinygpt2.pretrain(
        tinygpt2.PretrainConfig(
            model_config=str(shape),
            data=data,
            out=f"{out}/teacher",
            max_steps=400,
            optimizer="muon",
            learning_rate=1e-2,
        )
    ).model
    cut = tinygpt2.truncate_student(
        tinygpt2.TruncateStudentConfig(teacher=teacher, num_layers=1, out=f"{out}/cut")
    ).model
    return tinygpt2.distill(
        tinygpt2.DistillConfig(teacher=teacher, student=cut, data=data, out=f"{out}/student", max_steps=100)
    ).model


def onnxruntime_texts(folder: Path) -> list[str]:
    """Continue the prompts by onnxruntime."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    engine = OnnxEngine(onnx_file(folder)[0])
    return [tokenizer.decode(engine.greedy(tokenizer(prompt)["input_ids"], TOKENS)[0]) for prompt in PROMPTS]


def main(out: Path) -> None:
    """Make everything below `out`; the file expected.json says what to expect of the exported folders."""
    out.mkdir(parents=True)
    student = make_student(out)
    for kind in ("f32", "int8"):
        tinygpt2.export(tinygpt2.ExportConfig(model=student, to="onnx", type=kind, out=f"{out}/{kind}", check=False))
    whole = tinygpt2.generate(tinygpt2.GenerateConfig(model=[student], prompt=PROMPTS, max_new_tokens=TOKENS)).results
    f32, int8 = str(out / "f32"), str(out / "int8")
    texts = {f32: [one.text for one in whole], int8: onnxruntime_texts(Path(int8))}
    expected = {"tokens": TOKENS, "prompts": PROMPTS, "node": [f32, int8], "page": int8, "texts": texts}
    (out / "expected.json").write_text(json.dumps(expected, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
