"""A tokenizer cut by rank: the first merges of a byte-level BPE, with all bytes and special tokens.

A BPE joins the pair whose merge has the lowest rank. So up to the last merge that is kept, both tokenizers do the same,
and afterwards the whole one only joins further. Every border of its tokens is therefore a border of the cut one's, and
its tokens consist of the cut one's: of those that the kept merges alone make of their bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.data.encoding import LETTERS, is_plain_bpe, missing_bytes
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.compatibility import first_token

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class RankCut:
    """A tokenizer that was cut: by rank, or to other tokens that its merges can make.

    Attributes:
        tokenizer: the smaller one. The order of the tokens is the old one.
        rows: for each token that a model has a row for, its number in the whole vocabulary.
    """

    tokenizer: Tokenizer
    rows: tuple[int, ...]


def cut_by_rank(
    tokenizer: Tokenizer, size: int, rows: int, order: Sequence[int] | None = None, option: str = "--vocab-size"
) -> RankCut:
    """Keep the first tokens of a tokenizer by the rank of their merges, with all bytes and special tokens.

    Args:
        size: number of tokens to keep. Special tokens that the model has no row for are kept, too, and do not count.
        rows: number of tokens that the model has rows for.
        order: the tokens in another order, in which every token comes after those that it is merged from; see
            `by_use`. The merges that are kept stay in theirs.
        option: what gave the size, for messages.

    Raises:
        ModelError: the tokenizer is no byte-level BPE that vocabulary and merges define alone.
        ConfigError: the size is too small for the bytes and special tokens, or larger than the vocabulary.
    """
    content, vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    model = content["model"]
    if not is_byte_level(content, vocabulary.__contains__):
        raise ModelError(
            f"{option} needs a byte-level BPE, such as GPT-2's, but the teacher's tokenizer is of another kind",
            f"leave out {option}",
        )
    always = {item["content"] for item in content["added_tokens"]} | {model.get("unk_token")}
    always |= {chr(letter) for letter in LETTERS.values()}
    kept = {vocabulary[token] for token in always if token in vocabulary}
    least = sum(token < rows for token in kept)
    if size < least:
        raise ConfigError(f"{option} {size} is too small: the bytes and special tokens alone are {least} tokens")
    made = [vocabulary["".join(pair)] for pair in merged_pairs(model)]
    first = len(made)  # the merges that can stay
    for place, token in enumerate(made if order is None else order):
        if token not in kept and least == size:
            first = place if order is None else first
            break
        least += token not in kept
        kept.add(token)
    if least < size:
        raise ConfigError(f"{option} {size}: the teacher's tokenizer has only {least} tokens that texts can have")
    numbers = {old: new for new, old in enumerate(sorted(kept))}
    model["vocab"] = {token: numbers[old] for token, old in vocabulary.items() if old in kept}
    pairs = zip(model["merges"][:first], merged_pairs(model), made, strict=False)
    model["merges"] = [merge for merge, pair, token in pairs if kept.issuperset((token, *map(vocabulary.get, pair)))]
    for item in content["added_tokens"]:
        item["id"] = numbers[item["id"]]
    _renumber(content["post_processor"], lambda token: numbers[vocabulary[token]])
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Backend.from_str(json.dumps(content))
    return RankCut(smaller, tuple(old for old in numbers if old < rows))


def merged_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return both parts of each merge of a BPE.

    Args:
        model: of its tokenizer.json.
    """
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def is_byte_level(content: dict[str, Any], is_token: Callable[[str], bool]) -> bool:
    """Return whether a tokenizer is a byte-level BPE that vocabulary and merges define alone, without a normalizer.

    Args:
        content: of its tokenizer.json.
    """
    byte_level = '"ByteLevel"' in json.dumps(content["pre_tokenizer"]) and not missing_bytes(is_token)
    return byte_level and is_plain_bpe(content["model"]) and not content["normalizer"]


def _renumber(processor: dict[str, Any] | None, number: Callable[[str], int]) -> None:
    """Give the special tokens that a post-processor adds their new numbers, in place."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        _renumber(part, number)
    for one in (processor.get("special_tokens") or {}).values():
        one["ids"] = [number(token) for token in one["tokens"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], number(processor[name][0])]


@torch.no_grad()
def cut_vocabulary(model: GPT2LMHeadModel, cut: RankCut) -> GPT2LMHeadModel:
    """Return a model with some rows of the embeddings and of the output matrix, in evaluation mode."""
    numbers = {old: new for new, old in enumerate(cut.rows)}
    ends = {name: first_token([getattr(model.config, name, None)], model.config) for name in ENDS}
    ends = {name: None if end is None else numbers.get(end) for name, end in ends.items()}
    rows = torch.tensor(cut.rows, device=model.lm_head.weight.device)
    return with_rows(model, len(cut.rows), ends, lambda table: table[rows])


def with_rows(
    model: GPT2LMHeadModel, size: int, ends: dict[str, int | None], make: Callable[[Tensor], Tensor]
) -> GPT2LMHeadModel:
    """Return a model with other embeddings, and the same blocks, in evaluation mode.

    Args:
        size: number of tokens.
        ends: the tokens at the beginning and the end of texts, and for padding.
        make: makes the new rows of the embeddings and of the output matrix out of the old ones.
    """
    other = GPT2LMHeadModel(type(model.config).from_dict({**model.config.to_dict(), "vocab_size": size, **ends}))
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = make(weights[name])
    other.load_state_dict(weights)
    return other.to(model.lm_head.weight.device).eval()


def same_cut(whole: Tokenizer, small: Tokenizer) -> RankCut | None:
    """Return the cut of a tokenizer that another tokenizer is; None if it is none."""
    if len(small) >= len(whole):
        return None
    try:
        cut = cut_by_rank(whole, len(small), len(whole))
    except (ConfigError, ModelError):
        return None
    return cut if fingerprint(cut.tokenizer) == fingerprint(small) else None
