"""With --document-mask, no token sees the documents before its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import make_model, sentences
from tests.objectives.test_objectives import RUN
from tinygpt2 import (
    ConfigError,
    DistillConfig,
    PregenerateConfig,
    PretrainConfig,
    distill,
    pregenerate,
    pretrain,
)
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.models.activations import collect_activations
from tinygpt2.models.documents import Documents, without_last
from tinygpt2.models.loading import load_model
from tinygpt2.models.teachers.loading import load_teacher
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.step import Step

LENGTHS = [[3, 9, 1, 7], [20], [1, 1, 18], [10, 10]]


@pytest.fixture(scope="module")
def short(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of a few words, each a document, in blocks of 32 tokens."""
    folder = tmp_path_factory.mktemp("short")
    lines = [sentences(1, seed)[: 5 + 4 * (seed % 9)] for seed in range(120)]
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    pregenerate(PregenerateConfig(
        source=str(folder / "lines.txt"), tokenizer=str(tokenizer_dir), out=str(folder / "d"), document="line",
        sequence_length=32, test_fraction=0.2,
    ))  # fmt: skip
    return folder / "d"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_document_is_read_as_if_it_were_alone(teacher: Path, dtype: torch.dtype) -> None:
    model = load_model(str(teacher))[0].eval().to(dtype)
    ids = torch.randint(0, 320, (len(LENGTHS), 20), generator=torch.Generator().manual_seed(1))
    close = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 0.1}
    with torch.no_grad():
        found = collect_activations(model, ids, range(5), documents=Documents(LENGTHS, ids.device)).states
        for row, lengths in enumerate(LENGTHS):
            place = 0
            for length in lengths:
                part = slice(place, place + length)
                own = model(ids[row : row + 1, part], output_hidden_states=True).hidden_states
                for number, state in enumerate(own):
                    torch.testing.assert_close(found[number][row, part], state[0], **close)
                place += length


def test_the_last_token_leaves_its_document() -> None:
    assert without_last([[3, 1], [4], [1, 2]]) == [[3], [3], [1, 1]]


def test_blocks_are_divided_after_the_end_of_text(short: Path, tokenizer_dir: Path) -> None:
    end = load_tokenizer(str(tokenizer_dir)).eos_token_id
    blocks = load_packed_dataset(str(short)).train
    assert blocks.batch([0]).documents is None
    divided = blocks.ending(end)
    batch = divided.spaced(5).batch(range(5))
    for ids, counted, lengths in zip(batch.input_ids.tolist(), batch.counted, batch.documents, strict=True):
        assert sum(lengths) == 32
        first = [0]
        for place, token in enumerate(ids[:-1]):
            if token == end:
                first.append(place + 1)
        assert [sum(lengths[:number]) for number in range(len(lengths))] == first
        assert [place for place in range(32) if not counted[place]] == first
    assert divided.targets([0, 1]) == [32 - len(one) for one in divided.batch([0, 1]).documents]


def test_a_teacher_of_another_architecture_reads_documents_apart(
    short: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    data = load_packed_dataset(str(short))
    shape = GPTNeoXConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(shape).save_pretrained(tmp_path / "neox")
    data.tokenizer().save_pretrained(tmp_path / "neox")
    teacher, _ = load_teacher(str(tmp_path / "neox"), data, torch.float32)
    ids = torch.randint(0, 320, (len(LENGTHS), 20), generator=torch.Generator().manual_seed(1))
    found = teacher.collect(ids, [1, 2], documents=Documents(LENGTHS, ids.device)).states
    for row, lengths in enumerate(LENGTHS):
        place = 0
        for length in lengths:
            part = slice(place, place + length)
            own = teacher.collect(ids[row : row + 1, part], [1, 2]).states
            for number in (1, 2):
                torch.testing.assert_close(found[number][row, part], own[number][0], rtol=1e-4, atol=1e-5)
            place += length


def test_training_with_a_document_mask(short: Path, teacher: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    student = make_model(tmp_path / "s", tokenizer_dir, n_layer=1, n_embd=16, n_head=2, seed=4)
    options = {
        "data": str(short), "document_mask": True, "max_steps": 3, "micro_batch_size": 4, "log_every": 1, "dropout": 0.0,
        "learning_rate": 0.01,
    }  # fmt: skip
    made = pretrain(PretrainConfig(model=str(student), out=str(tmp_path / "p"), **options))
    rows = [json.loads(line) for line in (tmp_path / "p" / "metrics.jsonl").read_text().splitlines()]
    assert made.eval.loss < rows[0]["before/loss"]
    data = load_packed_dataset(str(short))
    step = Step(load_model(str(student))[0].eval(), None, LossWeights(), RUN).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(data.test)):
            batch, place = data.test.ending(0).batch([index]), 0
            for length in batch.documents[0]:
                part = batch.input_ids[:, place : place + length]
                total += float(step(part)[0].double().sum()) if length > 1 else 0.0
                count, place = count + length - 1, place + length
    assert rows[0]["before/loss"] == pytest.approx(total / count, rel=1e-5)
    distill(DistillConfig(teacher=str(teacher), student=str(teacher), out=str(tmp_path / "d"), **options))
    rows = [json.loads(line) for line in (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()]
    assert next(row["loss"] for row in rows if row["step"] == 1) == pytest.approx(0, abs=1e-5)


def test_what_does_not_fit_is_refused(
    short: Path, teacher: Path, tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    options = {"document_mask": True, "max_steps": 1, "out": str(tmp_path / "o")}
    both = {"teacher": str(teacher), "student": str(teacher), "data": str(short)}
    with pytest.raises(ConfigError, match="--document-mask does not fit --attention-weight"):
        distill(DistillConfig(**both, **options, attention_weight=1.0))
    with pytest.raises(ConfigError, match="--document-mask does not fit --teacher-cache"):
        distill(DistillConfig(**both, **options, teacher_cache=str(tmp_path / "c")))
    pregenerate(PregenerateConfig(
        source=str(corpus), tokenizer=str(tokenizer_dir), out=str(tmp_path / "endless"), sequence_length=32, append_eos=False,
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="do not end with an end-of-text token"):
        pretrain(PretrainConfig(model=str(teacher), data=str(tmp_path / "endless"), **options))
