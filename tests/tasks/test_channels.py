"""Images of other channels than RGB, or of 16 bits, through the tasks: trained on, resumed, measured and looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_accel import AccelViTConfig, AccelViTModel, MoCoForPreTraining, PretrainConfig, PretrainTrainer, vit_tiny
from hf_accel.checkpoints import ArrayProcessor, input_of
from hf_accel.data import image_processor, load_sources
from hf_accel.data.sources import IMAGENET_MEAN, IMAGENET_STD
from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.tasks.plan import preview_run
from hf_accel.training.normalising import normalise_source
from hf_accel.utils.errors import SettingError
from tests.commands import code_blocks
from tests.tiny_runs import RECIPE, SIZE, assert_same_weights, launch, losses, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

ROOT = Path(__file__).parents[2]
KINDS: dict[str, tuple[int, Any, str]] = {
    "gray": (1, np.uint8, "png"),
    "gray of 16 bits": (1, np.uint16, "png"),
    "RGB of 16 bits": (3, np.uint16, "npy"),
    "bands": (5, np.uint8, "npy"),
    "bands of 16 bits": (5, np.uint16, "tif"),
}


def save(path: Path, pixels: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix == ".png":
        PIL.Image.fromarray(pixels.squeeze(2)).save(path)
    else:
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")


def folder_of(root: Path, kind: str, count: int = 48) -> Path:
    """Images of three classes, in which another part is bright."""
    channels, dtype, suffix = KINDS[kind]
    rng, levels = np.random.default_rng(0), np.iinfo(dtype).max
    for number in range(count):
        folder = root / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.uniform(0, 0.3, (SIZE, SIZE, channels))
        pixels[5 * (number % 3) : 5 * (number % 3) + 5] += 0.5
        save(folder / f"{number:03}.{suffix}", (levels * pixels).astype(dtype))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_resumes_and_is_measured(kind, tmp_path, monkeypatch):
    channels, _, suffix = KINDS[kind]
    data = folder_of(tmp_path / "data", kind)
    of_kind = (f"num_channels={channels}", "batch_size=8", "budget=256", "cache=ram")
    whole = launch(data, tmp_path / "whole", *of_kind)
    assert len(losses(whole)) == 8 and np.isfinite(losses(whole)).all()
    config = AutoConfig.from_pretrained(whole / "final")
    assert config.num_channels == channels
    if channels != 3:
        source, _ = load_sources(str(data), num_channels=channels)
        assert (config.image_mean, config.image_std) == (list(source.mean), list(source.std))
    resumed = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", stopping_at(4))
        with pytest.raises(SystemExit):
            launch(data, resumed, *of_kind)
    launch(data, resumed, *of_kind)
    assert_same_weights(whole, resumed)
    launch(data, tmp_path / "eval", "task=evaluate", f"checkpoint={whole / 'final'}", "evaluations=[knn,linear]")
    top1 = [run["top1"] for entry in read(tmp_path / "eval/results.json")["evaluations"] for run in entry["runs"]]
    assert len(top1) == 2 and min(top1) > 0.5
    launch(data, tmp_path / "embed", "task=embed", f"checkpoint={whole / 'final'}")
    table = pd.read_parquet(tmp_path / "embed/embeddings.parquet")
    assert len(table) == 48 and table["path"][0] == f"a/000.{suffix}"
    assert np.isfinite(np.stack(list(table["embedding"]))).all()
    launch(data, tmp_path / "explore", "task=explore", f"checkpoint={whole / 'final'}")
    assert (tmp_path / "explore/explore.html").exists()
    launch(data, tmp_path / "views", "task=views", *of_kind)
    assert (tmp_path / "views/views.png").exists()


def stopping_at(step: int):
    """A `training_step` that is interrupted after so many steps."""
    real = PretrainTrainer.training_step

    def training_step(self, model, inputs, *args):
        if inputs["step"] == step:
            raise KeyboardInterrupt
        return real(self, model, inputs, *args)

    return training_step


@pytest.mark.slow
def test_continued_run_keeps_its_normalisation(tmp_path):
    data = folder_of(tmp_path / "data", "bands")
    of_kind = ("num_channels=5", "batch_size=8", "budget=64", "eval_points=[]")
    first = launch(data, tmp_path / "first", *of_kind)
    (data / "c" / "002.npy").unlink()  # The rest has another mean.
    second = launch(data, tmp_path / "second", *of_kind, f"continue_from={first}")
    means = [AutoConfig.from_pretrained(run / "final").image_mean for run in (first, second)]
    assert means[0] == means[1] != list(load_sources(str(data), num_channels=5)[0].mean)


@pytest.mark.slow
def test_finetuning_takes_arrays(tmp_path):
    data = folder_of(tmp_path / "data", "bands")
    settings = ("finetune_config.epochs=1", "finetune_config.batch_size=8")
    about = ("task=evaluate", "checkpoint=random", "num_channels=5", "evaluations=[finetune]", *settings)
    output = launch(data, tmp_path / "out", *about)
    assert list(output.glob("finetuned-*/preprocessor_config.json"))


@pytest.mark.slow
def test_views_of_workers_equal_those_in_memory(tmp_path):
    data = folder_of(tmp_path / "data", "bands of 16 bits")
    of_kind = ("num_channels=5", "batch_size=8", "budget=128", "eval_points=[]")
    first = launch(data, tmp_path / "first", *of_kind)
    second = launch(data, tmp_path / "second", *of_kind, "view_backend=eager", "num_workers=1")
    assert_same_weights(first, second)


@pytest.mark.slow
def test_search_takes_other_channels(tmp_path):
    data = folder_of(tmp_path / "data", "bands")
    of_kind = ("num_channels=5", "batch_size=8", "budget=128")
    pilot = launch(data, tmp_path / "pilot", *of_kind, "keep_points=[1.0]")
    search = ("search_draws=3", "search_token_dropout=[0,0.5]", "search_patch_size=[4]")
    about = ("task=search", f"pilot={pilot}", "num_channels=5", "batch_size=8", *search)
    assert (launch(data, tmp_path / "out", *about) / "schedule.yaml").exists()


def test_a_program_trains_on_arrays(tmp_path):
    rng = np.random.default_rng(0)
    items = [(rng.integers(0, 60_000, (SIZE, SIZE, 4), np.uint16), number % 2) for number in range(16)]
    config = vit_tiny(**RECIPE["model_config"], num_channels=4, image_size=SIZE, patch_size=4)
    args = PretrainConfig(str(tmp_path), budget=4 * 16, schedule=None, batch_size=8, eval_points=[], report_to=[])
    trainer = PretrainTrainer(MoCoForPreTraining(config, **RECIPE["objective_config"]), args, items)
    assert config.image_mean == list(trainer.source.mean) and trainer.source.deep
    assert next(iter(trainer.get_train_dataloader()))["images"].dtype == torch.uint16
    trainer.train()
    assert trainer.state.global_step == 2 and (tmp_path / "results.json").exists()


# Normalisation


def settled(source: Any, choice: Any = None, **fields: Any):
    config = AccelViTConfig(hidden_size=32, num_attention_heads=2, **fields)
    made = normalise_source(source, config, choice)
    return made, config


@pytest.fixture
def dark(tmp_path) -> Any:
    """RGB images that are darker than ImageNet's."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 60, (9, 9, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return load_sources(str(tmp_path))[0]


def test_dark_rgb_images_are_normalised_as_before_with_a_hint(dark, caplog):
    made, config = settled(dark)
    assert made.mean == IMAGENET_MEAN and config.image_mean is None
    assert "normalisation: data" in caplog.text


def test_usual_rgb_images_give_no_hint(dark, caplog):
    shape = (40, 3, 9, 9)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(IMAGENET_STD)[:, None, None]
    pixels = 255 * (noise + torch.tensor(IMAGENET_MEAN)[:, None, None])
    dark.pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    settled(dark)
    assert not caplog.text


def test_normalisation_by_the_data_is_in_the_configuration(dark):
    made, config = settled(dark, "data")
    assert max(made.mean) < 0.15 and config.image_mean == list(made.mean) and config.image_std == list(made.std)
    again, _ = settled(dark, "data", image_mean=config.image_mean, image_std=config.image_std)
    assert again.mean == made.mean


def test_normalisation_by_imagenet_may_be_named(dark, caplog):
    made, config = settled(dark, "imagenet")
    assert made.mean == IMAGENET_MEAN and config.image_mean == list(IMAGENET_MEAN) and not caplog.text


def test_normalisation_that_contradicts_the_encoder_is_refused(dark):
    with pytest.raises(SettingError, match="normalisation='data': the encoder brings its own"):
        settled(dark, "data", image_mean=[0.5] * 3, image_std=[0.5] * 3)


def test_imagenet_has_three_channels(tmp_path):
    source = load_sources(str(folder_of(tmp_path, "gray")), num_channels=1)[0]
    with pytest.raises(SettingError, match="normalisation='imagenet': ImageNet has 3 channels"):
        settled(source, "imagenet", num_channels=1)
    with pytest.raises(SettingError, match=r"num_channels=3: the images of .* have 1 channels"):
        settled(source)


# Recipes


@pytest.mark.parametrize("value", [0, 17])
def test_number_of_channels_is_checked(value):
    with pytest.raises(RecipeError, match=f"num_channels={value}: must be a whole number from 1 to 16"):
        load_recipe(None, ["budget=1", f"num_channels={value}"])


def test_number_of_channels_is_a_key_of_its_own():
    with pytest.raises(RecipeError, match=r"model_config\.num_channels=1: is a key of its own"):
        load_recipe(None, ["model_config.num_channels=1"])


def test_init_from_an_encoder_of_other_channels_is_refused(tmp_path):
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    AccelViTModel(AccelViTConfig(**sizes, intermediate_size=64, image_size=SIZE)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"num_channels=1: the encoder of init_from=.* takes images of 3"):
        load_recipe(None, [f"init_from={tmp_path}", "num_channels=1"])
    with pytest.raises(ValueError, match="num_channels"):
        MoCoForPreTraining.from_encoder(str(tmp_path), num_channels=1)


def test_init_from_brings_channels_and_normalisation(tmp_path):
    data = folder_of(tmp_path / "data", "bands")
    normal: dict[str, Any] = {"image_mean": [0.1] * 5, "image_std": [0.3] * 5}
    config = AccelViTConfig(**RECIPE["model_config"], num_channels=5, image_size=SIZE, patch_size=4, **normal)
    AccelViTModel(config).save_pretrained(tmp_path / "encoder")
    source = load_sources(str(data), num_channels=5)[0].renormalised(*normal.values())
    image_processor(source, SIZE).save_pretrained(tmp_path / "encoder")
    about = [f"init_from={tmp_path / 'encoder'}", f"data={data}", "batch_size=8", f"output_dir={tmp_path / 'out'}"]
    recipe: Any = load_recipe(None, [*about, "budget=1000"])
    assert recipe.num_channels == 5
    with preview_run(recipe) as trainer:
        assert trainer.source.mean == (0.1,) * 5


# Image processors


def test_saved_processor_prepares_arrays_as_documented(tmp_path):
    data = folder_of(tmp_path / "data", "bands of 16 bits")
    source = load_sources(str(data), num_channels=5)[0]
    image_processor(source, SIZE).save_pretrained(tmp_path)
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    array = np.asarray(source.read(0))
    own = ArrayProcessor(processor)([array])["pixel_values"]
    theirs = processor(images=array, input_data_format="channels_last", do_resize=False, return_tensors="pt")
    torch.testing.assert_close(own, theirs["pixel_values"])
    size, mean, std = input_of(processor)
    assert size == SIZE and np.allclose(mean, source.mean) and np.allclose(std, source.std)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16)])
def test_arrays_are_prepared_as_images_of_pillow(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    image = PIL.Image.fromarray(pixels).resize(shape, PIL.Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.png")
    processor = image_processor(load_sources(str(tmp_path))[0], SIZE)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    assert (ArrayProcessor(processor)([np.asarray(image)])["pixel_values"] - theirs).abs().max() < 0.02


def test_processor_without_sizes_is_refused():
    with pytest.raises(ValueError, match="states no image_mean, image_std and size"):
        ArrayProcessor(object())


@pytest.mark.slow
def test_five_lines_of_the_docs_encode_an_array(tmp_path, monkeypatch):
    (block,) = [
        code for code in code_blocks((ROOT / "docs/data.md").read_text(), "python") if "input_data_format" in code
    ]
    config = AccelViTConfig(**RECIPE["model_config"], num_channels=5, image_size=SIZE, patch_size=4)
    AccelViTModel(config).save_pretrained(tmp_path / "runs/bands/final")
    source = load_sources(str(folder_of(tmp_path / "data", "bands of 16 bits")), num_channels=5)[0]
    image_processor(source, SIZE).save_pretrained(tmp_path / "runs/bands/final")
    np.save(tmp_path / "image.npy", np.asarray(source.read(0)))
    monkeypatch.chdir(tmp_path)
    exec(block, scope := {})
    model = AutoModel.from_pretrained(tmp_path / "runs/bands/final")
    pixels = ArrayProcessor(image_processor(source, SIZE))([source.read(0)])["pixel_values"]
    torch.testing.assert_close(scope["features"], model(pixel_values=pixels).pooler_output)
