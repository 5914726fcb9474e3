"""Every convention against loops that take one window, one passage, one candidate at a time, in float64."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import sentences
from tinygpt2 import PplConfig, ppl
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.evaluation.named_tasks import SPECS
from tinygpt2.evaluation.results import PplRow
from tinygpt2.evaluation.stopwords import STOP_WORDS
from tinygpt2.evaluation.tasks import load_tasks
from tinygpt2.models.saving import save_model

WINDOW = 32
PAGES = (
    " \n = The cat = \n \n The cat sat on 1 @,@ 000 mats . It was happy @-@ sad . \n \n = = Then = = \n \n And then the dog ran . \n \n",
    ' = The dog = \n \n " The dog \'s log " was red , and blue ; it sat under the mat . \n \n',
)
WIKI = "".join(PAGES)
WIKI_AS_WRITTEN = (
    "\n= The cat =\n\nThe cat sat on 1,000 mats. It was happy-sad.\n\n== Then ==\n\nAnd then the dog ran.\n\n"
    '= The dog =\n\n"The dog\'s log" was red, and blue; it sat under the mat.\n\n'
)
PAGES_OF_THE_HARNESS = (
    " = The cat =\n\nThe cat sat on 1,000 mats. It was happy-sad.\n\n== Then ==\n\nAnd then the dog ran.\n",
    ' = The dog =\n\n"The dog\'s log" was red, and blue; it sat under the mat.\n\n',
)


class Naive:
    """A model in float64 and its tokenizer, one sequence at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = GPT2LMHeadModel.from_pretrained(str(directory)).double().eval()
        self.tokenizer = load_tokenizer(str(directory))

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def logs(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def rolling(self, text: str) -> list[float]:
        """Losses of all tokens: windows of as many targets as positions, the last one begun earlier to be whole."""
        tokens = [self.tokenizer.eos_token_id, *self.tokens(text)]
        losses: list[float] = []
        while len(losses) < len(tokens) - 1:
            stop = min(len(losses) + WINDOW, len(tokens) - 1)  # targets are tokens[1 : stop + 1]
            start = max(0, stop - WINDOW)
            logs = self.logs(tokens[start:stop])
            losses += [-float(logs[i - 1 - start, tokens[i]]) for i in range(len(losses) + 1, stop + 1)]
        return losses

    def ending(self, context: str, ending: str) -> tuple[list[float], bool, list[torch.Tensor]]:
        """Losses of an ending's tokens, whether all are the likeliest, and the predictions."""
        whole, known = self.tokens(context + ending), len(self.tokens(context.rstrip()))
        cut = whole[-(WINDOW + 1) :]
        logs = self.logs(cut[:-1])
        places = range(max(1, known - len(whole) + len(cut)), len(cut))
        losses = [-float(logs[i - 1, cut[i]]) for i in places]
        return losses, all(int(logs[i - 1].argmax()) == cut[i] for i in places), [logs[i - 1] for i in places]


@pytest.fixture(scope="module")
def naive(teacher: Path) -> Naive:
    return Naive(teacher)


def measure(teacher: Path, task: str, data: Path, **options: object) -> PplRow:
    (row,) = ppl(PplConfig(model=[str(teacher)], task=[task], task_data=str(data), **options)).results
    return row


@pytest.fixture(scope="module")
def wiki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("wiki") / "wiki.test.raw"
    file.write_text(WIKI, encoding="utf-8")
    return file


def test_the_paper_counts_words_and_ends_of_lines(teacher: Path, wiki: Path, naive: Naive) -> None:
    row = measure(teacher, "wikitext", wiki, convention="gpt2-paper")
    losses = naive.rolling(WIKI_AS_WRITTEN)
    units = len(WIKI.split()) + WIKI.count("\n")
    assert (row.unit, row.units, row.tokens) == ("word", units, len(losses))
    assert row.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / units), rel=1e-5)
    assert row.bits_per_byte == pytest.approx(sum(losses) / len(WIKI.encode()) / math.log(2), rel=1e-6)


def test_the_harness_goes_page_by_page(teacher: Path, wiki: Path, naive: Naive) -> None:
    row = measure(teacher, "wikitext", wiki, convention="lm-eval")
    losses = [loss for page in PAGES_OF_THE_HARNESS for loss in naive.rolling(page)]
    originals = [PAGES[0].removeprefix(" \n").removesuffix("\n"), PAGES[1]]  # what is lost where they are divided
    words = sum(len(re.split(r"\s+", page)) for page in originals)
    size = sum(len(page.encode()) for page in originals)
    assert (row.tokens, row.words, row.bytes) == (len(losses), words, size)
    assert row.characters == sum(map(len, originals))
    assert row.word_perplexity == row.perplexity == pytest.approx(math.exp(sum(losses) / words), rel=1e-5)
    assert row.byte_perplexity == pytest.approx(math.exp(sum(losses) / size), rel=1e-6)


def test_calc_ppl_with_its_flaw(teacher: Path, wiki: Path, naive: Naive) -> None:
    row = measure(teacher, "wikitext", wiki, convention="tinygpt2")
    rows = [line if line.strip() else "" for line in WIKI.splitlines(keepends=True)]
    ids = torch.tensor([naive.tokens("\n\n".join(rows))])
    total, end = 0.0, 0
    for begin in range(0, ids.shape[1], WINDOW):
        end = min(begin + WINDOW, ids.shape[1])
        part = ids[:, begin:end]
        with torch.no_grad():
            total += float(naive.model(part, labels=part).loss) * (end - begin)
    assert row.perplexity == pytest.approx(math.exp(total / end), rel=1e-6)
    right = measure(teacher, "wikitext", wiki)
    assert (row.loss, row.tokens) == (right.loss, right.tokens)
    assert right.perplexity != pytest.approx(row.perplexity, rel=1e-6)


@pytest.mark.parametrize(("task", "unit"), [("text8", "character"), ("enwik8", "byte")])
def test_characters_and_bytes(teacher: Path, tmp_path: Path, naive: Naive, task: str, unit: str) -> None:
    text = sentences(8, seed=4)
    (tmp_path / task).write_text(text, encoding="utf-8")
    row = measure(teacher, task, tmp_path, convention="gpt2-paper", stride=10)
    size = len(text) if task == "text8" else len(text.encode())
    assert (row.unit, row.units) == (unit, size)
    assert row.tokens == len(naive.tokens(text))
    assert row.perplexity == pytest.approx(math.exp(row.loss * row.tokens / size), rel=1e-9)
    full = measure(teacher, task, tmp_path, convention="gpt2-paper")
    losses = naive.rolling(text)
    assert full.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.fixture(scope="module")
def eager(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Naive:
    """A model that often says `cat`, and often a stop word."""
    out = tmp_path_factory.mktemp("eager") / "m"
    model, tokenizer = GPT2LMHeadModel.from_pretrained(str(teacher)), load_tokenizer(str(teacher))
    (cat,), (the,) = tokenizer([" cat", " the"])["input_ids"]
    with torch.no_grad():
        model.transformer.wte.weight[cat] *= 5
        model.transformer.wte.weight[the] *= 6
    save_model(model, out, tokenizer, "# test\n")
    return Naive(out)


@pytest.mark.parametrize("convention", ["hf", "gpt2-paper", "lm-eval"])
def test_last_words(tmp_path: Path, eager: Naive, convention: str) -> None:
    """Passages of many lengths, longer than the window too, and last words of one token and of several."""
    words = [" cat", " under", " cat", " 日本"]
    texts = [sentences(1 + seed % 4, seed).removesuffix(".") + words[seed % 4] for seed in range(60)]
    file = tmp_path / "lambada_test.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    row = measure(eager.directory, "lambada", tmp_path, convention=convention)
    found = [eager.ending(*re.fullmatch(r"(.*)( [^ ]*)", text, re.DOTALL).groups()) for text in texts]
    sums = [sum(losses) for losses, _, _ in found]
    targets = sum(len(losses) for losses, _, _ in found)
    share = sum(hit for _, hit, _ in found) / len(found)
    assert 0 < share < 0.5
    assert row.accuracy == pytest.approx(share)
    assert (row.tokens, row.words) == (targets, 60)
    assert row.loss == pytest.approx(sum(sums) / targets, rel=1e-6)
    assert row.perplexity == pytest.approx(math.exp(sum(sums) / (targets if convention == "hf" else 60)), rel=1e-5)
    if convention != "gpt2-paper":
        assert row.accuracy_without_stop_words is None
        return
    names = [eager.tokenizer.decode([token]) for token in range(320)]
    ruled_out = [i for i, name in enumerate(names) if name.strip().lower() in STOP_WORDS and name.strip(" ").isalpha()]
    (cat,) = eager.tokens(" cat")
    without = 0
    for text, (_, _, logs) in zip(texts, found, strict=True):
        log = logs[0].clone()
        log[ruled_out] = -math.inf
        without += text.endswith(" cat") and int(log.argmax()) == cat
    assert share <= without / 60
    assert row.accuracy_without_stop_words == pytest.approx(without / 60)


def cbt(count: int) -> tuple[str, list[tuple[str, list[str], int]]]:
    """Return questions as the file has them, and as text: context, endings, which one is right."""
    names = ["cat", "dog", "mat", "log", "red", "blue", "sad", "big", "happy", "small"]
    blocks, known = [], []
    for number in range(count):
        lines = [f"{i} the {names[(number + i) % 10]} sat , and `` it ran . '' " for i in range(1, 3)]
        context = " ".join(f'the {names[(number + i) % 10]} sat, and "it ran."' for i in range(1, 3)) + " then the"
        lines.append(f"3 then the XXXXX was red .\t{names[number]}\t\t{'|'.join(names)}")
        blocks.append("\n".join(lines))
        known.append((context, [f" {name} was red." for name in names], number))
    return "\n\n".join(blocks) + "\n", known


def test_ten_candidates(teacher: Path, tmp_path: Path, naive: Naive) -> None:
    text, known = cbt(9)
    (tmp_path / "cbtest_CN_test_2500ex.txt").write_text(text, encoding="utf-8")
    row = measure(teacher, "cbt-cn", tmp_path, convention="gpt2-paper")
    hits, losses = 0, []
    for context, endings, right in known:
        sums = [sum(naive.ending(context, ending)[0]) for ending in endings]
        hits += sums.index(min(sums)) == right
        losses += naive.ending(context, endings[right])[0]
    assert row.accuracy == pytest.approx(hits / 9)
    assert row.tokens == len(losses)
    assert row.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    with pytest.raises(ConfigError, match="--convention lm-eval does not support the task cbt-cn"):
        measure(teacher, "cbt-cn", tmp_path, convention="lm-eval")
    with pytest.raises(DataError, match="none of the tasks fits the models and the convention"):
        measure(teacher, "all", tmp_path, convention="lm-eval")
    with pytest.raises(ConfigError, match="--stride has no effect"):
        measure(teacher, "cbt-cn", tmp_path, stride=8)


def test_texts_are_put_together_as_their_page_does(tmp_path: Path) -> None:
    files = {
        "ptb.valid.txt": " a b \n c d \n",
        "wikitext-103/wiki.test.tokens": " = a = \n \n b \n",
        "enwik8": "x\n\ny\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    ptb, wiki, enwik = (load_tasks([name], str(tmp_path))[0] for name in ("ptb", "wikitext-103", "enwik8"))
    assert ptb.joined() == "a b\n\nc d"
    assert wiki.joined() == " = a = \n\n\n\n\n b \n"
    assert enwik.joined() == "x\n\ny\n"
    assert ptb.source.endswith("ptb.valid.txt")


def test_the_last_part_of_a_hundred_million_bytes(tmp_path: Path) -> None:
    with (tmp_path / "enwik8").open("wb") as file:
        file.truncate(95_000_000 - 1)
        file.seek(95_000_000 - 1)
        file.write("é".encode() + b"x" * 4_999_999)
    (task,) = load_tasks(["enwik8"], str(tmp_path))
    assert task.text == "x" * 4_999_999


def test_all_tasks_whose_data_is_there(tmp_path: Path, data: Path, teacher: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(WIKI, encoding="utf-8")
    (tmp_path / "cbtest_NE_test_2500ex.txt").write_text(cbt(2)[0], encoding="utf-8")
    (tmp_path / "openwebtext").symlink_to(data)
    result = ppl(PplConfig(model=[str(teacher)], task=["all"], task_data=str(tmp_path)))
    assert [row.task for row in result.results] == ["wikitext", "cbt-ne", "openwebtext"]
    with pytest.raises(DataError, match="no data was found for any task"):
        load_tasks(["all"], str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="is one file, but there are several tasks"):
        load_tasks(["wikitext", "ptb"], str(tmp_path / "wiki.test.raw"))


def test_bad_task_files(tmp_path: Path) -> None:
    bad = {
        "lambada": ('{"text": "one"}', "at least two words"),
        "cbt-ne": ("1 a\n2 b XXXXX c", "question 1"),
        "ptb": (" \n", "no text"),
    }
    for name, (text, message) in bad.items():
        file = tmp_path / f"{name}.{'jsonl' if name == 'lambada' else 'txt'}"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_tasks([name], str(file))
    (tmp_path / "l.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=":1: no text in field 'text'"):
        load_tasks(["lambada"], str(tmp_path / "l.jsonl"))


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` returns of each kind of data set, put back as its file has it."""
    sentence = {"sentences": ["the cat sat ."], "question": "the XXXXX ran", "answer": "cat", "options": ["dog", "cat"]}
    answers = {
        "Salesforce/wikitext": [{"text": ""}, {"text": " = a = \n"}],
        "ptb-text-only/ptb_text_only": [{"sentence": "a b"}, {"sentence": "c"}],
        "EleutherAI/lambada_openai": [{"text": "a b"}],
        "afmck/text8": [{"text": "a b"}],
        "cam-cst/cbt": [sentence],
    }
    monkeypatch.setattr("tinygpt2.evaluation.tasks.dataset_rows", lambda name, *rest, **more: answers[name])
    names = ["wikitext", "ptb", "lambada", "cbt-cn", "text8"]
    wiki, ptb, lambada, questions, text8 = load_tasks(names, None)
    assert text8.text == "a b"
    assert wiki.text == " \n = a = \n"
    assert wiki.joined() == "\n\n = a = \n"
    assert ptb.text == " a b \n c \n"
    assert lambada.passages == ("a b",)
    assert questions.questions[0].endings == (" dog ran", " cat ran")
    assert questions.questions[0].right == 1


def test_no_network_is_one_message() -> None:
    for name, spec in SPECS.items():
        with pytest.raises(DataError, match=name) as caught:
            load_tasks([name], None)
        assert "--task-data" in caught.value.hint
        assert spec.published or name == "openwebtext" or spec.form not in ("", "cbt", "hellaswag")


def test_wikitext_has_its_published_numbers(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    for source in (shared_data / "wikitext-2" / "wiki.test.raw", shared_data / "wikitext-2", shared_data):
        (task,) = load_tasks(["wikitext"], str(source))
        assert len(tokenizer(task.joined())["input_ids"]) == 287_644
    (task,) = load_tasks(["wikitext-2"], str(shared_data))
    assert len(task.text.split()) + task.text.count("\n") == 245_569
