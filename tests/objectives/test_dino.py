"""DINO against transcriptions of the original: loss, centre, clipping, schedules.

Over processes: test_two_processes.py; FLOPs: test_units.py.
"""

import copy
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModel

import hf_accel  # noqa: F401  registers the Auto classes
from hf_accel.compression import Compression, Strategy
from hf_accel.data import AUGMENTATIONS
from hf_accel.models import AccelViTConfig
from hf_accel.objectives import DINOForPreTraining, Draw
from hf_accel.objectives.dino import dino_loss
from hf_accel.objectives.heads import PrototypeHead

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIG = AccelViTConfig(**SIZES, image_size=24, patch_size=4)
WHOLE = Strategy(Compression(4))


def model(config: AccelViTConfig = CONFIG, seed: int = 0, **settings: Any) -> DINOForPreTraining:
    torch.manual_seed(seed)
    heads = {"num_prototypes": 20, "head_hidden_size": 24, "bottleneck_size": 8}
    return DINOForPreTraining(config, **{**heads, **settings}).train()


def views_of(dino: DINOForPreTraining, batch: int = 6, seed: int = 0) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    sizes = [config.size or CONFIG.image_size for config in dino.view_configs(AUGMENTATIONS["moco"])]
    return [torch.randn(batch, 3, size, size, generator=source) for size in sizes]


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def numpy_loss(student, teacher, center, student_temperature: float, teacher_temperature: float) -> float:
    """Equation 3 of arXiv 2104.14294 with the centring of its algorithm 1, image by image."""
    terms = []
    for i, target in enumerate(teacher):
        for j, prediction in enumerate(student):
            if i == j:
                continue
            per_image = []
            for t, s in zip(target, prediction, strict=True):
                p_teacher, p_student = softmax((t - center) / teacher_temperature), softmax(s / student_temperature)
                per_image.append(-sum(p * math.log(q) for p, q in zip(p_teacher, p_student, strict=True)))
            terms.append(sum(per_image) / len(per_image))
    return sum(terms) / len(terms)


# Loss


@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.1, 0.07), (1.0, 0.5), (0.3, 1.0)])
@pytest.mark.parametrize("views", [2, 3, 6])
@pytest.mark.parametrize("rows, prototypes", [(1, 3), (4, 2), (2, 5)])
def test_loss_and_gradient_against_numpy(rows, prototypes, views, temperatures):
    rng = np.random.default_rng([rows, prototypes, views])
    student, teacher = rng.normal(size=(views, rows, prototypes)), rng.normal(size=(2, rows, prototypes))
    center = rng.normal(size=prototypes)
    tensor, targets = torch.tensor(student, requires_grad=True), torch.tensor(teacher, requires_grad=True)
    loss = dino_loss(tensor.unbind(), targets.unbind(), torch.tensor(center)[None], *temperatures)
    loss.backward()
    assert loss.item() == pytest.approx(numpy_loss(student, teacher, center, *temperatures), rel=1e-10)
    assert tensor.grad is not None and targets.grad is None
    for index in np.ndindex(student.shape):
        ends, value = [], student[index]
        for step in (1e-6, -1e-6):
            student[index] = value + step
            ends.append(numpy_loss(student, teacher, center, *temperatures))
        student[index] = value
        assert tensor.grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(views, 3, 50, generator=rng).to(dtype) for views in (4, 2))
    center = torch.randn(1, 50, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_loss(student.unbind(), teacher.unbind(), center, 0.1, 0.04)
    expected = numpy_loss(student.double().numpy(), teacher.double().numpy(), center[0].double().numpy(), 0.1, 0.04)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


# Steps


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_four_steps_with_their_centre_against_numpy(micro_batches):
    """Each loss by the centre before its step; the centre by the teacher's logits of the whole step."""
    dino = model(center_momentum=0.8, teacher_temperature_warmup=0.5, num_local_crops=2, local_crop_size=12)
    seen: dict[str, list[np.ndarray]] = {"student": [], "teacher": []}
    for name, head in (("student", dino.student_head), ("teacher", dino.teacher_head)):

        def note(_, __, logits, kept=seen[name]):
            kept.append(logits.detach().double().numpy())

        head.register_forward_hook(note)
    optimizer = torch.optim.SGD([p for p in dino.parameters() if p.requires_grad], lr=2.0)
    center, moved = np.zeros(20), []
    for step in range(4):
        progress = step / 4
        teacher_temperature = 0.04 + (0.07 - 0.04) * min(1, progress / 0.5)
        seen["teacher"].clear()
        for micro_step in range(micro_batches):
            views = views_of(dino, seed=10 * step + micro_step)
            output = dino(views, WHOLE, Draw(0, step, micro_step), progress)
            output.loss.backward()
            student, teacher = seen["student"][-1].reshape(4, 6, 20), seen["teacher"][-1].reshape(2, 6, 20)
            expected = numpy_loss(student, teacher, center, 0.1, teacher_temperature)
            assert output.loss.item() == pytest.approx(expected, rel=1e-5)
            entropies = [
                -sum(p * math.log(max(p, 1e-300)) for p in softmax((row - center) / teacher_temperature))
                for row in teacher.reshape(-1, 20)
            ]
            assert output.metrics["teacher_entropy"].item() == pytest.approx(np.mean(entropies), rel=1e-4)
            mean = np.mean([softmax((row - center) / teacher_temperature) for row in teacher.reshape(-1, 20)], axis=0)
            marginal = output.metrics["teacher_marginal_entropy"].item()
            assert marginal == pytest.approx(-sum(p * math.log(p) for p in mean), rel=1e-4)
            assert output.metrics["teacher_student_kl"].item() == pytest.approx(expected - np.mean(entropies), rel=1e-3)
            np.testing.assert_allclose(dino.get_buffer("center").numpy()[0], center, atol=1e-7)
        optimizer.step()
        optimizer.zero_grad()
        dino.update_target(progress)
        batch = np.concatenate(seen["teacher"])
        assert len(batch) == 12 * micro_batches
        before, center = center, 0.8 * center + 0.2 * batch.mean(axis=0)
        moved.append(np.abs(center - before).max())
        np.testing.assert_allclose(dino.get_buffer("center").numpy()[0], center, atol=1e-6)
    assert min(moved) > 1e-3  # of the tolerance's 1e-6


def test_evaluation_leaves_the_centre_alone():
    dino, other = model(), model()
    for step in range(2):
        for one in (dino, other):
            one(views_of(one, seed=step), WHOLE, Draw(0, step)).loss.backward()
        dino.eval()
        with torch.no_grad():
            dino(views_of(dino, seed=99), WHOLE, Draw(0, 99))
        dino.train()
        for one in (dino, other):
            one.update_target(0.0)
    assert other.get_buffer("center").abs().max() > 1e-3
    for (name, buffer), (_, expected) in zip(dino.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_without_a_forward_the_centre_stays():
    dino = model()
    dino.get_buffer("center").normal_()
    before = dino.get_buffer("center").clone()
    dino.update_target(0.0)
    assert torch.equal(dino.get_buffer("center"), before)


# Schedules, clipping, freezing


def test_temperature_rises_along_a_line_and_momentum_along_a_cosine():
    dino = model(teacher_temperature_warmup=0.3, momentum=0.9, momentum_end=0.99)
    for progress, expected in [(0, 0.04), (0.1, 0.05), (0.15, 0.055), (0.3, 0.07), (0.7, 0.07), (1.0, 0.07)]:
        assert dino.teacher_temperature(progress) == pytest.approx(expected)
    assert model(teacher_temperature_warmup=0.0).teacher_temperature(0.0) == 0.07
    pairs = [(dino.encoder, dino.student_encoder), (dino.teacher_head, dino.student_head)]
    for progress in (0.0, 0.25, 0.5, 1.0):
        momentum = 0.99 + (0.9 - 0.99) * (1 + math.cos(math.pi * progress)) / 2
        with torch.no_grad():
            for _, student in pairs:
                for parameter in student.parameters():
                    parameter.add_(torch.randn_like(parameter))
        before = [[p.clone() for p in teacher.parameters()] for teacher, _ in pairs]
        dino.update_target(progress)
        for olds, (teacher, student) in zip(before, pairs, strict=True):
            for old, now, online in zip(olds, teacher.parameters(), student.parameters(), strict=True):
                torch.testing.assert_close(now, momentum * old + (1 - momentum) * online)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_last_layer_is_frozen_until_its_progress(norm_last_layer):
    dino = model(freeze_last_layer=0.2, norm_last_layer=norm_last_layer)
    last = {"student_head.prototypes"} | (set() if norm_last_layer else {"student_head.lengths"})
    for progress, frozen in [(0.0, True), (0.199, True), (0.2, False), (1.0, False)]:
        dino.zero_grad()
        dino(views_of(dino), WHOLE, Draw(0, 0)).loss.backward()
        dino.before_optimizer_step(progress)
        without = {name for name, p in dino.named_parameters() if p.requires_grad and p.grad is None}
        assert without == (last if frozen else set())


@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 3.0])
def test_each_parameter_is_clipped_by_itself(clip_grad):
    dino, rng = model(clip_grad=clip_grad, freeze_last_layer=0.0), np.random.default_rng(0)
    gradients = {}
    for name, parameter in dino.named_parameters():
        if parameter.requires_grad:
            gradients[name] = rng.normal(size=parameter.shape) * 10 ** rng.uniform(-3, 1)
            parameter.grad = torch.tensor(gradients[name], dtype=torch.float32)
    dino.before_optimizer_step(0.5)
    clipped = 0
    for name, parameter in dino.named_parameters():
        if name in gradients:
            norm = math.sqrt((gradients[name] ** 2).sum())
            factor = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
            clipped += factor < 1
            assert parameter.grad is not None
            np.testing.assert_allclose(parameter.grad.numpy(), factor * gradients[name], rtol=1e-5, err_msg=name)
        else:
            assert parameter.grad is None
    assert (0 < clipped < len(gradients)) == (clip_grad > 0)


# Branches and views


def test_teacher_starts_as_the_student_and_has_neither_gradient_nor_stochastic_depth():
    dino = model(AccelViTConfig(**SIZES, image_size=24, patch_size=4, drop_path_rate=0.9))
    for teacher, student in ((dino.encoder, dino.student_encoder), (dino.teacher_head, dino.student_head)):
        for (name, one), other in zip(teacher.named_parameters(), student.parameters(), strict=True):
            assert torch.equal(one, other) and one is not other and not one.requires_grad, name
    assert dino.student_encoder.training and not dino.encoder.training
    views = views_of(dino)
    outputs = []
    for _ in range(2):
        logits = dino.teacher(views[:2], WHOLE, Draw(0, 0))
        dino.zero_grad()
        loss = dino(views, WHOLE, Draw(0, 0)).loss
        loss.backward()
        outputs.append((logits, loss))
    assert torch.equal(outputs[0][0][1], outputs[1][0][1]) and outputs[0][1] != outputs[1][1]
    for name, parameter in dino.named_parameters():
        assert (parameter.grad is None) == name.startswith(("encoder", "teacher")), name


@pytest.mark.parametrize(
    ("names", "least", "largest"),
    [
        ("num_prototypes head_hidden_size bottleneck_size", 1, None),
        ("student_temperature teacher_temperature teacher_temperature_start", 1e-6, None),
        ("teacher_temperature_warmup freeze_last_layer center_momentum momentum momentum_end", 0, 1),
        ("clip_grad num_local_crops", 0, None),
    ],
)
def test_settings_beyond_their_range_are_named(names, least, largest):
    for name in names.split():
        model(**{name: least})
        with pytest.raises(ValueError, match=f"{name}=.* must be at least {least}"):
            model(**{name: least - 1})
        if largest is not None:
            model(**{name: largest})
            with pytest.raises(ValueError, match=f"{name}=.* and at most {largest}"):
                model(**{name: largest + 1})


@pytest.mark.parametrize("scale", [(0.0, 0.4), (0.5, 0.4), (0.4, 1.1)])
@pytest.mark.parametrize("name", ["local_crop_scale", "global_crop_scale"])
def test_areas_of_crops_are_fractions_in_order(name, scale):
    whole: dict[str, Any] = {name: (1.0, 1.0)}
    model(**whole)
    with pytest.raises(ValueError, match=f"{name}=.* must be two areas"):
        model(**{**whole, name: scale})


def test_views_are_the_originals():
    first, second = model().view_configs(AUGMENTATIONS["moco"])
    assert (first, second) == AUGMENTATIONS["moco"]
    dino = model(num_local_crops=3, local_crop_size=12, local_crop_scale=[0.1, 0.3], global_crop_scale=[0.3, 1.0])
    *globals_, a, b, c = dino.view_configs(AUGMENTATIONS["moco"])
    assert [(g.crop_scale, g.blur, g.solarize, g.size) for g in globals_] == [
        ((0.3, 1.0), 1.0, 0.0, None),
        ((0.3, 1.0), 0.1, 0.2, None),
    ]
    assert a == b == c
    assert (a.crop_scale, a.blur, a.solarize, a.size) == ((0.1, 0.3), 0.5, 0.0, 12)
    # main_dino.py blurs by 0.1 to 2 pixels of whatever crop; sigmas here are those of a 224 px view
    in_pixels = [sigma * 12 / 224 for sigma in a.blur_sigma]
    assert in_pixels == pytest.approx([sigma * 24 / 224 for sigma in first.blur_sigma])
    with pytest.raises(ValueError, match="local_crop_size=14"):
        model(num_local_crops=1, local_crop_size=14)


@pytest.mark.parametrize(
    "strategy, student, teacher",
    [
        (WHOLE, [(12, 24, 36), (18, 12, 9)], [(12, 24, 36)]),
        (Strategy(Compression(6, 0.5)), [(12, 24, 8), (18, 12, 9)], [(12, 24, 16)]),
        (Strategy(Compression(4, 0.75), local=Compression(6)), [(12, 24, 9), (18, 12, 4)], [(12, 24, 36)]),
    ],
    ids=str,
)
def test_one_forward_for_each_length(strategy, student, teacher):
    """(rows, pixels, patch tokens) of every forward of six images with two global and three local crops."""
    dino = model(num_local_crops=3, local_crop_size=12)
    seen: dict[str, list[tuple[int, ...]]] = {}
    for name in ("student_encoder", "encoder"):

        def note(module, args, output, name=name):
            tokens = output.last_hidden_state.shape[1] - CONFIG.num_prefix_tokens
            seen.setdefault(name, []).append((len(args[0]), args[0].shape[-1], tokens))

        getattr(dino, name).register_forward_hook(note)
    heads = []
    for head in (dino.student_head, dino.teacher_head):
        head.register_forward_hook(lambda _, args, output: heads.append((*args[0].shape, output.shape[1])))
    dino(views_of(dino), strategy, Draw(0, 0)).loss.backward()
    assert seen == {"student_encoder": student, "encoder": teacher}
    assert sorted(heads) == [(12, 16, 20), (30, 16, 20)]


def test_each_view_meets_its_own_logits():
    """Views are stacked for the forwards and taken apart again: the same as every view by itself."""
    dino = model(num_local_crops=2, local_crop_size=12).eval()
    views = views_of(dino)
    whole = dino(views, WHOLE, Draw(0, 0)).loss
    size = {24: None, 12: 12}

    def alone(encoder, head, view):
        return head(dino.encode(encoder, view, Compression(4), Draw(0, 0), "x", size[view.shape[-1]]))

    student = [alone(dino.student_encoder, dino.student_head, view) for view in views]
    teacher = [alone(dino.encoder, dino.teacher_head, view) for view in views[:2]]
    temperature = dino.teacher_temperature(0.0)
    torch.testing.assert_close(whole, dino_loss(student, teacher, dino.get_buffer("center"), 0.1, temperature))


# Head and checkpoints


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_against_numpy(norm_last_layer):
    torch.manual_seed(0)
    head, rows = PrototypeHead(6, 10, 4, 7, norm_last_layer), torch.randn(5, 6)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    weights = {name: value.double().numpy() for name, value in head.state_dict().items()}

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    x = rows.double().numpy()
    for layer in (0, 2, 4):
        x = (gelu(x) if layer else x) @ weights[f"mlp.{layer}.weight"].T + weights[f"mlp.{layer}.bias"]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    prototypes = weights["prototypes"] / np.linalg.norm(weights["prototypes"], axis=1, keepdims=True)
    expected = x @ (prototypes * (1 if norm_last_layer else weights["lengths"])).T
    np.testing.assert_allclose(head(rows).detach().numpy(), expected, atol=1e-5)


def test_head_starts_as_the_original():
    """vision_transformer.py's DINOHead: truncated normal 0.02, no biases, prototypes at torch's default, length 1."""
    torch.manual_seed(0)
    dino = DINOForPreTraining(CONFIG, num_prototypes=300, norm_last_layer=False)
    head, bound = dino.student_head, 1 / math.sqrt(256)
    assert [tuple(p.shape) for p in head.mlp.parameters() if p.ndim > 1] == [(2048, 16), (2048, 2048), (256, 2048)]
    for parameter in head.mlp.parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
        else:
            assert not parameter.any()
    assert head.prototypes.shape == (300, 256) and head.prototypes.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert head.lengths is not None and torch.equal(head.lengths, torch.ones(300, 1))
    assert set(dino.collapse_symptoms({"loss": math.log(300)})) == {"uniform"}


@pytest.mark.slow
def test_a_checkpoint_holds_the_centre_and_opens_as_the_teacher(tmp_path):
    dino = model()
    dino(views_of(dino), WHOLE, Draw(0, 0)).loss.backward()
    with torch.no_grad():
        for parameter in dino.student_encoder.parameters():
            parameter.add_(1.0)
    dino.update_target(0.0)
    names = set(dino.state_dict()) - {name for name, _ in dino.named_parameters()}
    assert names == {"center"} and dino.get_buffer("center").any()
    dino.save_pretrained(tmp_path)
    encoder: Any = AutoModel.from_pretrained(tmp_path)
    for name, value in dino.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    other = cast(Any, model(seed=1))
    other.load_state_dict(dino.state_dict(), strict=True)
    assert torch.equal(other.center, dino.get_buffer("center"))


def test_settings_are_those_that_the_model_was_made_with():
    assert model(momentum=0.9).settings["momentum"] == 0.9
    again = copy.deepcopy(model(momentum=0.9))
    assert again.settings["momentum"] == 0.9 and again.settings["clip_grad"] == 3.0 and "config" not in again.settings
