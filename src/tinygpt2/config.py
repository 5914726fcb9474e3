"""One typed configuration per command. An option is declared once, here.

Order of precedence, weakest first: the default below, the recipe (distill), `--config FILE`, the flag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from tinygpt2.errors import ConfigError
from tinygpt2.schema import Config, extra, flag_name, option, read_yaml

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine", "exponential", "plateau", "wsd"]
PredictionLoss = Literal["soft_ce", "forward_kl", "reverse_kl", "jsd"]
HiddenScale = Literal["none", "variance"]
HeadMap = Literal["equal", "average"]
TeacherDtype = Literal["fp32", "bf16"]
EncodingErrors = Literal["strict", "replace", "skip"]
Format = Literal["arrow", "hdf5", "jsonl"]
Strategy = Literal["uniform", "alternate", "first", "last"]

LENGTH, OPTIMISATION, RUN = "Length of training", "Optimisation", "Running, logging and saving"
OBJECTIVES, TEXT, DECODING = "Objectives", "Text", "Decoding"
MAX_SEED = 2**32 - 1  # what every random generator takes
DEFAULT_SEQUENCE_LENGTH = 1024


class QuickstartConfig(Config):
    """Options of `quickstart`."""

    out: str = option("tinygpt2-quickstart", "Directory for everything it makes; an earlier one is continued.")
    seed: int = option(42, "Seed of every random choice.", ge=0, le=MAX_SEED)


class ModelOptions(Config):
    """How weights are read: shared by every command that loads a model."""

    allow_pickle: bool = option(False, "Read pickled weights where there are no safetensors.", panel=RUN)


class SourceOptions(Config):
    """Where text comes from: shared by the commands that take sources."""

    source: list[str] = option(
        ...,
        "Files (text, jsonl, json, csv, parquet, arrow, tar; packed or plain), directories, patterns in quotes, "
        "- (stdin), python-docs, or a data set on the Hub (NAME:CONFIGURATION@SPLIT) or saved to disk.",
        positional=True,
    )


class TextOptions(Config):
    """How texts become documents: shared by every command that reads sources."""

    document: str | None = option(
        None,
        "What one document is in a text file: file, line, blank-line or separator:REGEX.",
        panel=TEXT,
        shown="file; a row of a table or of JSON is one",
    )
    text_column: str = option("text", "Field or column that holds the text of a row.", panel=TEXT)
    encoding_errors: EncodingErrors = option(
        "strict",
        "What to do with what is not UTF-8: stop, put a replacement character, or skip the document.",
        panel=TEXT,
    )

    def conflicts(self) -> Iterator[str]:
        """Check the document rule."""
        rule = self.document
        if rule is not None and rule.startswith("separator:"):
            pattern = rule.removeprefix("separator:")
            try:
                if re.compile(pattern).fullmatch(""):
                    yield f"--document separator:{pattern}: the pattern matches the empty string"
            except re.error as error:
                yield f"--document separator:{pattern}: not a regular expression ({error})"
        elif rule not in (None, "file", "line", "blank-line"):
            yield f"--document {rule!r}: expected file, line, blank-line or separator:REGEX"


class TrainTokenizerConfig(TextOptions, SourceOptions):
    """Options of `train-tokenizer`."""

    out: str = option(..., "Directory for the tokenizer.")
    vocab_size: int = option(50257, "Exact size of the vocabulary, <|endoftext|> included.", ge=257)
    test_fraction: float = option(
        0.01, "Share of the text held out, to report bytes per token on.", panel=TEXT, ge=0, lt=1
    )


class PackOptions(TextOptions):
    """How documents become packed blocks."""

    test_fraction: float = option(0.05, "Share of the documents held out.", panel=TEXT, ge=0, lt=1)
    append_eos: bool = option(True, "End every document with the end-of-text token.", panel=TEXT)
    num_workers: int | None = option(None, "Threads that tokenise.", panel=TEXT, ge=1, shown="one per core")
    shuffle: bool = option(True, "Shuffle the training documents before they are packed.", panel=TEXT)


class PregenerateConfig(PackOptions, SourceOptions):
    """Options of `pregenerate`."""

    sequence_length: int = option(DEFAULT_SEQUENCE_LENGTH, "Tokens in a block.", panel=TEXT, ge=2)
    tokenizer: str = option(
        ..., "Tokenizer: a local directory, a Hub id, or one of tiktoken's, such as tiktoken:cl100k_base."
    )
    out: str = option(..., "Directory for the dataset.")
    stride: int | None = option(None, "Tokens from one block's start to the next.", ge=1, shown="the sequence length")
    test_source: list[str] | None = option(
        None, "Held-out text of its own, in its own order; --test-fraction is then unused."
    )
    seed: int = option(42, "Seed of the order and of the choice of held-out documents.", ge=0, le=MAX_SEED)
    format: Format = option("arrow", "What is written: for datasets, for Cerebras' GPT-2, or for TinyGPT2.")
    shard: str | None = option(None, "Make only part I of N, written I/N, of what one run would make.")
    overwrite: bool = option(False, "Replace an existing dataset in --out once the new one is complete.")
    resume: bool = option(False, "Continue an interrupted run, if there is one.")

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """Which part to make, from 1, and of how many."""
        part, _, parts = (self.shard or "1/1").partition("/")
        return int(part), int(parts)

    def conflicts(self) -> Iterator[str]:
        """Check the stride against the length, and the part."""
        yield from super().conflicts()
        if self.shard is not None and not re.fullmatch(r"\d{1,9}/\d{1,9}", self.shard):
            yield f"--shard {self.shard!r}: expected I/N, such as 1/8"
        elif not 1 <= self.shard_numbers[0] <= self.shard_numbers[1]:
            yield f"--shard {self.shard}: the first of N parts is 1/N, the last N/N"
        length = self.sequence_length
        if self.stride is not None and self.stride > length:
            yield f"--stride {self.stride} is beyond --sequence-length {length}: tokens between blocks would be lost"


class TrainOptions(ModelOptions):
    """Options that pretrain, distill and finetune share."""

    out: str = option(..., "Directory for the trained model.")
    max_steps: int | None = option(None, "Optimizer steps.", panel=LENGTH, ge=1)
    num_epochs: float | None = option(None, "Passes over the training blocks.", panel=LENGTH, gt=0, shown="1")
    max_tokens: int | None = option(None, "Tokens to train on.", panel=LENGTH, ge=1)
    micro_batch_size: int = option(8, "Sequences per device and forward pass.", panel=OPTIMISATION, ge=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.", panel=OPTIMISATION, ge=1)
    learning_rate: float = option(5e-4, "Peak learning rate of AdamW.", panel=OPTIMISATION, gt=0)
    lr_schedule: Schedule = option("cosine", "Shape after the warm-up.", panel=OPTIMISATION)
    warmup_ratio: float = option(
        0.01, "Share of the steps in which the rate rises from 0.", panel=OPTIMISATION, ge=0, le=1
    )
    plateau_ratio: float = option(
        0.04, "Share of the steps at the peak, for --lr-schedule plateau.", panel=OPTIMISATION, ge=0, le=1
    )
    weight_decay: float = option(0.01, "AdamW's decay; never on biases and layer norms.", panel=OPTIMISATION, ge=0)
    grad_clip: float = option(1.0, "Largest norm of the gradient; 0 leaves it as it is.", panel=OPTIMISATION, ge=0)
    dropout: float = option(
        0.0, "Dropout while training, for all three of GPT-2's rates.", panel=OPTIMISATION, ge=0, lt=1
    )
    freeze: list[str] = option(
        [], "Parameters to leave as they are: a name pattern such as 'transformer.wte.*'.", panel=OPTIMISATION
    )
    precision: Precision = option(
        "fp32", "Arithmetic of the matrix products; weights stay float32.", panel=OPTIMISATION
    )
    compile: bool = option(False, "Compile the forward passes with torch.compile; needs a C++ compiler.", panel=RUN)
    gradient_checkpointing: bool = option(
        False, "Keep each layer's input only and run layers again for the gradients: less memory, more time.", panel=RUN
    )
    logit_chunk: int | None = option(
        None, "Tokens whose logits are held at a time.", panel=RUN, ge=1, shown="64 MiB of them, 512 on a GPU"
    )
    seed: int = option(42, "Seed of initial weights, data order and dropout.", panel=OPTIMISATION, ge=0, le=MAX_SEED)
    eval_every: int | None = option(None, "Steps between evaluations.", panel=RUN, ge=1, shown="only at the end")
    save_every: int = option(1000, "Steps between checkpoints; one is always saved at the end.", panel=RUN, ge=1)
    keep: int = option(1, "Checkpoints to keep, the newest.", panel=RUN, ge=1)
    resume: bool = option(False, "Continue from the newest checkpoint in --out, if there is one.", panel=RUN)
    log_every: int = option(10, "Steps between lines of metrics.jsonl.", panel=RUN, ge=1)
    report_to: list[str] = option([], "Also log to: tensorboard.", panel=RUN)

    def conflicts(self) -> Iterator[str]:
        """Check that one length is given and that the trackers are known."""
        yield from super().conflicts()
        lengths = [name for name in ("max_steps", "num_epochs", "max_tokens") if getattr(self, name) is not None]
        if len(lengths) > 1:
            yield f"{' and '.join(map(flag_name, lengths))} contradict each other: give one"
        for tracker in self.report_to:
            if tracker != "tensorboard":
                yield f"--report-to {tracker!r}: expected tensorboard"
        if self.lr_schedule == "plateau" and self.warmup_ratio + self.plateau_ratio > 1:
            yield "--warmup-ratio and --plateau-ratio together are beyond 1"


class PretrainConfig(TrainOptions):
    """Options of `pretrain`."""

    data: str = option(..., "Pregenerated dataset.")
    shape: str | None = option(None, "Random weights of this shape: a preset or a config file.", alias="model_config")
    model: str | None = option(None, "Start from these weights: a local directory or a Hub id.")

    def conflicts(self) -> Iterator[str]:
        """Exactly one start."""
        yield from super().conflicts()
        if (self.model is None) == (self.shape is None):
            yield "give one of --model-config (random weights) and --model (given weights)"


class FinetuneConfig(TrainOptions, PackOptions):
    """Options of `finetune`."""

    model: str = option(..., "Model to fine-tune: a local directory or a Hub id.")
    data: str = option(..., "Pregenerated dataset, or a text source that is packed with the model's tokenizer.")
    sequence_length: int | None = option(
        None, "Tokens in a block.", panel=TEXT, ge=2, shown="1024, or the model's positions where those are fewer"
    )


class DistillConfig(TrainOptions):
    """Options of `distill`. The recipe gives objectives and optimisation; whatever is named beside it wins.

    Sources: TinyGPT2 (attention, hidden, soft labels), DistilGPT2 (cosine, temperature).
    """

    teacher: str | None = option(None, "Teacher: a local directory or a Hub id.")
    student: str = option(..., "Student: a directory with weights, or a preset or config file for random weights.")
    data: str = option(..., "Pregenerated dataset.")
    teacher_dtype: TeacherDtype = option("fp32", "Type of the teacher's weights.", panel=OPTIMISATION)
    recipe: str = option(
        "default", "Objectives and optimisation: default, tinygpt2, distilgpt2, truncation or a YAML file."
    )
    attention_weight: float = option(0.0, "Weight of the attention scores' squared error.", panel=OBJECTIVES, ge=0)
    head_map: HeadMap = option(
        "equal",
        "Attention's heads: as many in both models, or the average of a group of teacher heads for each student head.",
        panel=OBJECTIVES,
    )
    relation_weight: float = option(
        0.0, "Weight of MiniLM's relations (q-q, k-k, v-v) of the last student layer.", panel=OBJECTIVES, ge=0
    )
    hidden_weight: float = option(0.0, "Weight of the hidden states' squared error.", panel=OBJECTIVES, ge=0)
    hidden_map: str = option(
        "all",
        "Student states compared: all, inner (not the last) or numbers such as 0,3 or 0,3=10 (teacher's state 10).",
        panel=OBJECTIVES,
        commas=True,
    )
    hidden_scale: HiddenScale = option(
        "none",
        "Divide the hidden error by the teacher state's variance, or not.",
        panel=OBJECTIVES,
    )
    prediction_weight: float = option(0.0, "Weight of the soft labels' loss.", panel=OBJECTIVES, ge=0)
    prediction_loss: PredictionLoss = option("forward_kl", "What compares the two predictions.", panel=OBJECTIVES)
    temperature: float = option(
        1.0,
        "Softens both predictions; the loss is multiplied by its square.",
        panel=OBJECTIVES,
        gt=0,
    )
    ce_weight: float = option(0.0, "Weight of next-token cross-entropy on the data.", panel=OBJECTIVES, ge=0)
    cosine_weight: float = option(0.0, "Weight of 1 - cos of the last hidden states.", panel=OBJECTIVES, ge=0)
    layer_map: str = option(
        "uniform",
        "Teacher layer for each student layer: uniform, last, first or 3,6,9,12.",
        panel=OBJECTIVES,
        commas=True,
    )

    @classmethod
    def layered(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Put the recipe under the given values."""
        return {**read_recipe(str(values.get("recipe", cls.model_fields["recipe"].default))), **values}

    @property
    def needs_teacher(self) -> bool:
        """Whether any active objective looks at the teacher."""
        weights = (self.attention_weight, self.relation_weight, self.hidden_weight)
        return any((*weights, self.prediction_weight, self.cosine_weight))

    def conflicts(self) -> Iterator[str]:
        """Check that there is something to learn, and someone to learn it from."""
        yield from super().conflicts()
        if self.needs_teacher and self.teacher is None:
            yield "missing --teacher: an objective with a weight above 0 compares the student with it"
        if not self.needs_teacher and not self.ce_weight:
            yield "every objective's weight is 0: there is nothing to learn"
        if self.layer_map not in ("uniform", "last", "first") and not re.fullmatch(r"\d+(,\d+)*", str(self.layer_map)):
            yield f"--layer-map {self.layer_map!r}: expected uniform, last, first or numbers such as 3,6,9,12"
        states = r"\d+(=\d+)?"
        if self.hidden_map not in ("all", "inner") and not re.fullmatch(f"{states}(,{states})*", str(self.hidden_map)):
            yield f"--hidden-map {self.hidden_map!r}: expected all, inner or numbers such as 0,3 or 0,3=10"
        if self.head_map != "equal" and not self.attention_weight:
            yield "--head-map average does nothing while --attention-weight is 0"
        if self.hidden_map != "all" and not self.hidden_weight:
            yield f"--hidden-map {self.hidden_map} does nothing while --hidden-weight is 0"
        if self.teacher_dtype != "fp32" and not self.needs_teacher:
            yield f"--teacher-dtype {self.teacher_dtype} does nothing: no objective looks at the teacher"


class TruncateStudentConfig(ModelOptions):
    """Options of `truncate-student`."""

    teacher: str = option(..., "Teacher: a local directory or a Hub id.")
    out: str = option(..., "Directory for the student.")
    num_layers: int | None = option(None, "Layers to keep.", ge=1)
    strategy: Strategy | None = option(
        None,
        "Which layers --num-layers keeps: uniform keeps both ends, alternate takes every N/M-th from 0.",
        shown="uniform",
    )
    layers: str | None = option(None, "Blocks to keep, counted from 0, such as 0,2,4,7,9,11.", commas=True)

    def conflicts(self) -> Iterator[str]:
        """Exactly one way to choose layers."""
        if (self.num_layers is None) == (self.layers is None):
            yield "give one of --num-layers and --layers"
        if self.strategy is not None and self.layers is not None:
            yield "--strategy and --layers contradict each other: --layers already names the layers"
        if self.layers is not None and not re.fullmatch(r"\d+(,\d+)*", str(self.layers)):
            yield f"--layers {self.layers!r}: expected block numbers such as 0,2,4"


class PplConfig(ModelOptions):
    """Options of `ppl`."""

    model: list[str] = option(["gpt2"], "Model to measure, repeatable: a local directory or a Hub id.")
    task: list[str] = option(..., "What to measure on, repeatable: wikitext, a text file or a pregenerated dataset.")
    task_data: str | None = option(None, "File or folder that holds the named task's text, instead of a download.")
    stride: int | None = option(None, "Tokens from one window's start to the next.", ge=1, shown="the window")
    batch_size: int = option(8, "Windows in one forward pass.", ge=1)


class GenerateConfig(ModelOptions):
    """Options of `generate`. Greedy unless sampling or beams are asked for."""

    model: list[str] = option(..., "Model to try, repeatable: a local directory or a Hub id.")
    prompt: list[str] = option([], "Text to continue, repeatable.", shown="start of a text")
    prompt_file: str | None = option(None, "UTF-8 file whose whole text is the prompt.")
    interactive: bool = option(False, "Ask for prompts until end of input; earlier ones are in the history.")
    max_new_tokens: int | None = option(
        None, "Tokens to add.", panel=DECODING, ge=1, shown="100, or what the positions leave"
    )
    temperature: float | None = option(None, "Sample, with logits divided by this.", panel=DECODING, gt=0)
    top_k: int | None = option(None, "Sample among the k likeliest tokens.", panel=DECODING, ge=1)
    top_p: float | None = option(
        None, "Sample among the likeliest tokens that hold this share.", panel=DECODING, gt=0, le=1
    )
    num_beams: int = option(1, "Beam search of this width.", panel=DECODING, ge=1)
    num_samples: int = option(1, "Texts for each prompt: samples, or the best beams.", panel=DECODING, ge=1)
    seed: int = option(42, "Seed of sampling.", panel=DECODING, ge=0, le=MAX_SEED)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random: any sampling option, or several texts without beams."""
        asked = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        return asked or (self.num_samples > 1 and self.num_beams == 1)

    def conflicts(self) -> Iterator[str]:
        """Check prompts and decoding."""
        given = [name for name in ("prompt", "prompt_file", "interactive") if getattr(self, name)]
        if len(given) > 1:
            yield f"{' and '.join(map(flag_name, given))} contradict each other: give one"
        if self.num_beams > 1 and self.samples:
            yield "--num-beams contradicts --temperature, --top-k and --top-p: beam search does not sample"
        if 1 < self.num_beams < self.num_samples:
            yield f"--num-samples {self.num_samples} is beyond --num-beams {self.num_beams}"


class VerifyConfig(Config):
    """Options of `verify`."""

    path: str = option(..., "Pregenerated dataset or model directory.", positional=True)


def changed_mathematics(config: TrainOptions, earlier: dict[str, Any]) -> list[str]:
    """Return the options that differ from an earlier run's and alter what a resumed run computes."""
    now = config.model_dump(mode="json", by_alias=True)
    keys = [key for key, field in config.options().items() if extra(field, "panel") != RUN and key != "out"]
    return [flag_name(key) for key in keys if key in earlier and earlier[key] != now[key]]


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe: a shipped one by its name, or a YAML file.

    Raises:
        ConfigError: no such recipe, or it sets something that is neither objective nor optimisation.
    """
    shipped = {
        Path(item.name).stem: Path(str(item))
        for item in files("tinygpt2.recipes").iterdir()
        if item.name.endswith(".yaml")
    }
    path = shipped.get(name, Path(name))
    if name not in shipped and not path.is_file():
        raise ConfigError(f"no recipe {name!r}: no such file", f"shipped recipes: {', '.join(sorted(shipped))}")
    values = read_yaml(path)
    allowed = {
        key for key, field in DistillConfig.options().items() if extra(field, "panel") in (OBJECTIVES, OPTIMISATION)
    }
    if stray := sorted(set(values) - allowed):
        raise ConfigError(f"recipe {name}: {', '.join(stray)}: a recipe holds objectives and optimisation only")
    return values
