"""Packing against a naive reference; splits, bytes that repeat, nothing half-written."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import full_disk
from tests.data.test_tokenizer import legacy_layout
from tinygpt2 import PregenerateConfig, pregenerate
from tinygpt2.data import block_writers, external_sort
from tinygpt2.data import pregenerate as pregenerate_module
from tinygpt2.data.block_writers import SplitWriter
from tinygpt2.data.corpus import sources as corpus_module
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.encoding import encode
from tinygpt2.data.pregenerate import PregenerateResult
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.data.validation import check_dataset
from tinygpt2.errors import ConfigError, DataError, MachineError, UnreadableError


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=8), st.integers(1, 12), st.integers(1, 12), st.sampled_from(["arrow", "hdf5"])
)
def test_blocks_of_a_stream_in_pieces(sizes: list[int], length: int, stride: int, kind: str) -> None:
    stride = min(stride, length)
    stream = np.arange(1, sum(sizes) + 1, dtype=np.uint16)
    with TemporaryDirectory() as folder:
        with SplitWriter(Path(folder), "train", length, stride, stream.dtype, kind) as writer:
            for piece in np.split(stream, np.cumsum(sizes)[:-1]) if sizes else []:
                writer.add(piece)
        expected = [stream[i : i + length].tolist() for i in range(0, len(stream) - length + 1, stride)]
        if kind == "hdf5":
            covered = (len(expected) - 1) * stride + length if expected else 0
            if covered < len(stream):
                rest = stream[len(expected) * stride :].tolist()
                assert writer.padding == length - len(rest)
                expected.append(rest + [0] * writer.padding)
            with h5py.File(Path(folder) / "train/data-00000.h5") as file:
                ids, mask = file["input_ids"][:], file["input_mask"][:]
            assert (ids.dtype, mask.dtype) == (np.int32, np.int32)
            assert mask.sum() == writer.padding == mask[-1:, length - writer.padding :].sum()
        else:
            ids = np.array(datasets.load_from_disk(f"{folder}/train")["input_ids"][:])
        assert ids.tolist() == expected
        assert writer.sequences == len(expected)
        assert writer.dropped == (
            0 if kind == "hdf5" else len(stream) - ((len(expected) - 1) * stride + length if expected else 0)
        )


def pack(out: Path, source: object, tokenizer: Path, **options: object) -> tuple[datasets.DatasetDict, dict]:
    run(out, source, tokenizer, **options)
    return datasets.load_from_disk(str(out)), json.loads((out / "pregenerate.json").read_text())


def run(out: Path, source: object, tokenizer: Path, **options: object) -> PregenerateResult:
    return pregenerate(PregenerateConfig(source=str(source), tokenizer=str(tokenizer), out=str(out), **options))


def flat(split: datasets.Dataset) -> list[int]:
    return [token for row in split["input_ids"] for token in row]


def by_document(split: datasets.Dataset, eos: int) -> list[tuple[int, ...]]:
    """Cut a split's stream at the ends of documents; the last one may be cut off."""
    found, held = [], []
    for token in flat(split):
        held.append(token)
        if token == eos:
            found.append(tuple(held))
            held = []
    return [*found, tuple(held)] if held else found


def test_documents_go_whole_into_one_split_and_are_shuffled(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    packed, manifest = pack(tmp_path / "d", corpus, tokenizer_dir, sequence_length=16, test_fraction=0.2)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    texts = [file.read_text(encoding="utf-8") for file in sorted(corpus.iterdir())]
    encoded = [(*ids, tokenizer.eos_token_id) for ids in encode(tokenizer, texts)]
    assert manifest["split"] == "document"
    assert manifest["splits"]["test"]["documents"] == round(0.2 * len(texts))
    assert packed["train"].features["input_ids"] == datasets.List(datasets.Value("uint16"), length=16)
    order = []
    for name in ("train", "test"):
        counts, whole = manifest["splits"][name], by_document(packed[name], tokenizer.eos_token_id)
        assert len(flat(packed[name])) == 16 * counts["sequences"] == counts["tokens"] - counts["dropped_tokens"]
        assert 0 <= counts["dropped_tokens"] < 16
        numbers = [next(n for n, ids in enumerate(encoded) if ids[: len(found)] == found) for found in whole]
        assert len(numbers) == counts["documents"]
        assert numbers != sorted(numbers)
        assert counts["tokens"] == sum(len(encoded[number]) for number in numbers)
        order += numbers
    assert sorted(order) == list(range(len(texts)))
    other, _ = pack(tmp_path / "other", corpus, tokenizer_dir, sequence_length=16, test_fraction=0.2, seed=1)
    assert flat(other["train"]) != flat(packed["train"])


def test_without_shuffling_documents_keep_their_order(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    packed, _ = pack(tmp_path / "d", corpus, tokenizer_dir, sequence_length=16, test_fraction=0, shuffle=False)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    texts = [file.read_text(encoding="utf-8") for file in sorted(corpus.iterdir())]
    stream = [token for ids in encode(tokenizer, texts) for token in (*ids, tokenizer.eos_token_id)]
    assert flat(packed["train"]) == stream[: len(stream) // 16 * 16]


def test_a_repeated_document_is_on_one_side_only(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "x.txt"
    lines = [f"the cat {index % 7} sat on the mat" for index in range(70)]
    file.write_text("\n".join(lines))
    _, manifest = pack(tmp_path / "d", file, tokenizer_dir, sequence_length=2, test_fraction=0.05, document="line")
    assert manifest["splits"]["test"]["documents"] == 10
    file.write_text("\n".join(lines[:1] * 20))
    _, manifest = pack(tmp_path / "same", file, tokenizer_dir, sequence_length=2, test_fraction=0.05, document="line")
    assert manifest["split"] == "position"


def test_few_documents_are_split_by_position(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on the mat. " * 200)
    packed, manifest = pack(tmp_path / "d", file, tokenizer_dir, sequence_length=10, test_fraction=0.1)
    assert manifest["split"] == "position"
    tokenizer = load_tokenizer(str(tokenizer_dir))
    stream = [*encode(tokenizer, [file.read_text()])[0], tokenizer.eos_token_id]
    blocks = len(stream) // 10
    held_out = round(0.1 * blocks)
    assert (len(packed["train"]), len(packed["test"])) == (blocks - held_out, held_out)
    assert flat(packed["train"]) + flat(packed["test"]) == stream[: blocks * 10]
    assert manifest["splits"]["test"]["dropped_tokens"] == len(stream) - blocks * 10


def test_stride_overlaps_blocks(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on the mat. " * 50)
    packed, _ = pack(tmp_path / "d", file, tokenizer_dir, sequence_length=10, stride=4, test_fraction=0)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    stream = [*encode(tokenizer, [file.read_text()])[0], tokenizer.eos_token_id]
    assert packed["train"]["input_ids"][:] == [stream[i : i + 10] for i in range(0, len(stream) - 9, 4)]


def test_test_source_and_no_eos(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat. " * 50)
    (tmp_path / "b.txt").write_text("big dog ran. " * 20)
    packed, manifest = pack(
        tmp_path / "d",
        tmp_path / "a.txt",
        tokenizer_dir,
        sequence_length=8,
        test_source=str(tmp_path / "b.txt"),
        append_eos=False,
    )
    assert manifest["split"] == "source"
    assert 0 not in flat(packed["train"]) + flat(packed["test"])
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert tokenizer.decode(flat(packed["test"])).startswith("big dog ran. big")


def tree(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("kind", ["arrow", "hdf5", "jsonl"])
def test_output_repeats_byte_for_byte(corpus: Path, tokenizer_dir: Path, tmp_path: Path, kind: str) -> None:
    for name, workers in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, corpus, tokenizer_dir, sequence_length=16, num_workers=workers, format=kind)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_many_small_runs_and_groups_make_what_one_makes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sequence_length": 16, "document": "separator:[.]", "test_fraction": 0.1}
    for name in ("whole", "whole-in-order"):
        run(tmp_path / name, corpus, tokenizer_dir, shuffle=name == "whole", **options)
    monkeypatch.setattr(external_sort, "RUN_TOKENS", 700)
    monkeypatch.setattr(external_sort, "RUN_ENTRIES", 40)
    monkeypatch.setattr(external_sort, "GROUP_TOKENS", 90)
    monkeypatch.setattr(pregenerate_module, "_BATCH_PIECES", 7)
    for name in ("whole", "whole-in-order"):
        run(tmp_path / f"{name}-2", corpus, tokenizer_dir, shuffle=name == "whole", **options)
        assert tree(tmp_path / name) == tree(tmp_path / f"{name}-2")


def test_a_long_document_in_parts_over_many_runs(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    texts = ["the cat sat on the mat. " * 40_000, "a dog", "big red dog ran. " * 30_000, "sad"]
    for index, text in enumerate(texts):
        (tmp_path / "in" / f"{index}.txt").write_text(text)
    monkeypatch.setattr(external_sort, "RUN_TOKENS", 50_000)
    packed, _ = pack(tmp_path / "d", tmp_path / "in", tokenizer_dir, sequence_length=64, test_fraction=0)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    expected = {(*ids, 0) for ids in encode(tokenizer, texts)}
    *found, last = by_document(packed["train"], 0)
    assert set(found) < expected
    assert {ids for ids in expected if ids[: len(last)] == last} == expected - set(found)
    own, manifest = pack(tmp_path / "e", tmp_path / "in", tokenizer_dir, sequence_length=64, test_fraction=0.1)
    assert manifest["split"] == "position"
    stream = [token for ids in encode(tokenizer, texts) for token in (*ids, 0)]
    assert flat(own["train"]) + flat(own["test"]) == stream[: len(stream) // 64 * 64]


def test_files_of_bounded_size(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = pack(tmp_path / "a", corpus, tokenizer_dir, sequence_length=16)
    for format_ in (block_writers.ArrowWriter, block_writers._Hdf5Writer):
        monkeypatch.setattr(format_, "file_tokens", 16 * 100)
    parts, manifest = pack(tmp_path / "b", corpus, tokenizer_dir, sequence_length=16)
    assert len(manifest["splits"]["train"]["files"]) == math.ceil(len(whole["train"]) / 100) > 1
    assert flat(parts["train"]) == flat(whole["train"])
    run(tmp_path / "c", corpus, tokenizer_dir, sequence_length=16, format="hdf5")
    assert list(check_dataset(tmp_path / "b")) == list(check_dataset(tmp_path / "c")) == []


def test_large_vocabularies_take_int32(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "train", 10, 10, np.dtype(np.int32), "arrow") as writer:
        writer.add(np.arange(70_000, 70_040, dtype=np.int32))
    split = datasets.load_from_disk(str(tmp_path / "train"))
    assert split.features["input_ids"].feature.dtype == "int32"
    assert split[0]["input_ids"][0] == 70_000


@pytest.mark.parametrize("shards", [2, 5])
def test_parts_hold_what_one_run_holds(corpus: Path, tokenizer_dir: Path, tmp_path: Path, shards: int) -> None:
    options = {"sequence_length": 8, "test_fraction": 0.2}
    one, manifest = pack(tmp_path / "one", corpus, tokenizer_dir, **options)
    found: dict[str, list] = {"train": [], "test": []}
    counts = dict.fromkeys(found, 0)
    for index in range(1, shards + 1):
        part, said = pack(tmp_path / "parts" / str(index), corpus, tokenizer_dir, shard=f"{index}/{shards}", **options)
        assert said["split"] == "document"
        for name in found:
            found[name] += by_document(part[name], 0)
            counts[name] += said["splits"][name]["documents"]
    for name, documents in found.items():
        whole = by_document(one[name], 0)
        assert counts[name] == manifest["splits"][name]["documents"]
        assert {ids[:20] for ids in documents} == {ids[:20] for ids in whole}
    together = load_packed_dataset(str(tmp_path / "parts"))
    assert len(together.train) == sum(
        len(load_packed_dataset(str(tmp_path / "parts" / str(i + 1))).train) for i in range(shards)
    )
    assert list(check_dataset(tmp_path / "parts")) == []
    shutil.rmtree(tmp_path / "parts" / "1")
    assert f"of {shards}" in " ".join(check_dataset(tmp_path / "parts"))
    with pytest.raises(DataError, match="fewer documents than 41 shards"):
        pack(tmp_path / "none", corpus, tokenizer_dir, shard="41/41", **options)


def test_parts_with_held_out_text_of_its_own_and_of_too_few_documents(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    options = {"sequence_length": 8, "shard": "2/3", "test_source": str(corpus / "00.txt")}
    _, manifest = pack(tmp_path / "d", corpus, tokenizer_dir, **options)
    assert manifest["splits"]["test"]["documents"] == 0
    (tmp_path / "few").mkdir()
    for name in ("00.txt", "01.txt", "02.txt"):
        shutil.copy(corpus / name, tmp_path / "few" / name)
    with pytest.raises(DataError, match="too few documents"):
        pack(tmp_path / "e", tmp_path / "few", tokenizer_dir, sequence_length=8, shard="2/3")
    _, manifest = pack(tmp_path / "e", tmp_path / "few", tokenizer_dir, sequence_length=8, shard="2/3", test_fraction=0)
    assert manifest["splits"]["train"]["documents"] == 1


def test_a_disk_that_fails_while_reading_costs_no_finished_work(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_sort, "RUN_TOKENS", 3000)
    monkeypatch.setattr(pregenerate_module, "_BATCH_PIECES", 3)
    whole = run(tmp_path / "whole", corpus, tokenizer_dir, sequence_length=16, num_workers=1)
    opened, original = [], corpus_module.open_file

    def fail(path: Path) -> object:
        opened.append(path)
        if len(opened) == 30:
            raise UnreadableError(f"cannot read {path}: Input/output error")
        return original(path)

    out = tmp_path / "d"
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "open_file", fail)
        with pytest.raises(UnreadableError):
            run(out, corpus, tokenizer_dir, sequence_length=16, num_workers=1)
    assert list((tmp_path / ".d.unfinished" / "train").glob("run-*.json"))
    assert run(out, corpus, tokenizer_dir, sequence_length=16, resume=True).tokens == whole.tokens
    assert tree(out) == tree(tmp_path / "whole")


# What a killed process leaves behind: it dies while it writes its N-th file or directory entry. Each line of input has N
# and the output directory. A process with all imports forks for each of them, before it has any thread.
KILLED = """
import os, signal, sys
from tinygpt2 import PregenerateConfig, pregenerate
from tinygpt2.data import external_sort, pregenerate as pregenerate_module
external_sort.RUN_TOKENS, pregenerate_module._BATCH_PIECES, left = 3000, 5, [0]
def count(event, arguments):
    written = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wx"
    if written or event in ("os.rename", "os.mkdir", "os.rmdir"):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
for line in sys.stdin:
    moment, out = line.rstrip("\\n").split(" ", 1)
    child = os.fork()
    if not child:
        left[0] = int(moment)
        sys.addaudithook(count)
        how = {"sequence_length": 16, "resume": True}
        pregenerate(PregenerateConfig(source=sys.argv[1], tokenizer=sys.argv[2], out=out, **how))
        os.write(1, f"{int(moment) - left[0]} ".encode())
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, f"{code}\\n".encode())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork")
def test_killed_anywhere_and_continued_it_makes_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    files = legacy_layout(tokenizer_dir, tmp_path / "tokenizer")  # which loads without torch

    command = [sys.executable, "-c", KILLED, str(corpus), str(files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def start(moment: int, out: Path) -> list[int]:
            """Return how many moments there were, if it was not killed, and the exit code."""
            process.stdin.write(f"{moment} {out}\n")
            process.stdin.flush()
            return [int(word) for word in process.stdout.readline().split()]

        moments, code = start(10**6, tmp_path / "whole")
        assert code == 0
        pick = random.Random(1)
        kills = 0
        for index, moment in enumerate(sorted(pick.sample(range(moments), 5))):
            out = tmp_path / f"killed-{index}"
            assert start(moment, out) == [-signal.SIGKILL]
            kills += start(pick.randrange(3, moments), out) == [-signal.SIGKILL]  # less is left to do
            assert start(10**6, out)[-1] == 0
            assert tree(out) == tree(tmp_path / "whole")
            assert not (tmp_path / f".killed-{index}.unfinished").exists()
        process.stdin.close()
    assert kills


def test_resuming_another_run_is_refused_and_a_complete_one_is_done(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"

    with monkeypatch.context() as patch:
        patch.setattr(block_writers.ArrowWriter, "write", full_disk)
        with pytest.raises(MachineError, match="No space left on device") as error:
            run(out, corpus, tokenizer_dir, sequence_length=16)
    assert "--resume" in str(error.value)
    assert not out.exists()
    with pytest.raises(ConfigError, match="sequence_length, stride differ"):
        run(out, corpus, tokenizer_dir, sequence_length=8, resume=True)
    made = run(out, corpus, tokenizer_dir, sequence_length=16, resume=True)
    again = run(out, corpus, tokenizer_dir, sequence_length=16, resume=True)
    assert (again.tokens, again.sequences) == (made.tokens, made.sequences)
    with pytest.raises(ConfigError, match="seed differ"):
        run(out, corpus, tokenizer_dir, sequence_length=16, resume=True, seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_a_full_disk_leaves_nothing_under_the_final_name(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from tinygpt2.cli.app import main; main()"
    )
    for kind in ("arrow", "hdf5"):
        out = tmp_path / kind
        options = [
            "--tokenizer",
            str(tokenizer_dir),
            "--out",
            str(out),
            "--sequence-length",
            "16",
            "--format",
            kind,
            "--json",
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, "pregenerate", str(corpus), *options], capture_output=True, text=True
        )
        assert done.returncode == 6, done.stderr
        assert "cannot write" in json.loads(done.stdout)["error"]["message"]
        assert "Traceback" not in done.stderr
        assert not out.exists()


def test_overwrite_replaces_datasets_only(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    pack(out, corpus, tokenizer_dir, sequence_length=16)
    with pytest.raises(ConfigError, match="not empty"):
        pack(out, corpus, tokenizer_dir, sequence_length=8)
    packed, _ = pack(out, corpus, tokenizer_dir, sequence_length=8, overwrite=True)
    assert packed["train"].features["input_ids"].length == 8
    with pytest.raises(ConfigError, match=r"no pregenerate\.json"):
        pack(corpus, corpus, tokenizer_dir, sequence_length=8, overwrite=True)


@pytest.mark.parametrize("content", ["", " \n\n", "short", b"bad \xff utf"])
def test_a_failed_run_leaves_nothing_behind(tmp_path: Path, tokenizer_dir: Path, content: str | bytes) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError):
        pack(tmp_path / "d", file, tokenizer_dir, sequence_length=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.txt"]


def make_interrupted(out: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the unfinished work of a run that Ctrl-C stopped while it wrote the blocks."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(block_writers.ArrowWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(out, corpus, tokenizer, sequence_length=16)


def test_unfinished_work_is_only_deleted_when_asked(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "d", tmp_path / ".d.unfinished"
    make_interrupted(out, corpus, tokenizer_dir, monkeypatch)
    kept = tree(work)
    with pytest.raises(ConfigError, match="holds the unfinished work") as error:
        run(out, corpus, tokenizer_dir, sequence_length=16)
    assert "--resume to continue it, or --overwrite to start over" in error.value.hint
    with pytest.raises(ConfigError, match="sequence_length"):
        run(out, corpus, tokenizer_dir, sequence_length=8, resume=True)
    assert tree(work) == kept
    run(out, corpus, tokenizer_dir, sequence_length=8, overwrite=True)
    assert load_packed_dataset(str(out)).sequence_length == 8
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


PAIR = """
import sys, time
from tinygpt2 import PregenerateConfig, pregenerate
from tinygpt2.errors import ConfigError
from tinygpt2.data import external_sort, pregenerate as pregenerate_module
external_sort.RUN_TOKENS, pregenerate_module._BATCH_PIECES = 300, 2
source, tokenizer = sys.argv[1:3]
print("ready", flush=True)
for line in sys.stdin:
    try:
        how = {"sequence_length": 16, "num_workers": 1}
        pregenerate(PregenerateConfig(source=source, tokenizer=tokenizer, out=line.rstrip("\\n"), **how))
        print("made", flush=True)
    except ConfigError as error:
        print("refused", error.message, error.hint, flush=True)
"""


def race(corpus: Path, tokenizer: Path, root: Path, rounds: int) -> None:
    """Start two processes with one --out at the same moment: one makes its whole dataset, the other is refused."""
    sources = [root / "alpha.txt", root / "beta.txt"]
    wholes = []
    for source in sources:
        source.write_text(f"{source.stem} the cat sat on the mat. " * 2000, encoding="utf-8")
        run(root / f"whole-{source.stem}", source, tokenizer, sequence_length=16)
        wholes.append(tree(root / f"whole-{source.stem}"))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(source), str(tokenizer)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for source in sources
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for number in range(rounds):
        out = root / f"{number}"
        for process in started:
            process.stdin.write(f"{out}\n")
            process.stdin.flush()
        said = [process.stdout.readline() for process in started]
        assert sorted(one.split()[0] for one in said) == ["made", "refused"], said
        refused = next(one for one in said if one.startswith("refused"))
        assert "another run writes to" in refused or "is not empty" in refused
        assert tree(out) == wholes[said.index("made\n")]
    for process in started:
        process.communicate()
    assert not list(root.glob(".*"))


def test_of_two_processes_with_one_out_one_is_refused(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    race(corpus, legacy_layout(tokenizer_dir, tmp_path / "tokenizer"), tmp_path, rounds=6)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_read_once(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Whether rows are chats is not looked up in it: what was read would be lost."""
    text = (corpus / "00.txt").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text,))
    writer.start()
    common = {"tokenizer": str(tokenizer_dir), "sequence_length": 16, "test_fraction": 0}
    pregenerate(PregenerateConfig(source=str(tmp_path / "pipe"), out=str(tmp_path / "a"), **common))
    writer.join()
    pregenerate(PregenerateConfig(source=str(corpus / "00.txt"), out=str(tmp_path / "b"), **common))
    first, second = (load_packed_dataset(str(tmp_path / name)).train for name in "ab")
    assert first.batch(range(len(first))).input_ids.equal(second.batch(range(len(second))).input_ids)
    with pytest.raises(ConfigError, match="standard input or a pipe"):
        PregenerateConfig(source=str(tmp_path / "pipe"), out="o", resume=True, **common)


def test_an_interrupted_overwrite_is_continued_by_resume(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The complete dataset that was to be replaced is not taken for the result."""
    source, out = tmp_path / "texts", tmp_path / "d"
    source.mkdir()
    (source / "a.txt").write_bytes((corpus / "00.txt").read_bytes())
    first = run(out, source, tokenizer_dir, sequence_length=16)
    (source / "b.txt").write_bytes((corpus / "01.txt").read_bytes())

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pregenerate_module, "put_in_place", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(out, source, tokenizer_dir, sequence_length=16, overwrite=True)
    assert run(out, source, tokenizer_dir, sequence_length=16, resume=True).tokens > first.tokens
    assert not list(tmp_path.glob(".*"))


def test_a_dataset_is_put_back_if_its_successor_cannot_take_its_place(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"
    run(out, corpus / "00.txt", tokenizer_dir, sequence_length=16)
    before, rename = tree(out), Path.replace

    def refused(self: Path, target: Path) -> Path:
        if self.name == "result":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(KeyboardInterrupt):
        run(out, corpus / "01.txt", tokenizer_dir, sequence_length=16, overwrite=True)
    assert tree(out) == before
