"""The command line: exit codes, one message, streams, YAML, JSON, speed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import LENGTH, make_model, sentences
from tinygpt2.cli import app

COMMANDS = [
    "quickstart", "train-tokenizer", "pregenerate", "pretrain", "truncate-student", "distill", "finetune", "ppl", "presets", "generate", "runs", "show", "verify",
]  # fmt: skip


def test_help_and_version_answer_without_torch() -> None:
    code = """
import sys
from tinygpt2.cli import app
for arguments in (["--help"], ["--version"], ["distill", "--help"], ["ppl", "--version"]):
    try:
        app.main(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
heavy = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "pyarrow", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


def test_print_config_runs_again(cli: Callable, data: Path, teacher: Path, tmp_path: Path) -> None:
    flags = ["--model", teacher, "--data", data, "--out", tmp_path / "a", "--max-steps", 2]
    printed = cli("pretrain", *flags, "--print-config")
    assert printed.code == 0
    assert not (tmp_path / "a").exists()
    file = tmp_path / "run.yaml"
    file.write_text(printed.out)
    assert cli("pretrain", "--config", file, "--print-config").out == printed.out
    first = cli("pretrain", *flags, "--json")
    second = cli("pretrain", "--config", file, "--out", tmp_path / "b", "--json")
    assert (first.code, second.code) == (0, 0)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    third = cli("pretrain", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "c", "--json")
    assert third.json["loss"] == first.json["loss"]


def test_flags_win_over_the_file_and_the_file_over_defaults(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("student: s\nteacher: t\ndata: d\nout: o\nlearning-rate: 1e-3\nmax_steps: 5\nrecipe: tinygpt2\n")
    resolved = yaml.safe_load(cli("distill", "--config", file, "--max-steps", 7, "--print-config").out)
    assert (resolved["learning_rate"], resolved["max_steps"], resolved["recipe"]) == (1e-3, 7, "tinygpt2")
    assert (resolved["warmup_ratio"], resolved["attention_weight"], resolved["micro_batch_size"]) == (0.01, 1.0, 8)


def test_a_recipe_flag_wins_over_what_a_run_wrote_down(cli: Callable, tmp_path: Path) -> None:
    base = ["--student", "s", "--teacher", "t", "--data", "d", "--out", "o", "--print-config"]
    (tmp_path / "config.yaml").write_text(cli("distill", "--recipe", "truncation", *base).out)
    again = [
        "distill",
        "--config",
        tmp_path / "config.yaml",
        "--recipe",
        "tinygpt2",
        "--hidden-weight",
        "0.5",
        "--print-config",
    ]
    resolved = yaml.safe_load(cli(*again).out)
    assert (resolved["recipe"], resolved["attention_weight"], resolved["ce_weight"]) == ("tinygpt2", 1.0, 0.0)
    assert (resolved["hidden_weight"], resolved["learning_rate"], resolved["student"]) == (0.5, 2.5e-4, "s")


def test_flags_can_undo_a_yes_of_the_file(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nout: o\nresume: true\n")
    printed = cli("pretrain", "--config", tmp_path / "run.yaml", "--no-resume", "--print-config").out
    assert yaml.safe_load(printed)["resume"] is False


def test_names_with_brackets_are_shown_as_they_are(cli: Callable, teacher: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "student[v2]")
    assert "student[v2]" in cli("ppl", "--model", tmp_path / "student[v2]", "--task", data).out
    assert "student[v2]" in cli("generate", "--model", tmp_path / "student[v2]", "--max-new-tokens", 2).out


def test_an_output_that_cannot_be_written_is_not_an_internal_error(
    cli: Callable, corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    outcome = cli("pregenerate", corpus, "--tokenizer", tokenizer_dir, "--out", tmp_path / "file" / "out")
    assert outcome.code == 2
    assert "Not a directory" in outcome.err or "File exists" in outcome.err


def test_the_whole_pipeline_with_json(cli: Callable, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": sentences(20, seed)}, ensure_ascii=False) for seed in range(30)]
    text.write_text("\n".join(rows) + "\n", encoding="utf-8")
    at = {name: tmp_path / name for name in ("tok", "data", "teacher", "cut", "student", "tuned")}

    def run(*arguments: object) -> dict:
        outcome = cli(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        return outcome.json

    assert run("train-tokenizer", text, "--vocab-size", 300, "--out", at["tok"])["vocab_size"] == 300
    packed = run("pregenerate", text, "--tokenizer", at["tok"], "--out", at["data"], "--sequence-length", LENGTH)
    keys = {"documents", "bytes", "tokens", "sequences", "encoding_errors", "empty_documents", "seconds"}
    assert set(packed) == keys
    assert packed["documents"] == 30
    assert packed["bytes"] == sum(len(json.loads(row)["text"].encode()) for row in rows)
    assert packed["sequences"]["train"] > packed["sequences"]["test"] > 0
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 4, "n_embd": 16, "n_head": 2, "n_positions": LENGTH}))
    keys = {
        "model",
        "steps",
        "tokens",
        "seconds",
        "loss",
        "eval",
        "parameters",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    trained = run("pretrain", "--model-config", shape, "--data", at["data"], "--out", at["teacher"], "--max-steps", 3)
    assert set(trained) == keys
    assert trained["model"] == str(at["teacher"])
    cut = run(
        "truncate-student", "--teacher", at["teacher"], "--num-layers", 2, "--strategy", "last", "--out", at["cut"]
    )
    assert cut["layers"] == [2, 3]
    assert set(cut) == {"model", "layers", "parameters", "teacher_parameters"}
    taught = run(
        "distill",
        "--teacher",
        at["teacher"],
        "--student",
        at["cut"],
        "--data",
        at["data"],
        "--out",
        at["student"],
        "--max-tokens",
        600,
    )
    assert set(taught) == keys
    assert taught["tokens"] == 3 * 8 * LENGTH
    mine = tmp_path / "mine.txt"
    mine.write_text(sentences(60, seed=77), encoding="utf-8")
    assert (
        set(run("finetune", "--model", at["student"], "--data", mine, "--out", at["tuned"], "--max-steps", 2)) == keys
    )
    measured = run("ppl", "--model", at["teacher"], "--model", at["student"], "--task", at["data"])
    assert measured["results"][1]["perplexity"] == pytest.approx(taught["eval"]["perplexity"], rel=1e-5)
    assert {"model", "task", "perplexity", "loss", "bits_per_byte", "word_perplexity", "tokens", "words", "bytes",
            "stderr", "bits_per_character",
            "seconds", "tokens_per_second"} <= set(measured["results"][0])  # fmt: skip
    assert set(measured["paired"][0]) == {
        "a", "b", "task", "difference", "stderr", "bits_per_byte", "bits_per_byte_stderr", "over", "parts"
    }  # fmt: skip
    said = run(
        "generate", "--model", at["teacher"], "--model", at["tuned"], "--prompt", "the cat", "--max-new-tokens", 5
    )
    assert [set(text) for text in said["results"]] == [{"model", "prompt", "text", "tokens", "seconds"}] * 2
    for path, kind in ((at["data"], "dataset"), (at["student"], "model")):
        checked = run("verify", path)
        assert (checked["kind"], checked["ok"], checked["problems"]) == (kind, True, [])


def test_people_get_tables_on_stdout_and_talk_on_stderr(
    cli: Callable, teacher: Path, data: Path, tmp_path: Path
) -> None:
    outcome = cli("ppl", "--model", teacher, "--task", data)
    assert "perplexity" in outcome.out
    assert "perplexity" not in outcome.err
    trained = cli(
        "pretrain", "--model", teacher, "--data", data, "--out", tmp_path / "m", "--max-steps", 2, "--log-every", 1
    )
    assert "step 2/2" in trained.err
    assert "step 2/2" not in trained.out
    assert "evaluat" not in trained.out


def test_stdin_is_a_source(tokenizer_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinygpt2", "pregenerate", "-", "--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "d"),
               "--sequence-length", "16", "--document", "line", "--json"]  # fmt: skip
    text = "\n".join(sentences(10, seed) for seed in range(25))
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == 25


def test_interactive_answers_until_end_of_input(teacher: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tinygpt2",
        "generate",
        "--model",
        str(teacher),
        "--interactive",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    done = subprocess.run(
        command, input=b"the cat\n\n" + b"the " * 60 + b"\n\xff\nthe dog\n", capture_output=True, check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [text["prompt"] for text in json.loads(done.stdout)["results"]] == ["the cat", "the dog"]
    assert b"the prompt is not valid UTF-8 at character 0" in done.stderr


def test_settings_change_from_the_prompt(teacher: Path) -> None:
    """After /seed the third answer equals the first, // starts a prompt, and wrong settings change nothing."""
    command = [sys.executable, "-m", "tinygpt2", "generate", "--model", str(teacher), "--interactive", "--json"]
    lines = ["/max-new-tokens 6", "/temperature 1.5", "the cat", "the cat", "/top-k x", "/temprature 3", "/seed 42", "the cat",
             "/temperature", "/max-new-tokens 2", "//the", "/", "/help", "/quit", "never"]  # fmt: skip
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    first, second, again, plain = json.loads(done.stdout)["results"]
    assert first["text"] == again["text"] != second["text"]
    assert (first["tokens"], plain["tokens"], plain["prompt"]) == (6, 2, "/the")
    told = done.stderr.splitlines()
    assert "max-new-tokens 6, temperature 1.5, num-beams 1, num-samples 1, seed 42" in told
    assert any(line.startswith("error: --top-k: expected a whole number, got 'x'") for line in told)
    assert "error: unknown setting /temprature, did you mean /temperature?" in told
    assert "max-new-tokens 2, num-beams 1, num-samples 1, seed 42" in told
    assert "/seed            42. Seed for sampling." in told


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path, tokenizer_dir: Path) -> Path:
    """Return a folder with every kind of faulty input."""
    from tinygpt2 import PregenerateConfig, TrainTokenizerConfig, pregenerate, train_tokenizer

    root = tmp_path_factory.mktemp("bad")
    (root / "empty.txt").write_text("\n")
    (root / "short.txt").write_text("the cat")
    (root / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (root / "unknown.yaml").write_text("learning_rat: 1\n")
    (root / "type.yaml").write_text("max_steps: many\n")
    (root / "surrogate.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    (root / "list.yaml").write_text("- a\n")
    (root / "syntax.yaml").write_text("a: [\n")
    (root / "full").mkdir()
    (root / "full" / "x").write_text("x")
    shutil.copytree(teacher, root / "bare")
    (root / "bare" / "model.safetensors").unlink()
    shutil.copytree(root / "bare", root / "pickled")
    torch.save({}, root / "pickled" / "pytorch_model.bin")
    make_model(root / "v300", None, vocab_size=300)
    make_model(root / "heads", tokenizer_dir, n_head=2)
    train_tokenizer(TrainTokenizerConfig(source=[str(corpus / "00.txt")], vocab_size=300, out=str(root / "tok")))
    (root / "notok").mkdir()
    for name, tokenizer, length in (("other", root / "tok", 32), ("long", tokenizer_dir, 64)):
        pregenerate(
            PregenerateConfig(
                source=str(corpus), tokenizer=str(tokenizer), out=str(root / name), sequence_length=length
            )
        )
    return root


TRAIN = "pretrain --model {teacher} --out {out} --max-steps 1"
BAD = [
    (3, "no such file", "pregenerate {bad}/nowhere.txt --tokenizer {tok} --out {out}"),
    (3, "no text", "pregenerate {bad}/empty.txt --tokenizer {tok} --out {out}"),
    (3, "shorter than one block", "pregenerate {bad}/short.txt --tokenizer {tok} --out {out}"),
    (3, "latin1.txt: not UTF-8: unexpected end of data at byte 3", "pregenerate {bad}/latin1.txt --tokenizer {tok} --out {out}"),
    (3, "broken.jsonl:2", "pregenerate {bad}/broken.jsonl --tokenizer {tok} --out {out}"),
    (3, "surrogate.jsonl:1: half of a surrogate", "pregenerate {bad}/surrogate.jsonl --tokenizer {tok} --out {out}"),
    (2, "leaves nothing to train", TRAIN + " --data {data} --freeze *"),
    (2, "--seed: expected at most 4294967295, got 99999999999", TRAIN + " --data {data} --seed 99999999999"),
    (4, "no tokenizer in", "pregenerate {corpus} --tokenizer {bad}/notok --out {out}"),
    (4, "HF_HUB_OFFLINE", "pregenerate {corpus} --tokenizer no-such-tokenizer --out {out}"),
    (2, "not empty", "pregenerate {corpus} --tokenizer {tok} --out {bad}/full"),
    (2, "--stride 9", "pregenerate {corpus} --tokenizer {tok} --out {out} --sequence-length 8 --stride 9"),
    (3, "fewer than --vocab-size", "train-tokenizer {bad}/short.txt --out {out}"),
    (2, "--vocab-size: expected at least 257, got 10", "train-tokenizer {corpus} --out {out} --vocab-size 10"),
    (2, "did you mean 'learning_rate'", TRAIN + " --data {data} --config {bad}/unknown.yaml"),
    (2, "--max-steps: expected a whole number, got 'many'", "pretrain --model {teacher} --out {out} --data {data} --config {bad}/type.yaml"),
    (2, "must contain lines of 'option: value'", TRAIN + " --data {data} --config {bad}/list.yaml"),
    (2, "not valid YAML", TRAIN + " --data {data} --config {bad}/syntax.yaml"),
    (2, "cannot read", TRAIN + " --data {data} --config {bad}/nowhere.yaml"),
    (2, "cannot be combined", TRAIN + " --data {data} --num-epochs 1"),
    (2, "give either --model-config (random weights) or --model", TRAIN + " --data {data} --model-config gpt2"),
    (2, "No such option", TRAIN + " --data {data} --no-such-option"),
    (2, "--data is required", TRAIN),
    (2, "not empty", "pretrain --model {teacher} --out {bad}/full --max-steps 1 --data {data}"),
    (2, "positions", TRAIN + " --data {bad}/long"),
    (3, "another tokenizer", TRAIN + " --data {bad}/other"),
    (3, "no such dataset", TRAIN + " --data {bad}/nowhere"),
    (3, "is not a pregenerated dataset", TRAIN + " --data {corpus}"),
    (2, "no model configuration", "pretrain --model-config gpt7 --out {out} --data {data}"),
    (4, "HF_HUB_OFFLINE", "pretrain --model no-such-model --out {out} --data {data}"),
    (4, "no weights", "pretrain --model {bad}/bare --out {out} --data {data}"),
    (4, "--allow-pickle", "pretrain --model {bad}/pickled --out {out} --data {data}"),
    (4, "vocabulary of 320", "distill --teacher {teacher} --student {bad}/v300 --out {out} --data {data}"),
    (2, "2 heads", "distill --recipe tinygpt2 --teacher {teacher} --student {bad}/heads --out {out} --data {data}"),
    (2, "--teacher is required", "distill --student {teacher} --out {out} --data {data}"),
    (2, "names 2 layers", "distill --recipe tinygpt2 --layer-map 1,2 --teacher {teacher} --student {teacher} --out {out} --data {data}"),
    (2, "has only 4", "truncate-student --teacher {teacher} --num-layers 9 --out {out}"),
    (3, "no such file", "finetune --model {teacher} --data {bad}/nowhere.txt --out {out}"),
    (3, "no such file", "ppl --model {teacher} --task {bad}/nowhere.txt"),
    (2, "unknown task", "ppl --model {teacher} --task nonsense"),
    (2, "--stride 33 is larger than the window", "ppl --model {teacher} --task {corpus}/00.txt --stride 33"),
    (4, "--allow-pickle", "generate --model {bad}/pickled --prompt a"),
    (2, "positions", "generate --model {teacher} --prompt a --max-new-tokens 99"),
    (3, "no such directory", "verify {bad}/nowhere"),
    (3, "neither", "verify {corpus}"),
    (2, "No such command", "destill"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "part", "line"), BAD)
def test_bad_input_has_its_code_and_one_clear_message(
    cli: Callable,
    bad: Path,
    teacher: Path,
    data: Path,
    corpus: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    code: int,
    part: str,
    line: str,
) -> None:
    places = {
        "bad": bad,
        "teacher": teacher,
        "data": data,
        "corpus": corpus,
        "tok": tokenizer_dir,
        "out": tmp_path / "out",
    }
    arguments = line.format(**places).split()
    outcome = cli(*arguments)
    assert outcome.code == code, outcome.err
    assert part in outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error: ") == 1
    assert outcome.err[outcome.err.index("error: ") :].count("\n") <= 5
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    reported = cli(*arguments, "--json")
    assert reported.code == code
    assert reported.json["error"]["code"] == code
    assert part in f"{reported.json['error']['message']} {reported.json['error']['hint']}"


def test_verify_exits_with_the_kind_of_fault_and_prints_its_result(
    cli: Callable, bad: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "d")
    arrow = next((tmp_path / "d" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:64])
    for path, code, kind in ((tmp_path / "d", 3, "dataset"), (bad / "bare", 4, "model")):
        outcome = cli("verify", path, "--json")
        assert outcome.code == code
        assert (outcome.json["kind"], outcome.json["ok"]) == (kind, False)
        assert outcome.json["problems"]


def test_a_missing_tokenizer_is_a_note(cli: Callable, bad: Path) -> None:
    outcome = cli("verify", bad / "v300")
    assert outcome.code == 0
    assert "note: the directory does not contain a tokenizer" in outcome.out


def test_an_internal_error_is_one_line_unless_debugging(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, teacher: Path
) -> None:
    import tinygpt2.workflows.model_verification

    monkeypatch.setattr(tinygpt2.workflows.model_verification, "check_checksums", lambda path: 1 / 0)
    outcome = cli("verify", teacher)
    assert outcome.code == 1
    assert "internal error: ZeroDivisionError" in outcome.err
    assert "Traceback" not in outcome.err
    monkeypatch.setenv("TINYGPT2_DEBUG", "1")
    assert "Traceback" in cli("verify", teacher).err


WAITS = """
import sys, time
from tinygpt2.cli.app import main
from tinygpt2.data.corpus.sources import Corpus
pieces = Corpus.pieces
def slow(self):
    yield from pieces(self)
    print("waiting", file=sys.stderr, flush=True)
    for _ in range(60_000):  # a thread that wakes up while Python ends must not abort it
        time.sleep(0.001)
Corpus.pieces = slow
main()
"""


def interrupted(number: int, *arguments: object, text: str | None = None) -> tuple[int, bytes, str]:
    """Send a signal to a command that waits for more text than it has read; return how it ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        if text is not None:
            process.stdin.write(text.encode())
            process.stdin.close()
            process.stdin = None
        said = b""
        while b"waiting" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    assert b"Traceback" not in errors
    return process.returncode, output, errors.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_what_was_kept(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "d"
    packing = ["pregenerate", corpus, "--tokenizer", tokenizer_dir, "--out", out]
    code, output, errors = interrupted(number, *packing)
    assert (code, output) == (130, b"")
    assert f"interrupted; the finished work is kept in {tmp_path}/.d.unfinished\n" in errors
    assert "hint: add --resume to continue" in errors
    code, output, _ = interrupted(number, *packing, "--resume", "--json")
    error = json.loads(output)["error"]
    assert (code, error["code"], error["hint"]) == (130, 130, "add --resume to continue")
    code, output, _ = interrupted(number, "train-tokenizer", corpus, "--vocab-size", 300, "--out", out, "--json")
    assert (code, json.loads(output)["error"]["message"]) == (130, "interrupted; nothing was saved")
    assert not out.exists()


def test_standard_input_leaves_nothing_that_cannot_go_on(tokenizer_dir: Path, tmp_path: Path) -> None:
    code, _, errors = interrupted(
        signal.SIGINT, "pregenerate", "-", "--tokenizer", tokenizer_dir, "--out", tmp_path / "d", text="the cat " * 50
    )
    assert code == 130
    assert "interrupted; nothing was saved" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cause", "code", "message"),
    [
        (OSError(28, "No space left on device", "/x"), 6, "/x: No space left on device"),
        (OSError(30, "Read-only file system"), 6, "Read-only file system"),
        (OSError(122, "Disk quota exceeded"), 6, "Disk quota exceeded"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (MemoryError(), 6, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 6, "out of memory: CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 6, "out of memory"),
        (RuntimeError("something else"), 1, "internal error"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was saved"),
    ],
)
def test_the_machines_faults_have_their_own_code(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, teacher: Path, cause: BaseException, code: int, message: str
) -> None:
    import tinygpt2.workflows.model_verification

    def fails(*_: object, **__: object) -> None:
        raise cause

    monkeypatch.setattr(tinygpt2.workflows.model_verification, "check_checksums", fails)
    outcome = cli("verify", teacher)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err
    reported = cli("verify", teacher, "--json")
    assert reported.json["error"]["code"] == reported.code == code


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_directory_that_may_not_be_written_is_a_wrong_option(cli: Callable, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    outcome = cli("train-tokenizer", corpus, "--vocab-size", 300, "--out", tmp_path / "closed" / "t")
    assert outcome.code == 2
    assert "Permission denied" in outcome.err


EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\rb\tc"


def on_a_terminal(arguments: list[object], **variables: str) -> str:
    """Run a command with a terminal as standard output and error; return all that it shows."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "dumb", **variables})
        os.execv(sys.executable, [sys.executable, "-m", "tinygpt2", *map(str, arguments)])
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode()


def test_foreign_text_never_moves_a_terminals_cursor(tmp_path: Path) -> None:
    for arguments in (["verify", tmp_path / EVIL], ["presets", "--config", EVIL]):
        shown = on_a_terminal(arguments)
        rest = shown.replace("\r\n", "\n")
        assert not [
            char for char in rest if char != "\n" and char != "\t" and (ord(char) < 32 or 127 <= ord(char) < 160)
        ]
        assert "a\N{REPLACEMENT CHARACTER}]0;owned" in rest.replace("\n", "")
    piped = subprocess.run(
        [sys.executable, "-m", "tinygpt2", "verify", str(tmp_path / EVIL)], capture_output=True, check=False
    )
    assert EVIL.encode() in piped.stderr


def test_generated_text_is_harmless_on_a_terminal_and_untouched_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygpt2.cli.output.render import print_result
    from tinygpt2.decoding.generation import GenerateResult, Generation

    result = GenerateResult(
        [Generation(model=f"m{EVIL}", prompt=EVIL, text=f"{EVIL} :smile: {'x' * 500}", tokens=1, seconds=1.0)]
    )
    print_result(result, as_json=False)
    assert f"{EVIL}{EVIL} :smile: {'x' * 500}\n" in capsys.readouterr().out
    print_result(result, as_json=True)
    line = capsys.readouterr().out
    assert json.loads(line)["results"][0]["prompt"] == EVIL
    assert line.isprintable() or line.rstrip("\n").isprintable()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    print_result(result, as_json=False)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}" in shown


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_an_output_of_another_encoding_is_no_error(
    teacher: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "--model", str(teacher), "--prompt", "日本 naïve \U0001f600", "--max-new-tokens", "4"]

    def written(*more: str) -> bytes:
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        with pytest.raises(SystemExit) as exit_:
            app.main([*command, *more])
        assert exit_.value.code == 0
        sys.stdout.flush()
        return raw.getvalue()

    assert b"?" in written()
    assert json.loads(written("--json").decode("ascii"))["results"][0]["prompt"] == "日本 naïve \U0001f600"


def test_interrupting_a_command_exits_130(teacher: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tinygpt2", "generate", "--model", str(teacher), "--interactive"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        process.stdin.write(b"the cat\n")
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while not process.stdout.peek(1) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
