"""Momentum branch, gradients and whole copies where an engine keeps shards, against hand computations on whole tensors.

Run as a script, this file is one of two processes: `test_sharding.py ENGINE RANK FOLDER`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_accel.compression import Compression, Strategy
from hf_accel.distributed.sharding import clip_each, drop_gradients, is_sharded, separate_group, shards, whole_state
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import OBJECTIVES, Draw
from hf_accel.objectives.momentum import update_momentum
from tests.two_processes import results_of

ENGINES = ["fsdp2", "zero3", "zero3 small kept whole"]
MOMENTUM, LARGEST = 0.875, 0.01
CONFIG = AccelViTConfig(
    hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=25, image_size=16, patch_size=4
)
"""With sizes that two processes do not divide: their shards are padded."""
HEAD: dict[str, Any] = {"num_prototypes": 5, "head_hidden_size": 9, "bottleneck_size": 3, "norm_last_layer": False}


def objective() -> Any:
    torch.manual_seed(0)
    return OBJECTIVES["dino"](CONFIG, **HEAD).train()


def loss_of(model: nn.Module) -> Tensor:
    """Of the same rows on every process, so that the mean over processes is each one's own."""
    views = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return model(views, Strategy(Compression(4)), Draw(0, 0)).loss


def of_zero3(model: nn.Module, threshold: int) -> nn.Module:
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=1.0), config=config)[0]


def results(engine: str) -> dict[str, Any]:
    model = objective()
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped: Any = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        wrapped = of_zero3(model, 100_000 if "whole" in engine else 0)
    found: dict[str, Any] = {"sharded": is_sharded(model), "before": whole_state(model)}
    kept = sum(shard.numel() for shard in shards(model.parameters()))
    found["share"] = kept / sum(tensor.numel() for name, tensor in found["before"].items() if "center" not in name)

    loss = loss_of(wrapped)  # ZeRO-3 holds small parameters whole from here on
    found["loss"] = loss.detach()
    if engine == "fsdp2":
        loss.backward()
    else:
        wrapped.backward(loss)
    clip_each(model.parameters(), LARGEST)
    drop_gradients(model.frozen_parameters(0.0))
    if engine == "fsdp2":
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(trained, lr=1.0).step()
    else:
        wrapped.step()
    update_momentum(model.encoder, model.student_encoder, MOMENTUM)
    update_momentum(model.teacher_head, model.student_head, MOMENTUM)
    found["loss after"] = loss_of(wrapped).detach()  # before ZeRO-3 gathers and cuts anew all that it holds
    return {**found, "after": whole_state(model)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_what_changes_shards_changes_whole_tensors_by_hand(engine: str, tmp_path: Path) -> None:
    first, second = run_two(engine, tmp_path)
    plain = objective()
    names = dict(plain.named_parameters())
    assert first["sharded"] and 0.5 <= first["share"] < 0.6
    assert first["before"].keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(first["before"][name], tensor), name

    loss = loss_of(plain)
    loss.backward()
    torch.testing.assert_close(first["loss"], loss.detach())
    frozen = {id(p) for p in plain.frozen_parameters(0.0)}
    by_hand, clipped = dict(first["before"]), 0
    for name, parameter in names.items():
        if parameter.grad is not None and id(parameter) not in frozen:
            clipped += parameter.grad.norm() > LARGEST
            by_hand[name] = by_hand[name] - parameter.grad * min(1.0, LARGEST / (parameter.grad.norm() + 1e-6))
    assert clipped > 5 and len(frozen) == 2
    followed = 0
    for target, online in (("encoder.", "student_encoder."), ("teacher_head.", "student_head.")):
        for name in (name for name in names if name.startswith(target)):
            now = by_hand[online + name.removeprefix(target)]
            by_hand[name] = MOMENTUM * by_hand[name] + (1 - MOMENTUM) * now
            followed += not torch.equal(first["after"][name], first["before"][name])
    assert followed > 20
    for name in names:
        torch.testing.assert_close(first["after"][name], by_hand[name], msg=lambda text, n=name: f"{n}: {text}")
    # What the next forward saw are these weights, not copies that an engine had kept
    plain.load_state_dict(first["after"])
    torch.testing.assert_close(first["loss after"], loss_of(plain).detach())
    for key in ("before", "after"):
        assert all(torch.equal(first[key][name], second[key][name]) for name in first[key])


def test_without_an_engine_there_is_nothing_to_gather():
    model = objective()
    assert not is_sharded(model)
    assert all(a is b for a, b in zip(shards(model.parameters()), model.parameters(), strict=True))
    state = whole_state(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    state["center"].add_(1)
    assert model.get_buffer("center").sum() == 0  # copies


def test_a_group_of_its_own_keeps_its_settings():
    model = objective()
    chosen = model.frozen_parameters(0.0)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    separate_group(optimizer, chosen)
    assert len(optimizer.param_groups) == 3 and optimizer.param_groups[2]["weight_decay"] == 0.3
    assert optimizer.param_groups[2]["freezable"] and "freezable" not in optimizer.param_groups[0]
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == {id(p) for p in chosen}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(matrices) + len(rest)


def test_frozen_step_of_a_group_is_not_counted():
    frozen, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([frozen, other], lr=0.1)
    separate_group(optimizer, [frozen])
    for step, rate in enumerate((0.0, 0.0, 0.1), start=1):
        optimizer.param_groups[1]["lr"] = rate
        frozen.grad, other.grad = torch.full((2,), rate), torch.ones(2)
        optimizer.step()
        assert optimizer.state[other]["step"] == step
        assert optimizer.state[frozen]["step"] == (1 if rate else 0)


def run_two(engine: str, folder: Path) -> list[dict[str, Any]]:
    if engine != "fsdp2" and (importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None):
        pytest.skip("needs DeepSpeed and g++")
    root = Path(__file__).parents[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PATH": path, "WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, __file__, engine, rank, str(folder)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=root, env=environment, stderr=pipe, text=True))
    return results_of(processes, folder)


def main(engine: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = {"init_method": f"file://{folder / 'meeting'}", "rank": rank, "world_size": 2}
    if engine == "fsdp2":
        dist.init_process_group("gloo", **where)
    else:
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, **where)
    assert dist.get_world_size() == 2
    torch.save(results(engine), folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
