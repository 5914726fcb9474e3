"""The output matrix as an operand, and the losses of given tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config

from tinygpt2.models import lm_head
from tinygpt2.models.lm_head import default_chunk, head_operand, operand_rows, target_losses
from tinygpt2.models.loading import random_model

V = 61


def test_sizes_of_gpt2s_logits() -> None:
    assert [operand_rows(rows, "cuda") for rows in (1, 64, 50257)] == [64, 64, 50304]
    assert operand_rows(50257, "cpu") == 50257
    assert (default_chunk(50257, "cpu"), default_chunk(50257, "cuda")) == (667, 1335)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_padding_of_the_operand_changes_no_loss_and_no_hit(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=40, vocab_size=V), 0).eval()
    model.lm_head.weight.data.sub_(3)  # all logits lie far below the zeros of the padding
    ids = torch.randint(0, V, (3, 20), generator=torch.Generator().manual_seed(1))
    ids = ids.repeat_interleave(2, dim=1)  # with a tied matrix, the likeliest next token is the same one again
    wanted = (torch.rand(3 * 39, generator=torch.Generator().manual_seed(2)) < 0.7).nonzero().flatten()
    ruled_out = torch.arange(V) % 5 == 0
    found = []
    for rows in (V, 64):
        monkeypatch.setattr(lm_head, "operand_rows", lambda vocabulary, device, rows=rows: rows)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            head = head_operand(model.lm_head.weight)
        assert head.shape == (rows, 16)
        found.append(target_losses(copy.deepcopy(model).to(precision), head, ids, wanted, ruled_out))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    assert found[0][1] is not None
    assert 0 < int(found[0][1].sum()) < found[0][1].numel()
