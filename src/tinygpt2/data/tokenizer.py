"""Load tokenizers from a directory, the Hub or tiktoken, and compare them by their fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt2.data.encoding import LETTERS, merge_ends, parsed
from tinygpt2.errors import ModelError, one_line
from tinygpt2.utils.hub import local_directory

if TYPE_CHECKING:
    import tiktoken

    from tinygpt2.utils.types import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pre-tokenizer, as tiktoken writes it
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_PROBE = "Hello, world! It's 2 o'clock;\n\tnaïve café, 你好, 🙂  <|endoftext|> ok."


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory contains the files of a tokenizer."""
    return (directory / "tokenizer.json").is_file() or all(
        (directory / f).is_file() for f in ("vocab.json", "merges.txt")
    )


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from a directory (vocab.json and merges.txt are enough), the Hub or tiktoken.

    Raises:
        ModelError: the tokenizer was not found, cannot be loaded, or loses text, as with an empty vocabulary.
    """
    if name.startswith("tiktoken:"):
        return _from_tiktoken(name.removeprefix("tiktoken:"))
    directory = local_directory(name, "tokenizer")
    if not has_tokenizer(directory):
        raise ModelError(f"no tokenizer in {directory}: it has neither tokenizer.json nor vocab.json with merges.txt")
    try:
        tokenizer = _read(directory)
        ids = tokenizer(_PROBE, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        kept = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    except Exception as error:  # broken files raise many kinds of exceptions
        raise ModelError(f"cannot load the tokenizer in {directory}: {one_line(error)}") from error
    byte_level = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"
    if not kept.strip() or (byte_level and kept.strip() != _PROBE):
        raise ModelError(
            f"the tokenizer in {directory} ({len(tokenizer)} tokens) loses text: encoding and decoding changes it",
            "check its files",
        )
    return tokenizer


def _from_tiktoken(name: str) -> Tokenizer:
    """Load one of tiktoken's vocabularies as a Hugging Face tokenizer.

    Raises:
        ModelError: tiktoken has no vocabulary of that name, or its files are neither on this machine nor downloadable.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError as error:
        known = ", ".join(tiktoken.list_encoding_names())
        raise ModelError(f"no tiktoken vocabulary {name!r}: {error}", f"the known vocabularies are {known}") from error
    except Exception as error:  # network failures raise many kinds of exceptions
        raise ModelError(
            f"tiktoken's files for {name!r} are not available: {one_line(error, 160)}",
            "set TIKTOKEN_CACHE_DIR to a folder that contains them, or check the network",
        ) from error
    return convert_tiktoken(encoding)


def convert_tiktoken(encoding: tiktoken.Encoding) -> Tokenizer:
    """Convert a tiktoken encoding to an equal Hugging Face tokenizer. Unused ids become special tokens."""
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    ranks = encoding._mergeable_ranks
    spelled = {token: token.decode("latin-1").translate(LETTERS) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        ends = merge_ends(token, rank, ranks)
        if len(ends) == 2:  # no merge makes the other tokens: they match only a whole word
            merges.append((spelled[token[: ends[0]]], spelled[token[ends[0] :]]))
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    unused = set(range(encoding.n_vocab)) - {*vocabulary.values(), *encoding._special_tokens.values()}
    special = {**encoding._special_tokens, **{f"<|unused_{index}|>": index for index in sorted(unused)}}
    whole = len(merges) + 256 == len(ranks)
    backend = Backend(BPE({**vocabulary, **special}, merges, ignore_merges=not whole))
    if encoding._pat_str == GPT2_PATTERN:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        # `tokenizers` reads these differently: $ would also match at the end of a line, and {n,m}+ is not possessive
        pattern = Regex(encoding._pat_str.replace("$", r"\z").replace("}+", "}"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _read(directory: Path) -> Tokenizer:
    # AutoTokenizer refuses a folder that has only vocab.json and merges.txt; GPT-2's own class reads it
    if (directory / "tokenizer.json").is_file():
        from transformers import AutoTokenizer as Kind
    else:
        from transformers import GPT2TokenizerFast as Kind  # this does not load torch
    tokenizer: Tokenizer = Kind.from_pretrained(str(directory))
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of everything that an encoding depends on: vocabulary, merges, normalizer, pre-tokenizer.

    It is equal for the same tokenizer in both layouts (tokenizer.json, or vocab.json with merges.txt).
    """
    backend = parsed(tokenizer.backend_tokenizer.to_str())
    merges = backend["model"].get("merges")
    parts = {
        "vocab": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
        "merges": merges and [m if isinstance(m, str) else " ".join(m) for m in merges],
        "normalizer": backend["normalizer"],
        "pre_tokenizer": backend["pre_tokenizer"],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
