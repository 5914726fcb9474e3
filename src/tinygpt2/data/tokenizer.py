"""Load tokenizers from a directory, the Hub or tiktoken, and compare them by their fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt2.data.encoding import LETTERS, encode, is_plain_bpe, merge_ends, missing_bytes, parsed
from tinygpt2.errors import ModelError, one_line
from tinygpt2.utils.files import read_json
from tinygpt2.utils.hub import local_directory

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as Backend

    from tinygpt2.utils.types import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pre-tokenizer, as tiktoken writes it
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
_PROBE = "Hello, world! It's 2 o'clock;\n\tnaïve café, 你好, 🙂  <|endoftext|> ok."


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory contains the vocabulary of a tokenizer, in any layout that `transformers` reads."""
    return bool(_vocabulary_files(directory))


def _vocabulary_files(directory: Path) -> list[str]:
    return sorted(file.name for pattern in _VOCABULARIES for file in directory.glob(pattern) if file.is_file())


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from a directory, the Hub or tiktoken.

    A directory may have any layout of which `transformers` makes a fast tokenizer: tokenizer.json, vocab.json with
    merges.txt, BERT's vocab.txt, or a model of sentencepiece. What tokenizer.json says is what is encoded.

    Raises:
        ModelError: the tokenizer was not found, cannot be loaded, has no fast version, or is byte-level and loses text.
    """
    if name.startswith("tiktoken:"):
        return _from_tiktoken(name.removeprefix("tiktoken:"))
    directory = local_directory(name, "tokenizer")
    if not (files := _vocabulary_files(directory)):
        raise ModelError(
            f"no tokenizer in {directory}: it has neither tokenizer.json nor vocab.json with merges.txt, vocab.txt "
            "or a *.model file"
        )
    from transformers import PreTrainedTokenizerFast

    named = ""
    try:
        named = tokenizer_class(directory)
        tokenizer = _read(directory, named)
    except Exception as error:  # broken files raise many kinds of exceptions
        read = f"{named} from {', '.join(files)}" if named else ", ".join(files)
        raise ModelError(
            f"cannot load the tokenizer in {directory} ({read}): {one_line(error, 300)}",
            "save it with plain transformers as tokenizer.json, or copy its files again",
        ) from error
    made = f"{type(tokenizer).__name__} from {', '.join(files)}"
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer in {directory} ({made}) has no fast version, and only fast tokenizers are supported",
            "convert it to a tokenizer.json with the library `tokenizers`",
        )
    if not tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False):
        raise ModelError(
            f"the tokenizer in {directory} ({made}) has no vocabulary",
            'if its files are whole, name its class in tokenizer_config.json, such as {"tokenizer_class": '
            '"BertTokenizer"} for vocab.txt',
        )
    _check_lossless(tokenizer, directory)
    return tokenizer


def tokenizer_class(directory: Path) -> str:
    """Return the class that a directory's configuration names for its tokenizer; an empty text if it names none."""
    settings = (_settings(directory / name) for name in ("tokenizer_config.json", "config.json"))
    return next((str(values["tokenizer_class"]) for values in settings if values.get("tokenizer_class")), "")


def _settings(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file that may be missing."""
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} contains no JSON object")
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{file.name} contains a lone surrogate, which is no text and cannot be saved") from error
    return content


def _read(directory: Path, class_name: str) -> Any:
    """Read a directory's tokenizer as `transformers` does, but as its files say.

    `transformers` rebuilds some classes, such as GPT2Tokenizer, from the vocabulary and merges of tokenizer.json, and
    loses its normalizer and pre-tokenizer. To a byte-level vocabulary it adds the special tokens that a class usually
    has. Here, the pipeline is always that of tokenizer.json, and no special token is added that no file names.
    """
    from tokenizers import Tokenizer as Backend
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

    stored, known = directory / "tokenizer.json", {}
    merges = all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))
    # AutoTokenizer refuses a folder that has only vocab.json and merges.txt, and it imports torch; GPT-2's own class
    # reads such a folder, and all that name it
    alone = merges and not class_name and not stored.is_file()
    named = class_name in ("GPT2Tokenizer", "GPT2TokenizerFast") and not (directory / "config.json").is_file()
    kind: Any = GPT2TokenizerFast
    if not (alone or named):
        from transformers import AutoTokenizer

        kind = AutoTokenizer
    tokenizer = kind.from_pretrained(str(directory), trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    find = tokenizer.backend_tokenizer.model.token_to_id
    if stored.is_file():
        backend = Backend.from_file(str(stored))
        find = backend.token_to_id
        if _pipeline(backend) != _pipeline(tokenizer.backend_tokenizer):
            kind = PreTrainedTokenizerFast
            known = {key: token for key, token in tokenizer.special_tokens_map.items() if find(token) is not None}
    own: set[str] = set()
    if type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel":
        settings = _settings(directory / "tokenizer_config.json") | _settings(directory / "special_tokens_map.json")
        added = _settings(directory / "added_tokens.json")
        own = {key for key, token in tokenizer.special_tokens_map.items() if find(token) is None and token not in added}
        own -= {key for key in settings if settings[key]}
    if own or kind is PreTrainedTokenizerFast:
        tokenizer = kind.from_pretrained(str(directory), trust_remote_code=False, **known, **dict.fromkeys(own))
    return tokenizer


def _pipeline(backend: Backend) -> dict[str, Any]:
    """Return what decides the tokens of a text and the text of tokens, without settings that change neither."""
    content = _content(backend)
    decoder, template = content.get("decoder"), content.get("post_processor") or {}
    return {
        "model": content["model"],
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "decoder": "ByteLevel" if decoder and decoder["type"] == "ByteLevel" else decoder,
        "template": {} if template.get("type") == "ByteLevel" or template.get("special_tokens") == {} else template,
    }


def _content(backend: Backend) -> dict[str, Any]:
    """Return the content of a tokenizer.json without settings that have no effect.

    Numbers are rounded to single precision, because `tokenizers` does not read exactly the numbers that it writes.
    """
    content: dict[str, Any] = json.loads(
        backend.to_str(), object_hook=_effective, parse_float=lambda number: float(np.float32(number))
    )
    return content


def _effective(item: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in item.items()
        if not (key == "trim_offsets" or value is None or value is False or value == "")
    }


def _check_lossless(tokenizer: Tokenizer, directory: Path) -> None:
    """Check that decoding restores a text. Only a byte-level tokenizer without a normalizer has to.

    Raises:
        ModelError: the text changes, or a byte of UTF-8 is no token.
    """
    backend = tokenizer.backend_tokenizer
    if type(backend.decoder).__name__ != "ByteLevel" or backend.normalizer is not None:
        return
    missing = missing_bytes(lambda letter: backend.token_to_id(letter) is not None)
    kept = backend.decode(encode(tokenizer, [_PROBE])[0], skip_special_tokens=False).strip()
    if kept == _PROBE and (not missing or getattr(backend.model, "unk_token", None)):
        return
    same = (index for index, (a, b) in enumerate(zip(kept, _PROBE, strict=False)) if a != b)
    at = max(0, next(same, min(len(kept), len(_PROBE))) - 10)
    change = f"{_PROBE[at : at + 30]!r} becomes {kept[at : at + 30]!r}"
    if missing:
        raise ModelError(
            f"the tokenizer in {directory} is a byte-level BPE that was trained without the whole byte alphabet: it "
            f"has no tokens for {len(missing)} bytes and loses text" + ("" if kept == _PROBE else f": {change}"),
            "train it again with initial_alphabet=ByteLevel.alphabet(), or with tinygpt2 train-tokenizer",
        )
    raise ModelError(
        f"the tokenizer in {directory} ({len(tokenizer)} tokens) loses text: {change}", "check its pre-tokenizer"
    )


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


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the largest token id plus one. It is more than the number of tokens if the vocabulary has holes."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def encoded_size(tokenizer: Tokenizer) -> int:
    """Return the largest token id that encoding a text can produce, plus one.

    Special tokens inside a text are text, so their ids do not occur; only the unknown token's does.
    """
    model = parsed(tokenizer.backend_tokenizer.to_str())["model"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = model.get("unk_id", tokenizer.backend_tokenizer.token_to_id(model.get("unk_token") or ""))
    return 1 + max(set(tokenizer.get_vocab().values()) - special | {-1 if unknown is None else unknown}, default=-1)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of everything that an encoding depends on.

    For a plain byte-level BPE these are vocabulary, merges, normalizer and pre-tokenizer; for other models also their
    type and parameters. Added tokens that are not special count too, because they are found inside any text. The
    fingerprint is equal for the same tokenizer in both layouts (tokenizer.json, or vocab.json with merges.txt).
    """
    backend = parsed(tokenizer.backend_tokenizer.to_str())
    model, vocabulary = backend["model"], tokenizer.get_vocab()
    merges = model.get("merges")
    parts = {
        "vocab": sorted(vocabulary.items(), key=lambda item: item[1]),
        "merges": merges and [m if isinstance(m, str) else " ".join(m) for m in merges],
        "normalizer": backend["normalizer"],
        "pre_tokenizer": backend["pre_tokenizer"],
    }
    byte_level = '"ByteLevel"' in json.dumps(backend["pre_tokenizer"]) and not missing_bytes(vocabulary.__contains__)
    if not (byte_level and is_plain_bpe(model)):
        # the scores of a Unigram stand in its list of tokens
        large = ("merges",) if isinstance(model["vocab"], list) else ("merges", "vocab")
        described = _content(tokenizer.backend_tokenizer)["model"]
        parts["model"] = {key: value for key, value in described.items() if key not in large}
    if added := [token for token in backend["added_tokens"] if not token["special"]]:
        parts["added_tokens"] = added
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
