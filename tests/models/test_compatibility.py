"""More rows than tokens never harm; missing rows do only if a text can need them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from tinygpt2 import from_map_style
from tinygpt2.data.dataset import PackedDataset, load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import DataError, ModelError
from tinygpt2.models.compatibility import check_fits, first_token, require_tokenizer, vocabulary_mismatch


def model(rows: int) -> GPT2Config:
    return GPT2Config(vocab_size=rows, n_positions=64)


def padded(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


@pytest.mark.parametrize("rows", [320, 321, 384, 601, 51200])
def test_more_rows_than_tokens_are_fine(tokenizer_dir: Path, rows: int) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert require_tokenizer(tokenizer, model(rows), "m") is tokenizer
    mismatch = vocabulary_mismatch(tokenizer, model(rows))
    assert mismatch is None if rows == 320 else mismatch == (
        f"the model has {rows} rows, but its tokenizer has only 320 tokens; the others are not used", False
    )  # fmt: skip


def test_a_special_token_without_a_row_is_a_note_and_an_ordinary_one_an_error(tokenizer_dir: Path) -> None:
    tokenizer = padded(tokenizer_dir)
    assert require_tokenizer(tokenizer, model(320), "m") is tokenizer
    message, is_fault = vocabulary_mismatch(tokenizer, model(320))
    assert ("[PAD]" in message, is_fault) == (True, False)
    tokenizer.add_tokens(["covid19"])
    with pytest.raises(ModelError, match="token ids up to 321, but the model has only 320"):
        require_tokenizer(tokenizer, model(320), "m")
    with pytest.raises(ModelError, match="token ids up to 319, but the model has only 319"):
        require_tokenizer(load_tokenizer(str(tokenizer_dir)), model(319), "m")
    with pytest.raises(ModelError, match="has no tokenizer"):
        require_tokenizer(None, model(320), "m")


def test_an_unknown_token_can_occur_in_any_text() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ModelError, match="up to 1, but the model has only 1"):
        require_tokenizer(tokenizer, model(1), "m")


def test_a_dataset_fits_if_its_tokens_do(data: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    packed = load_packed_dataset(str(data))
    check_fits(packed, model(320), None, "it")
    with pytest.raises(DataError, match="token ids up to 319, but it has only 319"):
        check_fits(packed, model(319), None, "it")
    padded(tokenizer_dir).save_pretrained(tmp_path)
    larger = PackedDataset(packed.name, packed.train, packed.test, {**packed.manifest, "vocab_size": 321}, tmp_path)
    check_fits(larger, model(320), None, "it")
    manifest = {**larger.manifest, "eos_token_id": 320}
    with pytest.raises(DataError, match="up to 320"):
        check_fits(PackedDataset(packed.name, packed.train, packed.test, manifest, tmp_path), model(320), None, "it")
    rows = [{"input_ids": [1, 2, 320]}]
    with pytest.raises(DataError, match="up to 320"):  # rows of a user may contain any token
        check_fits(from_map_style(rows, [], padded(tokenizer_dir)), model(320), None, "it")


def test_the_first_token_that_the_model_has() -> None:
    assert first_token([None, 50256, [400, 7], 3], model(320)) == 7
    assert first_token([None, 320, -1, []], model(320)) is None
