"""Muon beside AdamW: each of GPT-2's matrices as torch's own Muon would treat it, alone and as (out, in). And clipping."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2 import PretrainConfig, pretrain
from tinygpt2.config.training import TrainOptions
from tinygpt2.errors import ConfigError
from tinygpt2.models.loading import load_model
from tinygpt2.training import optimizers
from tinygpt2.training.optimizers import BETAS, Muon, check_state, clip_gradients, make_optimizer
from tinygpt2.training.preparation import _check_sharding
from tinygpt2.training.schedule import set_rates

RATE, DECAY = 1e-2, 0.1


def options(optimizer: str = "muon") -> TrainOptions:
    return TrainOptions(out="o", optimizer=optimizer, learning_rate=RATE, weight_decay=DECAY)


def parts(name: str, matrix: Tensor) -> list[Tensor]:
    """A layer's matrix as (out, in); queries, keys and values apart."""
    return [part.T.clone() for part in matrix.chunk(3 if "c_attn" in name else 1, dim=1)]


def descend(model: GPT2LMHeadModel, seed: int) -> None:
    model.eval()  # no dropout
    ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()


def test_layers_take_muons_step_and_the_rest_adamws(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "has_fast_bf16", lambda device: True)  # torch.optim.Muon iterates in bfloat16
    model, _ = load_model(str(teacher))
    ours = make_optimizer(model, options())
    names = dict(model.named_parameters())
    layered = {name for name in names if ".h." in name and name.endswith(".weight") and "ln_" not in name}
    assert len(layered) == 4 * model.config.n_layer
    alone = {name: [nn.Parameter(part) for part in parts(name, names[name].detach())] for name in layered}
    muon = torch.optim.Muon(
        [p for split in alone.values() for p in split], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    others = {name: nn.Parameter(p.detach().clone()) for name, p in names.items() if name not in layered}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others.values() if p.ndim >= 2], "weight_decay": DECAY},
            {"params": [p for p in others.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=RATE, betas=BETAS,
    )  # fmt: skip
    for seed in range(3):
        descend(model, seed)
        for name, split in alone.items():
            for parameter, gradient in zip(split, parts(name, names[name].grad), strict=True):
                parameter.grad = gradient
        for name, parameter in others.items():
            parameter.grad = names[name].grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
        ours.zero_grad()
        for name, split in alone.items():
            for mine, parameter in zip(parts(name, names[name].detach()), split, strict=True):
                torch.testing.assert_close(mine, parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)
        for name, parameter in others.items():
            torch.testing.assert_close(names[name].detach(), parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("fast", "dtype", "near"), [(True, torch.bfloat16, 0.03), (False, torch.float32, 1e-5)])
def test_matrices_are_orthogonalized_in_the_format_that_is_fast(
    fast: bool, dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "has_fast_bf16", lambda device: fast)
    given = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    found = optimizers.orthogonalized(given)
    assert found.dtype == dtype
    for matrix, result in zip(given.double(), found.double(), strict=True):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        values /= values.norm()
        for _ in range(5):  # on the singular values alone
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        torch.testing.assert_close(result, (u * values) @ v, rtol=0, atol=near)


def test_a_restored_state_goes_on_alike(teacher: Path) -> None:
    models = [load_model(str(teacher))[0] for _ in range(2)]
    first, second = (make_optimizer(model, options()) for model in models)
    descend(models[0], 0)
    first.step()
    first.zero_grad()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = RATE / 2  # as the loop sets it
        descend(model, 1)
        optimizer.step()
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_vectors_have_rates_of_their_own(
    kind: str, tied: bool, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A step of each part alone, with that part's rate, moves it as the step of all together does."""
    own = {"embeddings": 3e-2, "vectors": 7e-3, "matrices": 2e-3}
    config = options(kind).model_copy(
        update={"embedding_learning_rate": own["embeddings"], "vector_learning_rate": own["vectors"]}
    )
    source = make_model(tmp_path / "m", tokenizer_dir, n_layer=1, tie_word_embeddings=tied)
    moved = load_model(str(source))[0]
    optimizer = make_optimizer(moved, config)
    assert set_rates(optimizer, lambda peak: peak / 2, own["matrices"]) == own["matrices"] / 2
    descend(moved, 0)
    optimizer.step()
    for part, rate in own.items():
        alone = load_model(str(source))[0]
        plain = make_optimizer(alone, options(kind))
        set_rates(plain, lambda peak: peak / 2, rate)
        descend(alone, 0)
        plain.step()
        for name, parameter in alone.named_parameters():
            found = "embeddings" if ".h." not in name and "ln_" not in name else "matrices"
            if part == ("vectors" if parameter.ndim < 2 else found):
                assert torch.equal(parameter, moved.get_parameter(name)), name


@pytest.mark.parametrize("frozen", [".h.", ".wte.", "ln_"])
def test_what_is_frozen_is_left_alone(teacher: Path, frozen: str) -> None:
    model, _ = load_model(str(teacher))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    optimizer = make_optimizer(model, options())
    assert isinstance(optimizer, Muon) == (frozen != ".h.")
    descend(model, 0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (frozen in name), name


@pytest.mark.parametrize("plugin", ["fsdp_plugin", "deepspeed_plugin"])
def test_what_sharding_does_not_serve_is_refused(plugin: str) -> None:
    plugins = {
        "fsdp_plugin": SimpleNamespace(fsdp_version=2, auto_wrap_policy=None, cpu_ram_efficient_loading=False),
        "deepspeed_plugin": SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}}),
    }
    state = SimpleNamespace(**{"fsdp_plugin": None, "deepspeed_plugin": None, plugin: plugins[plugin]})
    _check_sharding(SimpleNamespace(state=state), options("adamw"))
    with pytest.raises(ConfigError, match="Muon needs whole matrices"):
        _check_sharding(SimpleNamespace(state=state), options())
    with pytest.raises(ConfigError, match="do not support FSDP or DeepSpeed"):
        _check_sharding(SimpleNamespace(state=state), options("adamw").model_copy(update={"compile_only": True}))
    short = options("adamw").model_copy(update={"precision": "fp16"})
    if plugin == "deepspeed_plugin":
        with pytest.raises(ConfigError, match="--precision fp16 does not support DeepSpeed"):
            _check_sharding(SimpleNamespace(state=state), short)
    else:
        _check_sharding(SimpleNamespace(state=state), short)
    plugins["fsdp_plugin"].fsdp_version = 1
    if plugin == "fsdp_plugin":
        with pytest.raises(ConfigError, match="fsdp_version: 2"):
            _check_sharding(SimpleNamespace(state=state), options("adamw"))


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_gradients_above_the_limit_are_scaled_down_to_it(teacher: Path, kind: str, limit: float) -> None:
    models = [load_model(str(teacher))[0] for _ in range(2)]
    ours, reference = (make_optimizer(model, options(kind)) for model in models)
    for seed, share in enumerate((1.0, 1e-3, 2.0)):  # a small gradient between two that are scaled by 0.5
        models[0].transformer.wpe.weight.requires_grad_(seed != 1)  # frozen: no gradient
        descend(models[0], seed)
        for left, right in zip(*(model.parameters() for model in models), strict=True):
            right.grad = None if left.grad is None else left.grad.mul_(share).clone()
        gradients = [p.grad for p in models[1].parameters() if p.grad is not None]
        expected = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        norm = clip_gradients(Accelerator(cpu=True), ours, list(models[0].parameters()), limit)
        assert norm.item() == pytest.approx(expected, rel=1e-5)
        assert (ours.grad_scale is not None) == (0 < limit < expected)  # type: ignore[attr-defined]
        for gradient in gradients:
            gradient.mul_(min(1.0, limit / expected) if limit else 1.0)
        for optimizer in (ours, reference):
            optimizer.step()
            optimizer.zero_grad()
    # the moments: Muon's updates are made in bfloat16
    torch.testing.assert_close(ours.state_dict()["state"], reference.state_dict()["state"], rtol=1e-5, atol=1e-8)


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something: on a GPU, each is at least one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace == "aten" and not str(func).startswith("aten.empty"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 12])
def test_muon_takes_as_many_kernels_for_any_number_of_layers(layers: int) -> None:
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=layers, n_embd=24, n_head=2, n_positions=16, vocab_size=64, bos_token_id=0, eos_token_id=0)
    )
    ours = make_optimizer(model, options())
    for _ in range(2):  # the first step makes the state
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        ours.grad_scale = torch.tensor(2.0)
        with Kernels() as kernels:
            ours.step()
    assert 20 < sum(kernels.counts.values()) <= 60, kernels.counts
    assert kernels.counts["aten.bmm.default"] == 5 * 2  # five iterations of two shapes


def test_large_models_are_stacked_in_parts(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [load_model(str(teacher))[0] for _ in range(2)]
    for model, limit in zip(models, (2**26, 5000), strict=True):
        monkeypatch.setattr(optimizers, "STACKED", limit)
        ours = make_optimizer(model, options())
        descend(model, 0)
        with Kernels() as kernels:
            ours.step()
        assert (kernels.counts["aten.stack.default"] == 2) == (limit > 5000)
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(left, right)


def test_a_step_that_overflows_changes_nothing(teacher: Path) -> None:
    model, _ = load_model(str(teacher))
    ours = make_optimizer(model, options())
    for overflow in (False, True):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        descend(model, 0)
        if overflow:
            next(iter(model.parameters())).grad.fill_(math.inf)
        moments = copy.deepcopy(ours.state_dict()["state"])
        ours.grad_scale, ours.found_inf = torch.tensor(1.0), torch.tensor(float(overflow))
        ours.step()
        ours.zero_grad()
        assert all(torch.equal(p, before[name]) == overflow for name, p in model.named_parameters())
    for index, row in ours.state_dict()["state"].items():
        assert torch.equal(*(one.get("momentum_buffer", torch.zeros(1)) for one in (row, moments[index])))


def test_the_state_of_separate_optimizers_goes_on(teacher: Path) -> None:
    """The numbers of the parameters in a checkpoint: matrices, then c_attn, then what AdamW trains."""
    model, _ = load_model(str(teacher))
    ours = make_optimizer(model, options())
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in ours.param_groups for parameter in group["params"]]
    matrices = [name for name in ordered if ".h." in name and name.endswith(".weight") and "ln_" not in name]
    assert ordered[: len(matrices)] == sorted(matrices, key=lambda name: "c_attn" in name)
    assert ordered[len(matrices)] == "transformer.wte.weight"
    descend(model, 0)
    ours.step()
    state = ours.state_dict()["state"]
    assert {tuple(sorted(state[index])) for index in range(len(matrices))} == {("momentum_buffer",)}
    assert {tuple(sorted(state[index])) for index in range(len(matrices), len(state))} == {
        ("exp_avg", "exp_avg_sq", "step")
    }


def test_a_state_of_other_parameters_is_refused(teacher: Path) -> None:
    model, _ = load_model(str(teacher))
    ours, adamw = make_optimizer(model, options()), make_optimizer(model, options("adamw"))
    for optimizer in (ours, adamw):
        descend(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    check_state(ours, ours.state_dict()["state"])
    for state in (adamw.state_dict()["state"], {99: {}}):
        with pytest.raises(ValueError, match="its optimizer state belongs to other parameters"):
            check_state(ours, state)


def taken_steps(model: GPT2LMHeadModel, ours: torch.optim.Optimizer, seeds: range) -> dict[str, Tensor]:
    for seed in seeds:
        descend(model, seed)
        clip_gradients(Accelerator(cpu=True), ours, list(model.parameters()), 0.5)
        ours.step()
        ours.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def share_steps(rank: int, store: str, folder: str) -> None:
    """Muon with shared stacks, then both optimizers with sharded state; half-way each state is saved and restored."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, _ = load_model(folder)
    found = {f"shared.{name}": p for name, p in taken_steps(model, make_optimizer(model, options()), range(4)).items()}
    for kind in ("muon", "adamw"):
        model, _ = load_model(folder)
        sharded = options(kind).model_copy(update={"shard_optimizer": True})
        ours = make_optimizer(model, sharded)
        taken_steps(model, ours, range(2))
        state = ours.state_dict()
        held = sum(p.numel() for p in ours.state)
        assert 0.3 < held / sum(p.numel() for p in model.parameters()) < 0.7
        if rank == 0:
            torch.save(state["state"], f"{store}-{kind}")
        torch.distributed.barrier()
        ours = make_optimizer(model, sharded)
        ours.load_state_dict({**state, "state": torch.load(f"{store}-{kind}")})
        assert sum(p.numel() for p in ours.state) == held
        found |= {f"{kind}.{name}": p for name, p in taken_steps(model, ours, range(2, 4)).items()}
    save_file(found, f"{store}-{rank}")
    torch.distributed.destroy_process_group()


def test_processes_share_the_work_and_the_state(teacher: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share_steps, (str(tmp_path / "store"), str(teacher)), nprocs=2)
    both = [load_file(tmp_path / f"store-{rank}") for rank in range(2)]
    assert len(both[0])
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())
    for kind in ("muon", "adamw"):
        model, _ = load_model(str(teacher))
        ours = make_optimizer(model, options(kind).model_copy(update={"shard_optimizer": True}))  # one process
        taken_steps(model, ours, range(2))
        saved = torch.load(tmp_path / f"store-{kind}")
        torch.testing.assert_close(saved, ours.state_dict()["state"], rtol=1e-4, atol=1e-6)
        check_state(ours, saved)
        for name, value in taken_steps(model, ours, range(2, 4)).items():
            for way in ("shared", "muon") if kind == "muon" else ("adamw",):
                torch.testing.assert_close(value, both[0][f"{way}.{name}"], rtol=1e-4, atol=1e-5, msg=f"{way} {name}")


def scaled_in_shards(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    sharded = nn.Linear(6, 4)
    whole = copy.deepcopy(sharded)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    ours, reference = (torch.optim.AdamW(module.parameters(), fused=True) for module in (sharded, whole))
    for size in (1.0, 1e-3, 3.0):
        for module in (sharded, whole):
            module(torch.full((3, 6), size)).square().sum().backward()
        norm = clip_gradients(Accelerator(cpu=True), ours, list(sharded.parameters()), 0.5)
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(whole.parameters(), 0.5).item(), rel=1e-5)
        for optimizer in (ours, reference):
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(ours.state.values(), reference.state.values(), strict=True):
        torch.testing.assert_close(mine["exp_avg"].full_tensor(), theirs["exp_avg"])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_gradients_are_scaled_like_whole_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(scaled_in_shards, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize(("said", "norm"), [(2.5, 2.5), (None, 0.0), (-1.0, float("inf"))])
def test_the_norm_is_deepspeeds_where_it_clips(said: float | None, norm: float) -> None:
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        clip_grad_norm_=lambda parameters, limit: said,
        device=torch.device("cpu"),
    )
    assert clip_gradients(accelerator, None, [], 1.0) == norm


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_positions_that_no_block_reaches_keep_their_values(
    data: Path, tokenizer_dir: Path, tmp_path: Path, kind: str
) -> None:
    """The same start with 32 and with 64 positions, on blocks of 32: what is trained is equal, the rest stays."""
    name, start, trained = "transformer.wpe.weight", {}, {}
    for positions in (64, 32):
        folder, out = tmp_path / f"start-{positions}", tmp_path / f"m-{positions}"
        make_model(folder, tokenizer_dir, n_positions=positions)
        if positions == 32:
            start[32] = {key: value[:32] if key == name else value for key, value in start[64].items()}
            save_file(
                {key: value.clone() for key, value in start[32].items()}, folder / "model.safetensors", {"format": "pt"}
            )
        start[positions] = load_file(folder / "model.safetensors")
        pretrain(
            PretrainConfig(
                model=str(folder), data=str(data), out=str(out), max_steps=5, weight_decay=0.5, learning_rate=0.01,
                optimizer=kind, micro_batch_size=4, grad_clip=0,
            )
        )  # fmt: skip
        trained[positions] = load_file(out / "model.safetensors")
    assert torch.equal(trained[64][name][32:], start[64][name][32:])
    assert not torch.equal(trained[64][name][:32], start[64][name][:32])
    for key, value in trained[32].items():
        assert torch.equal(trained[64][key][:32] if key == name else trained[64][key], value), key
