"""`evaluate-text`: what models write after held-out prompts, and how a judge and the data see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tinygpt2.config.evaluation import EvaluateTextConfig
from tinygpt2.data.dataset import PackedDataset, load_packed_dataset
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.decoding.library import make_decoder
from tinygpt2.decoding.own_text import continued
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.decoding.text_statistics import TextStatistics, Written, text_statistics
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.evaluation.results import short_names
from tinygpt2.evaluation.scoring import Scorer, Scores, batches
from tinygpt2.evaluation.texts.prompts import Prompt, held_out_prompts, room_for
from tinygpt2.evaluation.texts.rouge import rouge_l
from tinygpt2.models.compatibility import check_fits, text_sizes
from tinygpt2.models.lm_head import scoring_chunk
from tinygpt2.models.loading import load_causal_lm, model_tokenizer
from tinygpt2.models.teachers.vocabularies import token_read_first
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.utils.charts import Chart, Series
from tinygpt2.utils.files import absolute
from tinygpt2.utils.plotting import draw, plot_may_fail
from tinygpt2.utils.progress import track

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_BUDGET = 4096  # tokens in one forward pass of both models


@dataclass(frozen=True)
class ExcessError:
    """How far a model is from the judge in the first tokens of texts.

    Attributes:
        tokens: number of first tokens.
        own, real: mean KL(judge || model) in nats per token, after the model's own tokens and after those of the data.
        excess: own / real - 1: what the errors of the model's own tokens add. The accumulated excess error of MiniLLM
            (arXiv:2306.08543, section 3.3) and Arora et al. 2022 (arXiv:2204.01171), with the judge for the data.
    """

    tokens: int
    own: float
    real: float
    excess: float


@dataclass(frozen=True)
class TextEvaluation:
    """What a model wrote after held-out prompts. Losses are in nats per token; standard errors are over prompts.

    Attributes:
        prompts: number of prompts, each continued once.
        judged_loss: of the judge on what the model wrote. A low one is no praise by itself: repetition lowers it.
        loss: of the model on what follows the prompts in the data.
        judge_loss: of the judge on the same.
        statistics: of what the model wrote.
        rouge_l: mean ROUGE-L of what it wrote and the responses in the data; None if the data are no pairs.
        excess: the accumulated excess error after 1, 2, 4, ... tokens.
    """

    model: str
    prompts: int
    judged_loss: float
    judged_stderr: float | None
    loss: float
    stderr: float | None
    judge_loss: float
    judge_stderr: float | None
    statistics: TextStatistics
    excess: list[ExcessError]
    rouge_l: float | None = None
    rouge_l_stderr: float | None = None


@dataclass(frozen=True)
class EvaluateTextResult:
    """The evaluation of each model's texts by one judge."""

    judge: str
    results: list[TextEvaluation]


@computes_on_device
def evaluate_text(config: EvaluateTextConfig) -> EvaluateTextResult:
    """Let models continue held-out prompts, and let a judge, the statistics of the texts and the data speak.

    Raises:
        ConfigError: prompts and new tokens do not fit into blocks or positions.
        DataError: the dataset is missing, has no test split, or was made with another tokenizer.
        ModelError: a model was not found, or does not have the judge's vocabulary.
    """
    data = load_packed_dataset(config.data)
    judge, results = _Model.load(config.judge, data, config), []
    scorer, names = judge.scorer(), list(dict.fromkeys(config.model))
    # all models continue the same prompts by equally many tokens
    positions = min(judge.positions, *(_Model.load(name, data, config, hollow=True).positions for name in names))
    new = room_for(config.max_new_tokens, positions)
    prompts = held_out_prompts(data, config.num_prompts, config.prompt_tokens, new, positions)
    for name in names:
        model = _Model.load(name, data, config)
        if model.vocabulary != judge.vocabulary:
            raise ModelError(
                f"model {name} has {model.vocabulary} tokens, and the judge {config.judge} has {judge.vocabulary}",
                "give a judge with the same vocabulary, such as the model's teacher",
            )
        results.append(_evaluated(model, scorer, data, prompts, new, config))
    result = EvaluateTextResult(absolute(config.judge), results)
    if config.plot is not None:
        with plot_may_fail(config.plot):
            draw([excess_chart(result)], Path(config.plot), f"judged by {result.judge}")
    return result


@dataclass(frozen=True)
class _Model:
    """A model that writes or judges.

    Attributes:
        start: the token that it reads before every text, if there is one: GPT-2 has none.
        positions: for the tokens of a text, without that one.
    """

    name: str
    model: PreTrainedModel
    vocabulary: int
    positions: int
    start: int | None

    @classmethod
    def load(cls, name: str, data: PackedDataset, config: EvaluateTextConfig, *, hollow: bool = False) -> _Model:
        """Load a model, or with `hollow` its sizes alone, and check that it has the tokens of the data."""
        model, directory = load_causal_lm(name, allow_pickle=config.allow_pickle, hollow=hollow)
        sizes, tokenizer = text_sizes(model), model_tokenizer(directory)
        # only prompts and what follows them have to fit into the positions
        read = SimpleNamespace(vocab_size=sizes.vocab_size, n_positions=data.sequence_length)
        check_fits(data, read, None if tokenizer is None else fingerprint(tokenizer), f"model {name}")
        start = token_read_first(model.config, tokenizer)
        return cls(name, model, int(sizes.vocab_size), int(sizes.n_positions) - (start is not None), start)

    def scorer(self) -> Scorer:
        """Return the model, ready to score."""
        scorer = Scorer(self.model, "fp32", current_device())
        scorer.begin_with(self.start)
        return scorer


def _evaluated(
    model: _Model,
    judge: Scorer,
    data: PackedDataset,
    prompts: list[Prompt],
    new: int,
    config: EvaluateTextConfig,
) -> TextEvaluation:
    end = data.manifest.get("eos_token_id")
    if end is None:
        raise ConfigError(f"the tokenizer of {data.name} has no end-of-text token, so texts have no end")
    model.model.to(current_device())
    written = _written(model, prompts, new, int(end), config)
    scorer, tokens = model.scorer(), [prompt.tokens for prompt in prompts]
    own = _compared(scorer, judge, tokens, written, new)
    real = _compared(scorer, judge, tokens, [prompt.following for prompt in prompts], new)
    texts = [Written(text[:-1] if text[-1] == end else text, text[-1] == end) for text in written]
    rouge = None
    if data.test.divided:
        rouge = _rouge(data.tokenizer(), texts, [prompt.following for prompt in prompts])
    return TextEvaluation(
        absolute(model.name),
        len(prompts),
        own.judge.loss,
        own.judge.stderr,
        real.model.loss,
        real.model.stderr,
        real.judge.loss,
        real.judge.stderr,
        text_statistics(texts),
        _excess(own.kl, real.kl),
        None if rouge is None else rouge.loss,
        None if rouge is None else rouge.stderr,
    )


def _written(model: _Model, prompts: list[Prompt], new: int, end: int, config: EvaluateTextConfig) -> list[list[int]]:
    """Return what the model writes after each prompt, with its end of text."""
    name, start = model.name, [] if model.start is None else [model.start]
    decoder, texts = make_decoder(model.model, "fp32", copies=True, name=name), list[list[int]]()
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    with track(f"texts of {name}", len(prompts), "prompts") as stage:
        for first in range(0, len(prompts), config.batch_size):
            some = prompts[first : first + config.batch_size]
            numbers = range(first, first + len(some))
            found = continued(
                decoder, [start + prompt.tokens for prompt in some], numbers, seed=config.seed, new=new, ends=[end],
                sampling=sampling, name=name,
            )  # fmt: skip
            lengths = found.lengths.tolist()
            texts += [row[:length] for row, length in zip(found.tokens.tolist(), lengths, strict=True)]
            stage.advance(len(some))
    return texts


@dataclass(frozen=True)
class _Compared:
    """Losses of both models on texts, and KL(judge || model) at each of their tokens; NaN after their ends."""

    model: Scores
    judge: Scores
    kl: Float[np.ndarray, "N M"]


@torch.no_grad()
def _compared(
    model: Scorer, judge: Scorer, prompts: Sequence[list[int]], texts: Sequence[list[int]], new: int
) -> _Compared:
    """Compare the predictions of two models at every token of the texts, a chunk of logits at a time."""
    sums, kl = np.zeros((2, len(texts))), np.full((len(texts), new), np.nan)
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    for batch in batches([len(row) for row in rows], _BUDGET):
        width = max(len(rows[number]) for number in batch)
        ids = torch.tensor([rows[number] + [0] * (width - len(rows[number])) for number in batch])
        ids = ids.to(model.head.matrix.device)
        states = [
            one.model.collect(ids, [one.model.shape.layers]).states[one.model.shape.layers] for one in (model, judge)
        ]
        for place, number in enumerate(batch):
            before, count = len(prompts[number]), len(texts[number])
            part = slice(before - 1, before + count - 1)
            targets = ids[place, before : before + count]
            losses, found = _differences(model, judge, states[0][place, part], states[1][place, part], targets)
            sums[:, number], kl[number, :count] = losses, found
    counts = np.array([len(text) for text in texts])
    return _Compared(Scores(sums[0], counts), Scores(sums[1], counts), kl)


def _differences(
    model: Scorer, judge: Scorer, own: Tensor, other: Tensor, targets: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed losses of both models, and KL(judge || model) at each target."""
    size, sums, kl = model.head.size, np.zeros(2), []
    step = scoring_chunk(size, own.device.type)
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        q = model.head.logits(own[part])[:, :size].float().log_softmax(-1)
        p = judge.head.logits(other[part])[:, :size].float().log_softmax(-1)
        right = targets[part, None]
        sums -= [float(x.gather(-1, right).double().sum()) for x in (q, p)]
        kl.append((p.exp() * (p - q)).sum(-1).cpu().double().numpy())
    return sums, np.concatenate(kl)


def _excess(own: Float[np.ndarray, "N M"], real: Float[np.ndarray, "N M"]) -> list[ExcessError]:
    """Return the accumulated excess error after 1, 2, 4, ... tokens, as far as there are texts of both kinds."""
    longest = int(min((~np.isnan(kl)).any(0).sum() for kl in (own, real)))
    means = [np.nanmean(kl[:, :longest], 0).cumsum() / np.arange(1, longest + 1) for kl in (own, real)]
    marks = sorted({*(1 << power for power in range(longest.bit_length())), longest})
    found = [(mark, float(means[0][mark - 1]), float(means[1][mark - 1])) for mark in marks]
    return [ExcessError(mark, a, b, a / b - 1 if b > 0 else 0.0) for mark, a, b in found]


def _rouge(tokenizer: Tokenizer, texts: Sequence[Written], responses: Sequence[list[int]]) -> Scores:
    """Return ROUGE-L of each text, as scores with one target each."""
    references = tokenizer.batch_decode(list(responses), skip_special_tokens=True)
    found = tokenizer.batch_decode([text.tokens for text in texts], skip_special_tokens=True)
    figures = [rouge_l(*pair) for pair in zip(references, found, strict=True)]
    return Scores(np.array(figures), np.ones(len(figures), np.int64))


def excess_chart(result: EvaluateTextResult) -> Chart:
    """Return the accumulated excess error of each model by the number of tokens."""
    names = short_names([one.model for one in result.results])
    series = [
        Series(names[one.model], [(float(point.tokens), 100 * point.excess) for point in one.excess])
        for one in result.results
    ]
    return Chart("accumulated excess error", "tokens", "percent", series, levels={"no excess": 0.0})
