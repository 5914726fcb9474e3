"""Trained models under llama.cpp and onnxruntime: log-probabilities, greedy text and tokens, as `transformers` gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tinygpt2
from tests.conftest import make_model
from tinygpt2 import TrainTokenizerConfig, train_tokenizer
from tinygpt2.compression.cut import KeptParts, cut_model
from tinygpt2.data.encoding import Encoder
from tinygpt2.exporting.engines import LlamaEngine
from tinygpt2.exporting.gguf import read_gguf
from tinygpt2.models.loading import load_model, model_tokenizer
from tinygpt2.models.saving import save_model

CUTS = {"3 layers": (256, 8, 1024), "half width, odd inner width": (128, 4, 500), "untied": (256, 8, 1024)}


class HalfGelu(torch.nn.Module):
    """The tanh GELU of llama.cpp on a CPU: a table of half-precision values by half-precision inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))


@pytest.fixture(params=CUTS)
def student(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Path:
    model, directory = load_model(str(shared_data / "models" / "novels-6x256"))
    width, heads, inner = (torch.arange(size) for size in CUTS[request.param])
    layers = [0, 2, 5]
    cut = cut_model(model, KeptParts(layers, width, [heads] * 3, [inner] * 3, (256, "first")))
    if request.param == "untied":
        cut.config.tie_word_embeddings = False
        head = cut.lm_head.weight.detach()
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
        cut.lm_head.weight = torch.nn.Parameter(head + 0.01 * noise)
    save_model(cut, tmp_path / "student", model_tokenizer(directory), "# test\n")
    return tmp_path / "student"


def test_llama_cpp_agrees_with_transformers(student: Path, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    out, text = tmp_path / "x.gguf", shared_data / "corpus" / "novels-valid" / "Doyle_Hound_1902.txt"
    config = tinygpt2.ExportConfig(model=str(student), to="gguf", out=str(out), data=str(text))
    assert tinygpt2.export(config).checked.greedy_equal
    model, directory = load_model(str(student))
    tokenizer = model_tokenizer(directory)
    engine = LlamaEngine(out, read_gguf(out).lm_head.weight.detach(), 256)
    ids = Encoder(tokenizer).whole(text.read_text(encoding="utf-8")[5000:6500]).tolist()[:200]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for block in model.transformer.h:
            block.mlp.act = HalfGelu()
        as_ggml = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = engine.logits(ids).log_softmax(-1)
    exact, near = (found - expected).abs(), (found - as_ggml).abs()
    assert float(near.mean()) < float(exact.mean()) / 4  # so it is the GELU that differs
    # a state that lies between two half-precision numbers may go to either: few values, so few log-probabilities, differ
    assert float((near > 1e-3).double().mean()) < 5e-3
    assert float(near.max()) < 5e-3
    assert float(exact.max()) < 1e-2  # up to 5.6e-3 was seen
    # the last position with llama.cpp's own product with the output matrix
    answer = engine.ask("/completion", {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 8192})
    (first,) = answer["completion_probabilities"]
    for one in first["top_logprobs"][:1000]:
        assert one["logprob"] == pytest.approx(float(expected[-1, one["id"]]), abs=1e-2)
    engine.close()


@pytest.mark.parametrize(
    ("source", "size"), [("corpus/novels-valid/Doyle_Hound_1902.txt", 2048), ("zh/wikipedia-simplified.txt", 3000)]
)
def test_vocabularies_of_ones_own(source: str, size: int, shared_data: Path, tmp_path: Path) -> None:
    """Quickstart's size of a vocabulary, and Chinese."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    text = tmp_path / "text.txt"
    text.write_text((shared_data / source).read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    train_tokenizer(TrainTokenizerConfig(source=[str(text)], vocab_size=size, out=str(tmp_path / "t")))
    model = make_model(tmp_path / "m", tmp_path / "t", vocab_size=size, n_embd=64)
    config = tinygpt2.ExportConfig(model=str(model), to="gguf", out=str(tmp_path / "x.gguf"), data=str(text))
    found = tinygpt2.export(config).checked
    assert found.tokens_equal
    assert found.greedy_equal
    assert found.kl < 1e-4
    assert found.targets > 100


def test_llama_cpp_splits_a_megabyte_into_the_same_tokens(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    name, out = str(shared_data / "models" / "novels-6x256"), tmp_path / "x.gguf"
    tinygpt2.export(tinygpt2.ExportConfig(model=name, to="gguf", type="q8_0", out=str(out), check=False))
    tokenizer = model_tokenizer(Path(name))
    engine = LlamaEngine(out, torch.zeros(1, 256), 256)
    english = (shared_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")[:600_000]
    chinese = (shared_data / "zh" / "wikipedia-simplified.txt").read_text(encoding="utf-8")[:60_000]
    code = "".join(file.read_text(encoding="utf-8") for file in sorted(Path(torch.__file__).parent.glob("*.py"))[:12])
    for text in (english, chinese, code[:250_000]):
        assert engine.tokens(text) == Encoder(tokenizer).whole(text).tolist()
    engine.close()


def test_onnxruntime_agrees_with_transformers(student: Path, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    text = shared_data / "corpus" / "novels-valid" / "Doyle_Hound_1902.txt"
    config = tinygpt2.ExportConfig(model=str(student), to="onnx", out=str(tmp_path / "x"), data=str(text))
    found = tinygpt2.export(config).checked
    assert found.logits < 1e-4
    assert found.greedy_equal
