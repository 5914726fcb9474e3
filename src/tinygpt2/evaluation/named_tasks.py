"""The named tasks: what kind of text each is, where it is found, and what GPT-2 is published to reach on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tinygpt2.evaluation.choices.paradigms import PARADIGMS
from tinygpt2.evaluation.detokenize import Style

TextUnit = Literal["word", "character", "byte"]
ALL = "all"  # instead of a name: every task whose text is found
OWN = "choice:"  # before the path of a file with questions of one's own
EVERY = "*"  # all paradigms of BLiMP


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset on the Hub.

    Attributes:
        parquet: read the Hub's conversion to Parquet, because the dataset itself is a loading script.
    """

    name: str
    configuration: str | None = None
    split: str = "test"
    parquet: bool = False

    def __str__(self) -> str:
        return ":".join(part for part in (self.name, self.configuration, self.split) if part)


@dataclass(frozen=True)
class TaskSpec:
    """The properties of a task, known before its text is read.

    Attributes:
        kind: a running text, passages whose last word is predicted (LAMBADA), questions with several answers, or
            pregenerated blocks.
        form: of questions, the form of their rows: `cbt`, or one of `questions.FORMS`.
        unit: the unit by which GPT-2's paper divides the loss.
        style: the style of detokenization; None if the text is not split into words.
        lines: whether the end of every line counts as a word, as in word-level models.
        joined: how the `hf` and `tinygpt2` conventions join the lines, with an empty line between them. `rows`: a blank
            line becomes an empty row, and other lines keep their line end, as on the Hub. `lines`: without line ends.
        files: patterns of the file's name, the preferred one first; they may include the name of a folder.
        source: the dataset on the Hub, if there is one.
        column: the column of the dataset that holds the text.
        published: published values of OpenAI's gpt2 (124M), with their source; empty if we know none.
    """

    name: str
    kind: Literal["text", "passages", "choices", "blocks"] = "text"
    form: str = ""
    unit: TextUnit = "word"
    style: Style | None = None
    lines: bool = False
    joined: Literal["rows", "lines"] | None = None
    files: tuple[str, ...] = ()
    source: HubSplit | None = None
    column: str = "text"
    published: str = ""

    @property
    def copies(self) -> tuple[str, ...]:
        """Patterns of the names of the Hub's Parquet files, as far as they name the dataset's configuration."""
        if self.source is None:
            return ()
        dataset = self.source.name.split("/")[-1]
        if self.source.configuration is None:
            return f"{dataset}*/{self.source.split}-*.parquet", f"{dataset}*/data/{self.source.split}-*.parquet"
        part = f"{self.source.configuration}/{self.source.split}"
        return f"{part}-*.parquet", f"{part}/*.parquet"

    @property
    def parts(self) -> list[TaskSpec]:
        """The parts of BLiMP, each with a file of its own; any other task is its only part."""
        if self.source is None or self.source.configuration != EVERY:
            return [self]
        return [
            replace(self, files=(f"{name}.jsonl",), source=replace(self.source, configuration=name))
            for name in PARADIGMS
        ]


_PAPER = "GPT-2 paper, table 3"

SPECS = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "wikitext", style="wikitext", lines=True, joined="rows", files=("wiki.test.raw",),
            source=HubSplit("Salesforce/wikitext", "wikitext-2-raw-v1"),
            published="29.94 (hf; transformers#13761), 37.37 per word (lm-eval; same source)",
        ),
        TaskSpec(
            "wikitext-2", style="wikitext", lines=True, joined="rows",
            files=("wikitext-2*/wiki.test.tokens", "wikitext-2*/test.txt"),
            source=HubSplit("Salesforce/wikitext", "wikitext-2-v1"), published=f"29.41 per word ({_PAPER})",
        ),
        TaskSpec(
            "wikitext-103", style="wikitext", lines=True, joined="rows",
            files=("wikitext-103*/wiki.test.tokens", "wikitext-103*/test.txt"),
            source=HubSplit("Salesforce/wikitext", "wikitext-103-v1"), published=f"37.50 per word ({_PAPER})",
        ),
        TaskSpec(
            "ptb", style="ptb", lines=True, joined="lines",
            files=("ptb.test.txt", "ptb*/test.txt", "ptb.valid.txt", "ptb*/valid.txt"),
            source=HubSplit("ptb-text-only/ptb_text_only", "penn_treebank", parquet=True), column="sentence",
            published=f"65.85 per word ({_PAPER})",
        ),
        TaskSpec(
            "lambada", kind="passages", files=("lambada_test.jsonl", "lambada_test*.jsonl", "lambada_test*.txt"),
            source=HubSplit("EleutherAI/lambada_openai", "default"),
            published=f"35.13 per word, accuracy 45.99 % ({_PAPER}); 40.06, 32.56 % (lm-eval#2159)",
        ),
        TaskSpec(
            "cbt-cn", kind="choices", form="cbt", files=("cbtest_CN_test_2500ex.txt",),
            source=HubSplit("cam-cst/cbt", "CN"),
            published=f"accuracy 87.65 % ({_PAPER})",
        ),
        TaskSpec(
            "cbt-ne", kind="choices", form="cbt", files=("cbtest_NE_test_2500ex.txt",),
            source=HubSplit("cam-cst/cbt", "NE"),
            published=f"accuracy 83.4 % ({_PAPER})",
        ),
        TaskSpec(
            "hellaswag", kind="choices", form="hellaswag", files=("hellaswag_val.jsonl", "hellaswag*/val*.jsonl"),
            source=HubSplit("Rowan/hellaswag", split="validation"),
            published="acc 28.92 %, acc_norm 31.14 % (lm-eval#2159)",
        ),
        TaskSpec(
            "arc-easy", kind="choices", form="arc", files=("ARC-Easy-Test.jsonl",),
            source=HubSplit("allenai/ai2_arc", "ARC-Easy"),
        ),
        TaskSpec(
            "arc-challenge", kind="choices", form="arc", files=("ARC-Challenge-Test.jsonl",),
            source=HubSplit("allenai/ai2_arc", "ARC-Challenge"),
        ),
        TaskSpec(
            "piqa", kind="choices", form="piqa",
            files=("piqa*/dev.jsonl", "piqa*/valid.jsonl", "physicaliqa*/dev.jsonl"),
            source=HubSplit("baber/piqa", split="validation"),
        ),
        TaskSpec(
            "winogrande", kind="choices", form="winogrande", files=("winogrande*/dev.jsonl",),
            source=HubSplit("allenai/winogrande", "winogrande_xl", "validation"),
        ),
        TaskSpec(
            "openbookqa", kind="choices", form="openbookqa", files=("Main/test.jsonl", "openbookqa*/test.jsonl"),
            source=HubSplit("allenai/openbookqa", "main"),
        ),
        TaskSpec(
            "boolq", kind="choices", form="boolq",
            files=("BoolQ/val.jsonl", "boolq*/val.jsonl", "BoolQ/dev.jsonl", "boolq*/dev.jsonl"),
            source=HubSplit("aps/super_glue", "boolq", "validation"),
        ),
        TaskSpec(
            "blimp", kind="choices", form="blimp", files=(f"{PARADIGMS[0]}.jsonl and {len(PARADIGMS) - 1} others",),
            source=HubSplit("nyu-mll/blimp", EVERY, "train"),
        ),
        TaskSpec("enwik8", unit="byte", files=("enwik8", "enwik8.txt"), published=f"1.16 bits per byte ({_PAPER})"),
        TaskSpec(
            "text8", unit="character", files=("text8", "text8.txt"), source=HubSplit("afmck/text8"),
            published=f"1.17 bits per character ({_PAPER})",
        ),
        TaskSpec(
            "1bw", style="news", lines=True, joined="lines", files=("news.en.heldout-00000-of-00050",),
            published=f"75.20 per word ({_PAPER})",
        ),
        TaskSpec("openwebtext", kind="blocks", files=("openwebtext*",)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TaskInfo:
    """A named task in the output of `--list-tasks`."""

    name: str
    unit: str
    detokenizer: str
    source: str
    files: str
    published_gpt2: str


@dataclass(frozen=True)
class TaskList:
    """Every named task."""

    tasks: list[TaskInfo]


def list_tasks() -> TaskList:
    """Describe every named task."""
    units = {"passages": "last word", "choices": "one of several answers"}
    return TaskList([
        TaskInfo(
            spec.name, units.get(spec.kind, spec.unit), "cbt" if spec.form == "cbt" else spec.style or "-",
            "a pregenerated dataset" if spec.kind == "blocks" else str(spec.source or "--task-data only"),
            ", ".join(spec.files), spec.published or "-",
        )
        for spec in SPECS.values()
    ])  # fmt: skip
