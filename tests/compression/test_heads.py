"""Heads of another width: nothing changes where nothing is lost, and no products of that rank are closer."""

from __future__ import annotations

import torch

from tests.compression.test_rotation import HEADS, IDS, WIDTH, lively
from tinygpt2.compression.cut import KeptParts, cut_model
from tinygpt2.compression.heads import HeadMap, head_moments, narrow_heads, whole_heads
from tinygpt2.compression.selection import projection_moments

OLD = WIDTH // HEADS


def queries_keys_values(model: torch.nn.Module, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fused queries, keys and values (N, 3 W) and the heads' outputs (N, W) of a block."""
    seen: list[torch.Tensor] = []
    attention = model.transformer.h[layer].attn
    handles = [
        attention.c_attn.register_forward_hook(lambda _, x, y: seen.append(y)),
        attention.c_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0])),
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen[0].flatten(0, 1), seen[1].flatten(0, 1)


def maps_of(model: torch.nn.Module, heads: torch.Tensor, width: int) -> list[HeadMap]:
    measured = projection_moments(model, [IDS[:2], IDS[2:]], [0, 1, 2])
    return [
        narrow_heads(head_moments(block, read, mixed), block.attn.c_proj.weight, heads, width)
        for (read, mixed, _), block in zip(measured, model.transformer.h, strict=True)
    ]


def test_moments_are_those_of_queries_keys_and_outputs() -> None:
    model = lively()
    fused, mixed = queries_keys_values(model, 1)
    ((read, outputs, _),) = projection_moments(model, [IDS[:2], IDS[2:]], [1])
    found = head_moments(model.transformer.h[1], read, outputs)
    for head in range(HEADS):
        columns = slice(head * OLD, head * OLD + OLD)
        query, key, output = fused[:, :WIDTH][:, columns], fused[:, WIDTH : 2 * WIDTH][:, columns], mixed[:, columns]
        torch.testing.assert_close(found.queries[head], query.T @ query / len(query))
        torch.testing.assert_close(found.keys[head], torch.cov(key.T, correction=0))
        torch.testing.assert_close(found.mixed[head], torch.cov(output.T, correction=0))
        torch.testing.assert_close(found.mix[head], output.mean(0))


def test_heads_of_the_same_width_or_wider_compute_the_same() -> None:
    model = lively()
    for heads, width in ((HEADS, OLD), (1, WIDTH), (2, WIDTH // 2)):
        kept = torch.arange(heads)
        whole = KeptParts([0, 1, 2], torch.arange(WIDTH), [kept] * 3, [torch.arange(4 * WIDTH)] * 3, (12, "first"))
        changed = KeptParts(**{**whole.__dict__, "narrowed": maps_of(model, kept, width)})
        student = cut_model(model, changed).double()
        assert student.config.n_head == heads
        silent = lively()
        with torch.no_grad():
            for block in silent.transformer.h:
                block.attn.c_proj.weight[heads * OLD :] = 0  # the other heads add nothing
            assert float((student(IDS).logits - silent(IDS).logits).abs().max()) < 2e-3


def test_wider_heads_can_learn() -> None:
    model = lively()
    maps = maps_of(model, torch.arange(1), WIDTH)
    inputs, outputs = maps[0].inputs, maps[0].outputs
    query, key, value = inputs.chunk(3, dim=1)
    assert bool((query[:, OLD:].abs().sum(0) > 0).all())
    assert bool((value[:, OLD:].abs().sum(0) > 0).all())
    assert not key[:, OLD:].any()
    assert not outputs[OLD:].any()


def test_narrow_products_are_as_close_as_the_rank_allows() -> None:
    """What is lost is the sum of the squares of the singular values that are cut, by a plain SVD of all tokens."""
    model, width = lively(), 4
    for layer, one in enumerate(maps_of(model, torch.tensor([0, 2]), width)):
        fused, mixed = queries_keys_values(model, layer)
        new = fused @ one.inputs.double()
        projection = model.transformer.h[layer].attn.c_proj.weight.detach()
        for place, head in enumerate((0, 2)):
            old_columns, columns = slice(head * OLD, head * OLD + OLD), slice(place * width, place * width + width)
            q, k = fused[:, :WIDTH][:, old_columns], fused[:, WIDTH : 2 * WIDTH][:, old_columns]
            new_q, new_k = new[:, : 2 * width][:, columns], new[:, 2 * width : 4 * width][:, columns]
            scores, new_scores = q @ (k - k.mean(0)).T, new_q @ (new_k - new_k.mean(0)).T
            sizes = torch.linalg.svdvals(scores)
            torch.testing.assert_close((scores - new_scores).norm(), sizes[width:].norm(), rtol=1e-4, atol=1e-4)
            centred = mixed[:, old_columns] - mixed[:, old_columns].mean(0)
            added = centred @ projection[old_columns]
            values = one.inputs.double()[2 * WIDTH :, 4 * width :][old_columns][:, columns]
            new_added = centred @ values @ one.outputs.double()[columns][:, old_columns] @ projection[old_columns]
            lost = torch.linalg.svdvals(added)[width:].norm()
            torch.testing.assert_close((added - new_added).norm(), lost, rtol=1e-4, atol=1e-4)
        # on average, the bias makes up for the rest
        values = one.inputs.double()[2 * WIDTH :, 4 * width :]
        both = torch.cat([torch.arange(OLD), torch.arange(2 * OLD, 3 * OLD)])
        expected = (mixed[:, both] @ projection[both]).mean(0)
        found = (mixed @ values @ one.outputs.double() @ projection).mean(0) + one.rest.double() @ projection
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_whole_heads_are_a_selection() -> None:
    one = whole_heads(torch.tensor([0, 2]), 3, 2)
    x = torch.arange(18.0).double()
    assert (x @ one.inputs).tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]
    assert (one.outputs @ torch.arange(6.0).double()).tolist() == [0, 1, 4, 5]
    assert not one.rest.any()
