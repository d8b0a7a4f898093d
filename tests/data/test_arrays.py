"""Images of other channels than RGB, or of 16 bits: opened, decoded, cut, stored and evaluated."""

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from hf_accel.data import ImageSource, TrainSampler, eval_loader, image_source, load_sources, train_loader
from hf_accel.data.arrays import NeedsTifffile, channels_and_bits, open_array, open_image
from hf_accel.data.augment import AUGMENTATIONS, ViewConfig, make_views
from hf_accel.data.cache import decode_at, estimate_bytes, store_images
from hf_accel.data.decoding import image_pixels, upright
from hf_accel.data.fused import FusedViews
from hf_accel.data.normalisation import is_like_imagenet, measure_normalisation
from hf_accel.data.sources import CorruptDataError, CorruptImage

PLAIN = (ViewConfig(crop_scale=(1, 1), crop_ratio=(1, 1), jitter=0, grayscale=0, blur=0, flip=0),)


def noise(*shape: int, dtype: Any = np.uint16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def saved(array: np.ndarray | PIL.Image.Image, file_format: str, **options) -> bytes:
    image = PIL.Image.fromarray(array) if isinstance(array, np.ndarray) else array
    image.save(file := io.BytesIO(), file_format, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(file := io.BytesIO(), array, photometric="minisblack", **options)
    return file.getvalue()


def decoded(content: bytes, channels: int, deep: bool = True) -> np.ndarray:
    """The pixels (H, W, C) of a file."""
    return image_pixels(open_image(content, channels), 1.0, channels, deep).permute(1, 2, 0).numpy()


def folder_of(path, count: int, channels: int, dtype=np.uint16, size=(10, 8)):
    """Save arrays as .npy in two class folders, and return the folder."""
    for number in range(count):
        folder = path / "ab"[number % 2]
        folder.mkdir(exist_ok=True, parents=True)
        values = np.random.default_rng(number).integers(0, np.iinfo(dtype).max, (*size, channels), dtype)
        np.save(folder / f"{number:03}.npy", values)
    return path


# Files


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_npy_keeps_channels_and_bits(channels, dtype):
    pixels = noise(6, 7, channels, dtype=dtype)
    assert np.array_equal(decoded(npy(pixels), channels, dtype == np.uint16), pixels)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_npy_of_any_byte_order_keeps_its_values(order):
    pixels = noise(6, 7)
    assert np.array_equal(decoded(npy(pixels.astype(order)), 1)[..., 0], pixels)


@pytest.mark.parametrize("channels", [2, 4, 5, 16])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_tiff_keeps_channels_and_16_bits(channels, planes):
    pixels = noise(6, 7, channels)
    stored = pixels if planes == "contig" else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    assert np.array_equal(decoded(tiff(stored, planarconfig=planes), channels), pixels)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_gray_of_16_bits_keeps_them_as_one_channel(file_format):
    pixels = noise(6, 7)
    content = saved(pixels, file_format)
    assert np.array_equal(decoded(content, 1)[..., 0], pixels)
    assert np.array_equal(decoded(content, 3, deep=False), (pixels >> 8).astype(np.uint8)[..., None].repeat(3, 2))


def test_one_channel_of_rgb_is_pillows_gray():
    pixels = noise(9, 9, 3, dtype=np.uint8)
    gray = np.asarray(PIL.Image.fromarray(pixels).convert("L"))
    assert np.array_equal(decoded(saved(pixels, "PNG"), 1, deep=False)[..., 0], gray)
    assert np.array_equal(decoded(npy(pixels), 1, deep=False)[..., 0], gray)
    deep = decoded(npy(pixels.astype(np.uint16) * 257), 1)[..., 0]
    assert np.abs(deep / 257 - gray).max() <= 0.5


def test_a_palette_becomes_gray_and_rgb():
    image = PIL.Image.fromarray(noise(9, 9, 3, dtype=np.uint8)).quantize(8)
    content = saved(image, "PNG")
    assert np.array_equal(decoded(content, 1, deep=False)[..., 0], np.asarray(image.convert("L")))
    assert np.array_equal(decoded(content, 3, deep=False), np.asarray(image.convert("RGB")))


def test_rgba_is_four_channels_or_rgb():
    pixels = noise(9, 9, 4, dtype=np.uint8)
    assert np.array_equal(decoded(saved(pixels, "PNG"), 4, deep=False), pixels)
    assert np.array_equal(decoded(saved(pixels, "PNG"), 3, deep=False), pixels[..., :3])


def test_a_photograph_in_another_set_is_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    content = saved(noise(6, 9, dtype=np.uint8), "JPEG", exif=exif)
    assert decoded(content, 1, deep=False).shape == (9, 6, 1)


def test_8_bits_among_16_are_scaled_exactly():
    pixels = noise(6, 7, 2, dtype=np.uint8)
    assert np.array_equal(decoded(npy(pixels), 2), pixels.astype(np.uint16) * 257)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_and_paged_files_are_their_first_frame(file_format):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    content = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert getattr(PIL.Image.open(io.BytesIO(content)), "n_frames") == 3  # noqa: B009
    pixels = decoded(content, 3, deep=False)
    assert pixels[..., 0].min() > 240 and pixels[..., 1:].max() < 16


def test_pages_of_arrays_are_their_first_one():
    pixels = noise(2, 6, 7, 5)
    content = tiff(pixels, planarconfig="contig")
    assert np.array_equal(decoded(content, 5), pixels[0])


# Refusals


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((6, 7, 2), np.float32), "its pixels are float32: rescale .* uint8 or uint16"),
        (np.zeros((6, 7), np.int16), "its pixels are int16"),
        (np.zeros((5, 60, 70), np.uint8), r"has its channels first: save numpy.moveaxis\(array, 0, -1\)"),
        (np.zeros((60, 70, 17), np.uint8), "it has 17 channels, and at most 16"),
        (np.zeros((2, 6, 7, 3), np.uint8), r"is no image: it must be \(H, W\) or \(H, W, C\)"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        open_image(npy(array), 5)


def test_other_channels_are_refused_with_their_number():
    with pytest.raises(ValueError, match="it has 5 channels, and num_channels is 3"):
        upright(open_array(noise(6, 7, 5)), 3, True)
    with pytest.raises(ValueError, match="it has 3 channels, and num_channels is 4"):
        decoded(saved(noise(6, 7, 3, dtype=np.uint8), "PNG"), 4)


def test_16_bits_in_a_set_of_8_bits_are_refused():
    with pytest.raises(ValueError, match="it has 16 bits"):
        upright(open_array(noise(6, 7, 5)), 5, False)


def test_32_bits_beyond_16_are_refused():
    with pytest.raises(ValueError, match="exceed 0 to 65535"):
        decoded(saved(np.full((6, 7), 70_000, np.int32), "TIFF"), 1)


def test_floating_point_tiff_is_refused():
    with pytest.raises(ValueError, match="floating-point"):
        decoded(saved(np.zeros((6, 7), np.float32), "TIFF"), 1)


def test_tiff_without_tifffile_names_the_command(monkeypatch, tmp_path):
    content = tiff(noise(6, 7, 5), planarconfig="contig")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(NeedsTifffile, match="pip install tifffile"):
        open_image(content, 5)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(CorruptDataError, match=r"a\.tif: .*pip install tifffile"):
        load_sources(str(tmp_path), num_channels=5)
    with pytest.raises(CorruptImage, match="pip install tifffile"):
        load_sources(str(tmp_path))[0].read(0)


def test_header_tells_channels_and_bits(tmp_path):
    files = {
        "a.png": (saved(noise(6, 7), "PNG"), (1, 16)),
        "b.jpg": (saved(noise(6, 7, 3, dtype=np.uint8), "JPEG"), (3, 8)),
        "c.npy": (npy(noise(6, 7, 5)), (5, 16)),
        "d.tif": (tiff(noise(6, 7, 4), planarconfig="contig"), (4, 16)),
        "e.gif": (saved(noise(6, 7, dtype=np.uint8), "GIF"), (3, 8)),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        assert channels_and_bits(tmp_path / name) == expected, name


# Sets


def test_folder_of_arrays_keeps_16_bits(tmp_path):
    folder_of(tmp_path, 20, 5)
    source, validation = load_sources(str(tmp_path), num_channels=5)
    assert source.pixels is not None and source.pixels.dtype == torch.uint16 and source.pixels.shape[1:] == (5, 10, 8)
    assert validation is not None and validation.mean == source.mean and len(source.mean) == 5
    assert source.class_names == ["a", "b"]


def test_arrays_beside_other_images_are_left_out(tmp_path, caplog):
    folder_of(tmp_path, 2, 3)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    source, _ = load_sources(str(tmp_path), label_column="none")
    assert len(source) == 1 and "keep them in a folder apart" in caplog.text


def test_a_set_of_other_channels_names_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"00.\.npy has 5 channels, and num_channels is 3: set num_channels: 5"):
        load_sources(str(folder_of(tmp_path, 4, 5)))


def test_bundled_digits_have_three_channels():
    with pytest.raises(ValueError, match="num_channels=1: the bundled digits"):
        load_sources("bundled", num_channels=1)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_items_may_be_arrays_or_tensors(kind, dtype):
    images = [noise(6, 7, 5, dtype=dtype) + np.asarray(number, dtype) for number in range(4)]
    items = [kind(image if kind is np.asarray else np.moveaxis(image, 2, 0).copy()) for image in images]
    source = image_source(items, "mine", num_channels=5)
    for number, image in enumerate(images):
        assert np.array_equal(np.asarray(source.read(number)), image)


def test_items_of_other_channels_are_refused():
    with pytest.raises(TypeError, match="num_channels = 3"):
        image_source([noise(6, 7, 5)] * 3, "mine")


def test_mean_and_deviation_are_those_of_the_pixels():
    pixels = torch.from_numpy(noise(40, 2, 9, 9) // np.array([1, 4], np.uint16)[:, None, None])
    mean, std = measure_normalisation(ImageSource("x", pixels=pixels))
    values = pixels.double() / 65535
    assert np.allclose(mean, values.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(std, values.std((0, 2, 3), correction=0), atol=1e-4)


def test_a_constant_channel_has_the_deviation_one():
    pixels = torch.full((4, 2, 6, 6), 9, dtype=torch.uint8)
    assert measure_normalisation(ImageSource("x", pixels=pixels)) == ([0.0353] * 2, [1.0] * 2)


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),
        ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26), True),
        ((0.485, 0.456, 0.55), (0.229, 0.224, 0.225), False),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.14), False),
    ],
)
def test_what_is_like_imagenet(mean, std, expected):
    assert is_like_imagenet(mean, std) is expected


# Views


@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("render", [None, FusedViews(backend=None)])
def test_plain_views_are_the_pixels(size, dtype, render):
    levels = torch.iinfo(dtype).max
    images = torch.randint(levels, (4, 5, size, size), dtype=torch.int32).to(dtype)
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5,) * 5
    (view,) = make_views({"images": images}, PLAIN, size, 0, 0, mean=mean, std=std, render=render)
    back = view * 0.5 + torch.tensor(mean)[:, None, None]
    assert (back - images.double() / levels).abs().max() < 1 / 65535


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_fused_and_eager_views_agree_for_all_kinds(channels, dtype):
    levels = torch.iinfo(dtype).max
    batch = {"images": torch.randint(levels, (8, channels, 40, 40), dtype=torch.int32).to(dtype)}
    normal = {"mean": (0.5,) * channels, "std": (0.2,) * channels}
    one, other = (
        make_views(batch, AUGMENTATIONS["moco"], 32, 3, 1, **normal, render=r) for r in (None, FusedViews(backend=None))
    )
    for first, second in zip(one, other, strict=True):
        assert first.shape == (8, channels, 32, 32)
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


def test_views_of_16_bits_equal_those_of_8():
    images = torch.randint(256, (8, 3, 40, 40), dtype=torch.uint8)
    deep = (images.int() * 257).to(torch.uint16)
    one, other = (make_views({"images": i}, AUGMENTATIONS["moco"], 32, 3, 1) for i in (images, deep))
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, atol=2e-6, rtol=0)


def test_mirrored_crops_of_16_bits_equal_those_of_8():
    images = torch.randint(256, (8, 5, 90, 80), dtype=torch.uint8)
    deep = (images.int() * 257).to(torch.uint16)
    configs = (ViewConfig(jitter=0, grayscale=0, blur=0, flip=1),)
    mean, std = (0.0,) * 5, (1.0,) * 5
    (one,), (other,) = (make_views({"images": i}, configs, 64, 3, 1, mean=mean, std=std) for i in (images, deep))
    assert (one - other).abs().max() < 1.1 / 255


def test_channels_that_are_no_colours_stay_apart():
    images = torch.zeros(16, 4, 32, 32, dtype=torch.uint8)
    images[:, 2] = torch.randint(256, (16, 32, 32), dtype=torch.uint8)
    mean, std = (0.0,) * 4, (1.0,) * 4
    configs = (ViewConfig(jitter=1, grayscale=1, saturation=0.9, hue=0.5),)
    for render in (None, FusedViews(backend=None)):
        (view,) = make_views({"images": images}, configs, 32, 0, 0, mean=mean, std=std, render=render)
        assert view[:, [0, 1, 3]].abs().max() == 0 and view[:, 2].std() > 0


# Loading and storing


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_stored_and_loaded_images_are_those_of_the_files(tmp_path, channels, dtype):
    for number, size in enumerate(((9, 7), (6, 11), (8, 8), (8, 8))):
        np.save(tmp_path / f"{number}.npy", noise(*size, channels, dtype=dtype))
    source, _ = load_sources(str(tmp_path), num_channels=channels, in_memory=False)
    source.stored = store_images(source, 64, torch.device("cpu"))
    assert source.stored.rows.dtype == source.dtype and source.stored.rows.nbytes <= estimate_bytes(source, 64)
    taken = source.stored.take(torch.arange(4))
    for number in range(4):
        image = torch.from_numpy(np.load(tmp_path / f"{number}.npy")).permute(2, 0, 1)
        image = image.transpose(1, 2) if image.shape[2] > image.shape[1] else image
        assert torch.equal(taken["images"][number, :, : image.shape[1], : image.shape[2]], image)


def test_large_arrays_are_stored_smaller(tmp_path):
    steps = np.linspace(0, 65535, 80).astype(np.uint16)
    np.save(tmp_path / "a.npy", np.broadcast_to(steps[:, None, None], (80, 80, 5)))
    source, _ = load_sources(str(tmp_path), num_channels=5, in_memory=False)
    pixels = decode_at(source, 0, source.open(0), 40, 40)
    assert pixels.dtype == torch.uint16 and pixels.shape == (40, 40, 5)
    expected = torch.from_numpy(steps.astype(np.int32)).view(40, 2).float().mean(1)
    assert (pixels[2:-2, 0, 0].float() - expected[2:-2]).abs().max() < 2


@pytest.mark.parametrize("in_memory", [True, False])
def test_loaders_give_all_channels_and_bits(tmp_path, in_memory):
    folder_of(tmp_path, 12, 5, size=(16, 16))
    source, _ = load_sources(str(tmp_path), num_channels=5, in_memory=in_memory, only_train=True)
    sampler = TrainSampler(len(source), 4, last_step=2)
    for batch in train_loader(source, sampler, PLAIN, lambda step: 16):
        made = batch["images"] if in_memory else batch["crops"][0]
        for index, pixels in zip(batch["index"].tolist(), made, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(source.read(index)))
    for size in (8, 16):
        batch = next(iter(eval_loader(source, size, 4)))
        assert batch["pixel_values"].shape == (4, 5, size, size)
    whole = batch["pixel_values"] * torch.tensor(source.std)[:, None, None] + torch.tensor(source.mean)[:, None, None]
    first = np.asarray(source.read(0)).transpose(2, 0, 1) / 65535
    assert np.abs(whole[0].numpy() - first).max() < 1 / 65535


def test_unreadable_arrays_are_replaced(tmp_path):
    folder_of(tmp_path, 12, 5, size=(16, 16))
    (tmp_path / "a" / "000.npy").write_bytes(b"\x93NUMPY")
    source, _ = load_sources(str(tmp_path), num_channels=5, in_memory=False, only_train=True)
    batch = next(iter(train_loader(source, TrainSampler(12, 12), PLAIN, lambda step: 16)))
    assert 0 not in batch["index"].tolist() and len(source.bad) == 1


def test_rgb_images_take_the_path_of_pillow(tmp_path):
    PIL.Image.fromarray(noise(9, 9, 3, dtype=np.uint8)).save(tmp_path / "a.png")
    source, _ = load_sources(str(tmp_path), in_memory=False)
    assert isinstance(source.read(0), PIL.Image.Image) and source.dtype == torch.uint8
    assert isinstance(open_image((tmp_path / "a.png").read_bytes()), PIL.Image.Image)
