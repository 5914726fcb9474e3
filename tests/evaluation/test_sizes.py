"""Sizes of a text in pieces are those of the whole, by whatever tokens it is stored."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import sentences
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.evaluation.sizes import TextSizes, decoded


def sizes(text: str) -> TextSizes:
    return TextSizes(len(text.split()), len(text), len(text.encode()))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(" \n\u3000\x1cab你🙂", max_size=4)))
def test_pieces_have_the_sizes_of_the_whole(pieces: list[str]) -> None:
    assert TextSizes.of(pieces) == sizes("".join(pieces))


@pytest.mark.parametrize("at_once", [1, 2, 7, 1000])
def test_decoding_in_pieces_is_decoding_the_whole(tokenizer_dir: Path, at_once: int) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["covid19", "é"])  # one of them has a letter that stands for a byte
    pick = random.Random(0)
    texts = [
        encode(tokenizer, [f"{sentences(3, 1)} naïve covid19é 日本語 🙂🙂 \n"])[0],
        [pick.randrange(len(tokenizer)) for _ in range(500)],  # invalid UTF-8, special tokens between its bytes
        encode(tokenizer, ["🙂"])[0] * 50,
        [],
    ]
    for ids in texts:
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pieces = list(decoded(tokenizer, np.array(ids, np.int32), at_once))
        assert "".join(pieces) == whole
        assert TextSizes.of(pieces) == sizes(whole)
    assert len(list(decoded(tokenizer, np.array(texts[0]), 7))) > 5


def test_other_decoders_are_decoded_at_once() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert list(decoded(tokenizer, np.array([1, 2, 1, 2, 2]), 1)) == ["ab abb"]
