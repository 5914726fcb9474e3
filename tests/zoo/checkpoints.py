"""GPT-2 checkpoints in the forms in which they exist: made with plain `transformers`, tiny, each by one function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog, and in 12345 days it sleeps under 67 trees...  Good! " * 5
VOCABULARY, POSITIONS = 320, 48

FORMS: dict[str, Callable[[Path], None]] = {}


def form(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Register a form under its function's name."""
    FORMS[make.__name__] = make
    return make


def byte_level(size: int = VOCABULARY, special: tuple[str, ...] = ("<|endoftext|>",)) -> Tokenizer:
    """A byte-level BPE trained on the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([TEXT, TEXT.upper(), "naïve café 你好"], trainer)
    return backend


def save_tokenizer(path: Path, backend: Tokenizer | None = None, **names: str) -> int:
    """Save a tokenizer as GPT-2's class does; return its size."""
    names = names or {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokenizer = GPT2TokenizerFast(tokenizer_object=backend or byte_level(), **names)
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def make_model(size: int = VOCABULARY, **shape: Any) -> GPT2LMHeadModel:
    """A random GPT-2 with lively weights."""
    values = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": POSITIONS, "vocab_size": size}
    values |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**{**values, **shape})).eval()


def plain_model(path: Path, **shape: Any) -> None:
    """Save model and tokenizer."""
    make_model(save_tokenizer(path), **shape).save_pretrained(path)


def edit_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json in place."""
    file = path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    """Change the tensors in place."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


@form
def plain(path: Path) -> None:
    plain_model(path)


@form
def one_layer_one_head(path: Path) -> None:
    plain_model(path, n_layer=1, n_head=1)


@form
def untied_head(path: Path) -> None:
    plain_model(path, tie_word_embeddings=False)


@form
def own_inner_width(path: Path) -> None:
    plain_model(path, n_inner=56)


def activation(name: str) -> None:
    """Register a form with another activation."""

    def make(path: Path) -> None:
        plain_model(path, activation_function=name)

    FORMS[f"activation_{name}"] = make


for _name in ("gelu", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh", "mish"):
    activation(_name)


@form
def scores_without_scale(path: Path) -> None:
    plain_model(path, scale_attn_weights=False)


@form
def scores_scaled_by_layer(path: Path) -> None:
    plain_model(path, scale_attn_by_inverse_layer_idx=True)


@form
def reordered_and_upcast_attention(path: Path) -> None:
    plain_model(path, reorder_and_upcast_attn=True)


@form
def half_precision_weights(path: Path) -> None:
    make_model(save_tokenizer(path)).half().save_pretrained(path)


@form
def bfloat16_weights(path: Path) -> None:
    make_model(save_tokenizer(path)).bfloat16().save_pretrained(path)


@form
def sharded_weights(path: Path) -> None:
    make_model(save_tokenizer(path)).save_pretrained(path, max_shard_size="40KB")


@form
def names_without_prefix(path: Path) -> None:
    plain(path)
    edit_weights(path, lambda tensors: {name.removeprefix("transformer."): x for name, x in tensors.items()})


@form
def old_mask_buffers(path: Path) -> None:
    plain(path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            mask = torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.uint8).tril()
            tensors[f"transformer.h.{layer}.attn.bias"] = mask
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_weights(path, add)


def with_extra(name: str, *tensors: tuple[str, tuple[int, ...]]) -> None:
    """Register a form with tensors that a GPT-2 with a language-modelling head does not have."""

    def make(path: Path) -> None:
        plain(path)
        edit_weights(path, lambda found: found.update({key: torch.randn(*shape) for key, shape in tensors}))

    FORMS[name] = make


with_extra("value_head", ("v_head.summary.weight", (1, 32)), ("v_head.summary.bias", (1,)))
with_extra("classification_head", ("score.weight", (2, 32)))
with_extra("multiple_choice_head", ("multiple_choice_head.summary.weight", (1, 32)))


@form
def stored_copy_of_the_tied_head(path: Path) -> None:
    plain(path)
    edit_weights(path, lambda found: found.update({"lm_head.weight": found["transformer.wte.weight"].clone()}))


@form
def config_without_model_type(path: Path) -> None:
    plain(path)
    edit_config(path, lambda values: values.pop("model_type"))


@form
def config_of_an_older_library(path: Path) -> None:
    plain(path)
    sampling = {"text-generation": {"do_sample": True, "max_length": 50}}
    old = {"n_ctx": POSITIONS, "torch_dtype": "float32", "task_specific_params": sampling, "output_past": True}
    old |= {"architectures": ["GPT2Model"], "gradient_checkpointing": False, "transformers_version": "2.9.0"}
    edit_config(path, lambda values: values.update(old))


@form
def config_with_unknown_keys(path: Path) -> None:
    plain(path)
    edit_config(path, lambda values: values.update({"trained_by": "somebody", "future_setting": {"a": [1]}}))


@form
def config_of_a_pipeline(path: Path) -> None:
    plain(path)
    labels = {"id2label": {"0": "BAD", "1": "GOOD"}, "label2id": {"BAD": 0, "GOOD": 1}, "problem_type": None}
    edit_config(path, lambda values: values.update(labels | {"summary_first_dropout": 0.1}))


@form
def ends_beyond_the_vocabulary(path: Path) -> None:
    plain(path)
    edit_config(path, lambda values: values.update({"bos_token_id": 50256, "eos_token_id": 50256}))


def with_rows(name: str, rows: int) -> None:
    """Register a form with more rows than tokens."""

    def make(path: Path) -> None:
        make_model(save_tokenizer(path) + rows).save_pretrained(path)

    FORMS[name] = make


with_rows("rows_to_a_multiple_of_64", 64 - VOCABULARY % 64)
with_rows("many_more_rows_than_tokens", 201)


@form
def added_padding_token_without_a_row(path: Path) -> None:
    plain(path)
    tokenizer = GPT2TokenizerFast.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)


@form
def added_special_tokens_with_rows(path: Path) -> None:
    save_tokenizer(path)
    tokenizer = GPT2TokenizerFast.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    tokenizer.save_pretrained(path)
    make_model(len(tokenizer)).save_pretrained(path)


@form
def vocabulary_and_merges_alone(path: Path) -> None:
    plain(path)
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (path / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (path / "tokenizer.json").unlink()


@form
def tokenizer_with_a_normalizer(path: Path) -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    make_model(save_tokenizer(path, backend)).save_pretrained(path)


@form
def tokenizer_with_another_split(path: Path) -> None:
    backend = byte_level()
    pattern = Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    make_model(save_tokenizer(path, backend)).save_pretrained(path)


@form
def tokenizer_with_a_template(path: Path) -> None:
    backend = byte_level(special=("<|endoftext|>", "<s>"))
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(path)
    make_model(len(tokenizer), bos_token_id=start).save_pretrained(path)


@form
def tokenizer_without_ends(path: Path) -> None:
    backend = byte_level(special=())
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    make_model(backend.get_vocab_size(), bos_token_id=None, eos_token_id=None).save_pretrained(path)


@form
def tokenizer_of_words(path: Path) -> None:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", bos_token="[SEP]"
    )
    tokenizer.save_pretrained(path)
    make_model(len(tokenizer), bos_token_id=3, eos_token_id=3).save_pretrained(path)


@form
def tokenizer_of_bert_from_vocab_txt(path: Path) -> None:
    tokenizer_of_words(path)
    vocabulary = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n", encoding="utf-8")
    (path / "tokenizer.json").unlink()
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[SEP]",
    }
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}))


@form
def tokenizer_of_sentencepieces(path: Path) -> None:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(path)
    make_model(len(tokenizer), bos_token_id=1, eos_token_id=1).save_pretrained(path)


@form
def vocabulary_with_a_hole(path: Path) -> None:
    backend = byte_level()
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: index + 20 * (index >= 300) for token, index in vocabulary.items()}
    for added in content["added_tokens"]:
        added["id"] = content["model"]["vocab"][added["content"]]
    backend = Tokenizer.from_str(json.dumps(content))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)
    make_model(max(backend.get_vocab().values()) + 1).save_pretrained(path)


@form
def end_of_text_elsewhere(path: Path) -> None:
    save_tokenizer(path, byte_level(special=("</s>",)), bos_token="</s>", eos_token="</s>", unk_token="</s>")
    make_model(VOCABULARY).save_pretrained(path)
