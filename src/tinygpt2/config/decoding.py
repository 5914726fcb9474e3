"""Options of `generate`, `sample` and `bench`, and of sampling in other commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

from tinygpt2.config.base import Config, extra, flag_name, option
from tinygpt2.config.common import DECODING, MAX_SEED, OWN_TEXT, RUN, TEXT
from tinygpt2.config.data import H5PY_HINT, Format
from tinygpt2.config.models import DeviceOptions, ModelOptions

DecodingWeights = Literal["fp32", "bf16", "int8"]
Sampler = Literal["student", "teacher", "mixture"]
ReplaySchedule = Literal["constant", "rising", "falling"]

DEFAULT_PROMPTS = "16:64; at most an eighth of a block, or half of one for pairs"


class GenerateConfig(ModelOptions, DeviceOptions):
    """Options of `generate`. Decoding is greedy without an option for sampling or beam search."""

    model: list[str] = option(
        "Model: a local directory or a Hub id. Repeat it to compare several.", path=True, metavar="PATH|ID"
    )
    prompt: list[str] = option(
        "Text to continue. Repeat it for several prompts.", default=[], shown="the start of a text"
    )
    prompt_file: str | None = option("UTF-8 file whose whole text is the prompt.", default=None, path=True)
    interactive: bool = option(
        "Start an interactive prompt. /temperature 0.7 changes a setting, Ctrl-D quits.", default=False
    )
    draft: str | None = option(
        "Small model with the same tokenizer that drafts tokens, which the model checks several at a time. The text is "
        "the model's own. Prints the share of accepted tokens and the speed-up.",
        default=None,
        path=True,
        metavar="PATH|ID",
    )
    draft_tokens: int = option("Tokens to draft before each check, with --draft.", default=4, ge=1)
    weights: DecodingWeights = option(
        "Format of the weights in memory. bf16 takes half of fp32's and int8 a quarter, and both change texts a "
        "little. On CPUs with AVX-512 they are faster, too; bench measures it.",
        default="fp32",
    )
    stats: bool = option(
        "Report how varied, repetitive and long the texts of each model are.", default=False, panel=RUN
    )
    max_new_tokens: int | None = option(
        "Maximum number of new tokens for each prompt.",
        default=None,
        panel=DECODING,
        ge=1,
        shown="100, or fewer if the model has fewer positions left",
    )
    temperature: float | None = option(
        "Sample with this temperature. Below 1 is more conservative, above 1 more diverse, and 0 is greedy.",
        default=None,
        panel=DECODING,
        ge=0,
    )
    top_k: int | None = option(
        "Sample from the K most likely tokens; 0 means all of them.", default=None, panel=DECODING, ge=0
    )
    top_p: float | None = option(
        "Sample from the most likely tokens that together have this probability.",
        default=None,
        panel=DECODING,
        gt=0,
        le=1,
    )
    num_beams: int = option("Beam search with this many beams.", default=1, panel=DECODING, ge=1)
    num_samples: int = option("Texts for each prompt: samples, or the best beams.", default=1, panel=DECODING, ge=1)
    seed: int = option("Seed for sampling.", default=42, panel=DECODING, ge=0, le=MAX_SEED)

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled: with any sampling option, or for several texts without beams."""
        given = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        return self.temperature != 0 and (given or (self.num_samples > 1 and self.num_beams == 1))

    @property
    def without_effect(self) -> list[str]:
        """The sampling options that are given but not used, because the temperature is 0."""
        given = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        return [flag_name(name) for name in given] if self.temperature == 0 else []

    def conflicts(self) -> Iterator[str]:
        """Check prompts and decoding."""
        given = [name for name in ("prompt", "prompt_file", "interactive") if getattr(self, name)]
        if self.stats and self.interactive:
            yield "--stats cannot be combined with --interactive: it counts the texts of given prompts"
        if len(given) > 1:
            yield f"{' and '.join(map(flag_name, given))} cannot be combined: give one of them"
        for one in self.changed("draft_tokens") if self.draft is None else []:
            yield f"{one} has no effect without --draft"
        if self.num_beams > 1 and self.samples:
            yield "--num-beams cannot be combined with --temperature, --top-k or --top-p: beam search does not sample"
        if self.num_beams > 1:
            for name in [name for name in ("draft", "weights") if getattr(self, name) not in (None, "fp32")]:
                yield f"--num-beams cannot be combined with {flag_name(name)}: beam search runs in transformers"
        if self.temperature == 0 and self.num_beams == 1 and self.num_samples > 1:
            yield f"--temperature 0 is greedy, so --num-samples {self.num_samples} would give the same text every time"
        if 1 < self.num_beams < self.num_samples:
            yield f"--num-samples {self.num_samples} is more than --num-beams {self.num_beams}"


def token_range(text: str | None) -> tuple[int, int] | None:
    """Return the two numbers of MIN:MAX; a single number is both. None, the default, stays None.

    Raises:
        ValueError: the text is not such a range.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"expected MIN:MAX, such as 16:64, got {text!r}")
    return least, most


def _range_mistakes(text: str | None) -> Iterator[str]:
    """Yield what is wrong with --prompt-tokens."""
    try:
        token_range(text)
    except ValueError as error:
        yield f"--prompt-tokens: {error}"


class SamplingOptions(Config):
    """How tokens are sampled."""

    temperature: float = option("Sample with this temperature.", default=1.0, panel=DECODING, gt=0)
    top_k: int = option("Sample from the K most likely tokens; 0 means all of them.", default=0, panel=DECODING, ge=0)
    top_p: float = option(
        "Sample from the most likely tokens that together have this probability.",
        default=1.0,
        panel=DECODING,
        gt=0,
        le=1,
    )


class SampleConfig(ModelOptions, DeviceOptions, SamplingOptions):
    """Options of `sample`."""

    model: str = option("Model that writes: a local directory or a Hub id.", path=True, metavar="PATH|ID")
    prompts: str | None = option(
        "Pregenerated dataset: texts begin as its training blocks do.",
        default=None,
        path=True,
        shown="every text begins after an end-of-text token",
    )
    out: str = option("Directory for the dataset.", path=True)
    tokens: int | None = option(
        "Tokens to sample; those of prompts do not count.",
        default=None,
        ge=1,
        shown="one text for each block of --prompts; without, 1,000,000",
    )
    prompt_tokens: str | None = option(
        "Minimum and maximum number of tokens in a prompt. Each prompt has a random length between them.",
        default=None,
        panel=DECODING,
        metavar="MIN:MAX",
        shown=DEFAULT_PROMPTS,
    )
    max_new_tokens: int | None = option(
        "Maximum number of tokens to sample in a text.",
        default=None,
        panel=DECODING,
        ge=1,
        shown="as many as a block and the model's positions have room for",
    )
    weights: DecodingWeights = option("Format of the weights in memory: see generate.", default="fp32", panel=RUN)
    batch_size: int = option(
        "Texts side by side. Only rounding can make the result depend on it.", default=32, panel=RUN, ge=1
    )
    sequence_length: int | None = option(
        "Tokens in a block.", default=None, panel=TEXT, ge=2, shown="the positions of the model"
    )
    test_fraction: float = option(
        "Share of the texts to hold out for evaluation.", default=0.05, panel=TEXT, ge=0, lt=1
    )
    seed: int = option("Seed for sampling, and for the choice of held-out texts.", default=42, ge=0, le=MAX_SEED)
    format: Format = option(
        "Output format: arrow (Hugging Face datasets), hdf5 (Cerebras) or jsonl (TinyGPT2).", default="arrow"
    )
    overwrite: bool = option(
        "Replace the dataset in --out, if there is one, when the new one is complete.", default=False
    )
    resume: bool = option("Continue an interrupted run, if there is one.", default=False)

    @property
    def prompt_range(self) -> tuple[int, int] | None:
        """The fewest and the most tokens of a prompt; None leaves them to the length of the blocks."""
        return token_range(self.prompt_tokens)

    def conflicts(self) -> Iterator[str]:
        """Check the range of prompts, and the format."""
        yield from super().conflicts()
        yield from _range_mistakes(self.prompt_tokens)
        if self.prompts is None and self.prompt_tokens is not None:
            yield "--prompt-tokens has no effect without --prompts"
        if self.format == "hdf5" and find_spec("h5py") is None:
            yield f"--format hdf5: h5py is not installed; {H5PY_HINT}"


class OwnTextOptions(Config):
    """Options of text that is sampled while a student learns."""

    on_policy_fraction: float = option(
        "Share of the training sequences that the student writes itself: it continues the beginnings of blocks. The "
        "loss counts the continuation alone, up to its first end-of-text token.",
        default=0.0,
        panel=OWN_TEXT,
        ge=0,
        le=1,
    )
    prompt_tokens: str | None = option(
        "Minimum and maximum number of tokens in such a beginning. Each has a random length between them.",
        default=None,
        panel=OWN_TEXT,
        metavar="MIN:MAX",
        shown=DEFAULT_PROMPTS,
    )
    max_new_tokens: int | None = option(
        "Maximum number of tokens to sample after it.",
        default=None,
        panel=OWN_TEXT,
        ge=1,
        shown="as many as a block has after MAX tokens",
    )
    sample_temperature: float = option(
        "Sample with this temperature. The losses have their own, --temperature.", default=1.0, panel=OWN_TEXT, gt=0
    )
    samples_per_prompt: int = option("Continuations of each beginning.", default=1, panel=OWN_TEXT, ge=1)
    sampler: Sampler = option(
        "Who writes: the student, the teacher (sequence-level distillation), or both: each token from a mixture of "
        "their distributions, with importance weights.",
        default="student",
        panel=OWN_TEXT,
    )
    teacher_share: float = option("Share of the teacher in the mixture.", default=0.2, panel=OWN_TEXT, gt=0, lt=1)
    normalise_returns: bool = option(
        "With policy_gradient, divide the return of each token by the number of tokens after it.",
        default=True,
        panel=OWN_TEXT,
    )
    steps_per_sample: int = option("Optimizer steps on the same sampled sequences.", default=1, panel=OWN_TEXT, ge=1)
    clip_ratio: float = option(
        "With policy_gradient, clip as PPO does: a token whose probability has moved by more than this share since it "
        "was drawn is not pushed further. 0 turns clipping off.",
        default=0.2,
        panel=OWN_TEXT,
        ge=0,
        lt=1,
    )
    replay: int = option(
        "Keep the last N sampled sequences, and use them again in the place of new ones.",
        default=0,
        panel=OWN_TEXT,
        ge=0,
    )
    replay_schedule: ReplaySchedule = option(
        "With --replay, the share that is sampled anew: constant (half), rising from none to all, or falling from all "
        "to none over the run.",
        default="falling",
        panel=OWN_TEXT,
    )
    fraction_growth: float = option(
        "Raise --on-policy-fraction by this whenever the held-out loss has risen by more than 0.1 since the last rise.",
        default=0.0,
        panel=OWN_TEXT,
        ge=0,
        le=1,
    )

    @property
    def reuses_text(self) -> bool:
        """Whether sampled sequences are used in later steps, too."""
        return bool(self.replay) or self.steps_per_sample > 1

    @property
    def samples_text(self) -> bool:
        """Whether sequences are sampled, now or later."""
        return bool(self.on_policy_fraction or self.fraction_growth)

    @property
    def prompt_range(self) -> tuple[int, int] | None:
        """The fewest and the most tokens of a prompt; None leaves them to the length of the blocks."""
        return token_range(self.prompt_tokens)

    def conflicts(self) -> Iterator[str]:
        """Check the range of prompts, and that options of sampling have an effect."""
        yield from super().conflicts()
        yield from _range_mistakes(self.prompt_tokens)
        fields = {name: field for name, field in type(self).options().items() if extra(field, "panel") == OWN_TEXT}
        given = self.changed(*fields)
        for one in self.changed("teacher_share") if self.sampler != "mixture" else []:
            yield f"{one} has no effect on --sampler {self.sampler}"
        for one in self.changed("replay_schedule") if not self.replay else []:
            yield f"{one} has no effect without --replay"
        if given and not self.samples_text and "on_policy_fraction" not in self.model_fields_set:
            yield f"{' and '.join(given)} has no effect without --on-policy-fraction"


class BenchConfig(ModelOptions, DeviceOptions):
    """Options of `bench`."""

    model: list[str] = option(
        "Model: a local directory, a Hub id, or what export wrote: a GGUF file or an ONNX folder. Give several to "
        "compare them.",
        path=True, metavar="PATH|ID", positional=True,
    )  # fmt: skip
    new_tokens: int = option(
        "Tokens to decode in each turn, or fewer if the model has fewer positions left.", default=64, ge=2
    )
    prompt_tokens: int = option("Tokens of the prompt, or fewer if the model has fewer positions.", default=16, ge=1)
    turns: int = option(
        "How often each setting is measured, in turns with the others. The best one counts.", default=3, ge=1
    )
