"""Evaluation texts in every form of file: the figures are those of the original text."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evaluation.test_conventions import WIKI, cbt
from tinygpt2 import PplConfig, ppl
from tinygpt2.config.data import FileOptions
from tinygpt2.errors import DataError
from tinygpt2.evaluation import tasks
from tinygpt2.evaluation.tasks import Task, load_tasks

# The Hub's rows: one for each line with its line end, and an empty text for a blank line
ROWS = [line if line.strip() else "" for line in WIKI.splitlines(keepends=True)]
COPY = "test-00000-of-00001.parquet"


def parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def load(name: str, data: Path | None = None, **options: object) -> Task:
    (task,) = load_tasks([name], data and str(data), FileOptions(**options))
    return task


def test_the_hub_s_parquet_of_a_named_task_is_the_original_text(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(WIKI, encoding="utf-8")
    original = load("wikitext", tmp_path / "wiki.test.raw")
    alone = parquet(tmp_path / "alone" / COPY, text=ROWS)
    parquet(tmp_path / "hub" / "wikitext-2-raw-v1" / COPY, text=ROWS)
    parquet(tmp_path / "hub" / "wikitext-103-v1" / COPY, text=["no"])
    parquet(tmp_path / "hub" / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet", text=["no"])
    parquet(tmp_path / "two" / "data" / "test-00000-of-00002.parquet", text=ROWS[:4])
    parquet(tmp_path / "two" / "data" / "test-00001-of-00002.parquet", text=ROWS[4:])
    for data in (alone, alone.parent, tmp_path / "hub", tmp_path / "hub" / "wikitext-2-raw-v1", tmp_path / "two"):
        task = load("wikitext", data)
        assert (task.text, task.joined()) == (WIKI, original.joined()), data
    with pytest.raises(DataError, match="no file named"):  # the folder's text could be that of either task
        load_tasks(["wikitext", "lambada"], str(alone.parent))
    figures = [
        ppl(PplConfig(model=[str(teacher)], task=["wikitext"], task_data=str(data), convention=convention)).results[0]
        for data in (tmp_path / "wiki.test.raw", alone)
        for convention in ("hf", "lm-eval")
    ]
    assert figures[0].perplexity == figures[2].perplexity
    assert figures[1].perplexity == figures[3].perplexity


def test_other_tasks_of_the_hub(tmp_path: Path) -> None:
    assert load("ptb", parquet(tmp_path / "p.parquet", sentence=["a b", "c"])).text == " a b \n c \n"
    assert load("text8", parquet(tmp_path / "t.parquet", text=["a b", " c"])).text == "a b c"
    assert load("lambada", parquet(tmp_path / "l.parquet", text=["a b", "c d"])).passages == ("a b", "c d")
    other = parquet(tmp_path / "o.parquet", body=["a b"])
    assert load("lambada", other, text_column="body").passages == ("a b",)
    text, _ = cbt(3)
    (tmp_path / "cbt.txt").write_text(text, encoding="utf-8")
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    columns = {
        "sentences": [[line[2:] for line in lines[:-1]] for lines in blocks],
        "question": [lines[-1].split("\t")[0][2:] for lines in blocks],
        "answer": [lines[-1].split("\t")[1] for lines in blocks],
        "options": [lines[-1].split("\t")[-1].split("|") for lines in blocks],
    }
    rows = parquet(tmp_path / "CN" / COPY, **columns)
    assert load("cbt-cn", rows).questions == load("cbt-cn", tmp_path / "cbt.txt").questions
    assert load("cbt-cn", tmp_path).questions == load("cbt-cn", rows).questions
    with pytest.raises(DataError, match=r"row 1: expected the columns sentences, .* \(found: body\)"):
        load("cbt-cn", other)
    rows.write_bytes(rows.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        load("cbt-cn", rows)


@pytest.mark.parametrize("name", ["lambada_test.jsonl", "lambada_test.txt", "lambada_test_en.jsonl.gz"])
def test_passages_as_json_lines(tmp_path: Path, name: str) -> None:
    raw = b'{"text": "the cat sat"}\n{"text": "a\\nb c"}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert load("lambada", tmp_path).passages == ("the cat sat", "a\nb c")
    (tmp_path / name).write_bytes(b'{"text": "the cat sat"}\n{"text": "one"}\n')
    with pytest.raises(DataError, match="row 2: expected a passage of at least two words"):
        load("lambada", tmp_path)


def test_the_archives_that_the_tasks_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "wikitext-2-raw-v1.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{part}.raw", WIKI if part == "test" else part)
    assert load("wikitext", tmp_path / "wikitext-2-raw-v1.zip").text == WIKI
    with tarfile.open(tmp_path / "CBTest.tgz", "w:gz") as packed:
        for name, raw in (("cbtest_CN_train.txt", b"no"), ("cbtest_CN_test_2500ex.txt", cbt(2)[0].encode())):
            member = tarfile.TarInfo(f"CBTest/data/{name}")
            member.size = len(raw)
            packed.addfile(member, io.BytesIO(raw))
    assert len(load("cbt-cn", tmp_path / "CBTest.tgz").questions) == 2
    with zipfile.ZipFile(tmp_path / "text8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", "a" * 60 + "é" * 20)
    assert load("text8", tmp_path).text == "a" * 60 + "é" * 20
    monkeypatch.setattr(tasks, "_WHOLE", 100)
    monkeypatch.setattr(tasks, "_TEST", 5)  # the cut splits a character
    assert load("text8", tmp_path).text == "éé"


FILES = {
    "a.jsonl": b'{"id": 1, "text": "the cat sat"}\n{"text": null}\n{"text": "on the mat\\n"}\n',
    "b.jsonl.gz": gzip.compress(b'{"text": "the cat sat"}\n{"text": "on the mat\\n"}\n'),
    "c_00": b'{"text": "the cat sat"}\n{"text": "on the mat\\n"}\n',
    "d.csv": b'\xef\xbb\xbfid,text\n1,the cat sat\n2,\n3,"on the mat\n"\n',
    "e.json": json.dumps(["the cat sat", "on the mat\n"]).encode(),
    "f.txt": b"\xef\xbb\xbfthe cat sat\n\non the mat\n",
    "g.txt.gz": gzip.compress(b"the cat sat\n\non the mat\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_rows_is_its_texts_with_empty_lines_between(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tasks, "say", said.append)
    (tmp_path / name).write_bytes(FILES[name])
    task = load(str(tmp_path / name))
    assert (task.text, task.joined()) == ("the cat sat\n\non the mat\n",) * 2
    assert said == (
        [] if ".txt" in name else [f"{tmp_path / name}: 2 texts, measured as one with an empty line between them"]
    )


def test_options_of_ppl_say_how_a_file_is_read(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "a.dat").write_text('{"body": "the cat sat on the mat"}\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text("the cat sat on the mat", encoding="utf-8")
    a, b = (str(tmp_path / name) for name in ("a.dat", "b.txt"))
    rows = ppl(PplConfig(model=[str(teacher)], task=[a], text_column="body")).results
    rows += ppl(PplConfig(model=[str(teacher)], task=[b])).results
    assert rows[0].perplexity == rows[1].perplexity
    assert load(a, input_format="text").text.startswith('{"body"')
    with pytest.raises(DataError, match="no text in field 'text'"):
        load(a)
    (tmp_path / "c.txt").write_bytes("the cat".encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16"):
        load(str(tmp_path / "c.txt"))
