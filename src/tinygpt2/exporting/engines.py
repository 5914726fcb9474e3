"""Engines that run an exported model: llama.cpp, onnxruntime, and torch where neither is installed.

Each one returns logits (T, V) of a row of tokens, and continues tokens greedily.
"""

from __future__ import annotations

import json
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.errors import ModelError, one_line


class Engine(Protocol):
    """Runs one model. `name` is what the table calls it; `own` is whether it is the format's own engine."""

    name: str
    own: bool

    def logits(self, ids: list[int]) -> Float[Tensor, "T V"]:
        """Return the logits after each token."""

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """Return the `count` likeliest next tokens, one after another, and the tokens per second."""

    def close(self) -> None:
        """Free the engine's memory."""


class TorchEngine:
    """A model in memory, run by transformers.

    Args:
        own: whether transformers is the engine that the format is made for.
    """

    def __init__(self, model: GPT2LMHeadModel, *, own: bool) -> None:
        self.name, self.own, self._model = (
            "transformers" if own else "transformers, with the file's weights",
            own,
            model,
        )

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Float[Tensor, "T V"]:
        """Return the logits after each token."""
        logits: Tensor = self._model(torch.tensor([ids])).logits[0]
        return logits.float()

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """Return the likeliest next tokens, and the tokens per second."""
        found: list[int] = []
        started, new, past = time.perf_counter(), torch.tensor([ids]), None
        for _ in range(count):
            output = self._model(new, past_key_values=past, use_cache=True)
            past, new = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(new))
        return found, count / (time.perf_counter() - started)

    def close(self) -> None:
        """Do nothing: the model belongs to others."""


class OnnxEngine:
    """A graph of `onnx_graph`, run by onnxruntime on the CPU.

    Raises:
        ModelError: onnxruntime cannot load it.
    """

    name, own = "onnxruntime", True

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has errors of its own
            raise ModelError(f"onnxruntime cannot load {file}: {one_line(error, 200)}") from error
        self._empty = {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
            for one in self._session.get_inputs()
            if one.name.startswith("past_key_values.")
        }

    def _run(self, ids: list[int], past: dict[str, Any], before: int) -> tuple[Any, dict[str, Any]]:
        total = before + len(ids)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(before, total, dtype=np.int64)[None],
        }
        names = [name.replace("past_key_values", "present") for name in past]
        logits, *present = self._session.run(["logits", *names], given | past)
        return logits[0], dict(zip(past, present, strict=True))

    def logits(self, ids: list[int]) -> Float[Tensor, "T V"]:
        """Return the logits after each token."""
        return torch.from_numpy(self._run(ids, self._empty, 0)[0])

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """Return the likeliest next tokens, and the tokens per second."""
        found: list[int] = []
        started, new, past, before = time.perf_counter(), ids, self._empty, 0
        for _ in range(count):
            logits, past = self._run(new, past, before)
            before, new = before + len(new), [int(logits[-1].argmax())]
            found += new
        return found, count / (time.perf_counter() - started)

    def close(self) -> None:
        """Free the graph."""
        del self._session


class LlamaEngine:
    """A GGUF file, run by llama.cpp through `xllamacpp`, with its cache in float32 and without flash attention.

    llama.cpp's server runs in this process and listens on this machine alone. It returns the final states of all
    tokens; their product with the file's output matrix is made here. Greedy text is all its own.

    Args:
        head: the output matrix of the file, in float32.
        positions: the model's positions.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """

    name, own = "llama.cpp", True

    def __init__(self, file: Path, head: Float[Tensor, "V D"], positions: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = params.n_batch = params.n_ubatch = positions
        params.n_parallel, params.verbosity, params.warmup = 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.embedding, params.embd_normalize = True, -1
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.ui = False
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # the library has errors of its own
            raise ModelError(f"llama.cpp cannot load {file}: {one_line(error, 200)}") from error
        self._head = head

    def ask(self, path: str, values: dict[str, Any]) -> Any:
        """Send a request to llama.cpp's server and return its answer."""
        body = json.dumps(values).encode()
        request = urllib.request.Request(
            self._server.listening_address + path, data=body, headers={"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to this machine
        with opener.open(request) as answer:
            return json.loads(answer.read())

    def logits(self, ids: list[int]) -> Float[Tensor, "T V"]:
        """Return the logits after each token."""
        (answer,) = self.ask("/embeddings", {"content": ids})
        return torch.tensor(answer["embedding"]) @ self._head.T

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """Return the likeliest next tokens, and the tokens per second that llama.cpp reports."""
        wanted = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        answer = timed = self.ask("/completion", wanted)
        if len(answer["tokens"]) < count:  # a text that ends early is too short to be timed
            timed = self.ask("/completion", {**wanted, "ignore_eos": True})
        return [int(one) for one in answer["tokens"]], float(timed["timings"]["predicted_per_second"])

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text in which special tokens are text."""
        answer = self.ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})
        return [int(one) for one in answer["tokens"]]

    def close(self) -> None:
        """Stop the server."""
        del self._server


def llama_available() -> bool:
    """Return whether llama.cpp can run here."""
    return find_spec("xllamacpp") is not None
