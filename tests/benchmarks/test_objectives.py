"""benchmarks/objectives.py at a toy size: both steps do the same work, and what it writes is what it measured."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks import objectives, peers
from hf_accel.objectives.dino import dino_loss
from hf_accel.objectives.simclr import nt_xent_loss

ARGUMENTS = [
    *("--image-size", "32", "--patch-size", "8", "--batch-size", "4", "--repeats", "2", "--threads", "1"),
    *("--device", "cpu", "--projector-hidden-size", "64", "--num-prototypes", "32"),
]


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_ours_and_the_peers_step_do_the_same_work(name):
    steps = objectives.both_steps(name, objectives.parse_arguments(ARGUMENTS), peers.PlainComponents())
    views, flops, sizes = [torch.randn(4, 3, 32, 32) for _ in range(2)], {}, {}
    for who, (step, model) in steps.items():
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.set_attn_implementation("eager")  # the counter does not see inside a CPU's fused attention
        with FlopCounterMode(display=False) as counter:
            loss = step.loss(views)
            loss.backward()
        flops[who] = counter.get_total_flops()
        # position embeddings, which ours computes, aside
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "position" not in n]
        sizes[who] = sum(parameter.numel() for _, parameter in named)
        assert all(parameter.grad is not None for _, parameter in named)
        before = [parameter.clone() for parameter in model.parameters()]
        with torch.no_grad():
            for _, parameter in named:
                parameter.add_(1.0)
        step.update_target()
        moved = sum(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert (moved > len(named)) == (name != "simclr"), "a target follows; SimCLR has none"
    assert flops["ours"] == pytest.approx(flops["peer"], rel=0.01)
    assert sizes["ours"] == sizes["peer"]


def test_the_plain_losses_are_ours():
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    theirs = peers.PlainComponents().nt_xent(0.2)(a, b)
    torch.testing.assert_close(theirs, nt_xent_loss(a, b, 0.2))


def test_the_plain_dino_loss_and_centre_are_ours():
    loss = peers.PlainComponents().dino_loss(7)
    center = torch.zeros(1, 7)
    for _ in range(3):
        teacher, student = ([torch.randn(4, 7), torch.randn(4, 7)] for _ in range(2))
        ours = dino_loss(student, teacher, center, peers.STUDENT_TEMPERATURE, peers.TEACHER_TEMPERATURE)
        torch.testing.assert_close(loss(teacher, student), ours)
        center = center.lerp(torch.cat(teacher).mean(dim=0, keepdim=True), 1 - peers.CENTER_MOMENTUM)


@pytest.mark.slow
def test_table_and_json(tmp_path, capsys):
    output = tmp_path / "objectives.json"
    assert objectives.main([*ARGUMENTS, "--output", str(output)]) == 0
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert [row["objective"] for row in written["rows"]] == list(peers.PEERS)
    for row in written["rows"]:
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high
        assert f" {row['ratio']:.3f} |" in printed
    assert written["peer"] in printed and written["batch_size"] == 4
