"""Test that the size in a header equals the size of the decoded image, however it is rotated."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from hf_accel import read_image
from hf_accel.data import decoding
from hf_accel.data.decoding import ORIENTATION, upright_rgb, upright_size

FORMATS = ["AVIF", "JPEG", "PNG", "TIFF", "WEBP"]
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def stored(file_format, **options):
    """Return an image of 32 x 20 stored pixels, as Pillow opens it."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, file_format, **options)
    return PIL.Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", FORMATS)
def test_header_and_decoded_size_agree(file_format, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = stored(file_format, exif=exif)
    expected = (20, 32) if orientation > 4 else (32, 20)
    assert upright_size(image) == expected
    upright = upright_rgb(image)
    assert upright.size == expected
    assert upright_size(upright) == expected  # it is not rotated a second time


def test_tiff_with_orientation_in_xmp_only():
    image = stored("TIFF", tiffinfo={700: XMP.encode()})
    assert upright_size(image) == upright_rgb(image).size == (20, 32)


def test_tiff_that_was_loaded_keeps_its_size():
    image = stored("TIFF", tiffinfo={274: 6})
    image.load()
    assert upright_size(image) == upright_rgb(image).size == (20, 32)


def jpeg_of(mode: str = "RGB", orientation: int = 1, cut: int | None = None) -> io.BytesIO:
    """A JPEG file of 101 x 74 pixels, without its last `cut` bytes."""
    small = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(small).resize((101, 74), PIL.Image.Resampling.BICUBIC).convert(mode)
    image.getexif()[ORIENTATION] = orientation
    image.save(file := io.BytesIO(), "JPEG", quality=90, exif=image.getexif())
    return io.BytesIO(file.getvalue()[:-cut] if cut else file.getvalue())


def decoded_by(package: bool, monkeypatch, file: io.BytesIO, shrink: float) -> torch.Tensor:
    """Decode by simplejpeg or by Pillow alone."""
    with monkeypatch.context() as patch:
        if not package:
            patch.setattr(decoding, "simplejpeg", None)
        return decoding.image_pixels(PIL.Image.open(io.BytesIO(file.getvalue())), shrink)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [1.0, 2.5, 8.0])
def test_simplejpeg_gives_the_pixels_of_pillow(orientation, shrink, monkeypatch) -> None:
    decoder = pytest.importorskip("simplejpeg")
    calls = []
    decode = decoder.decode_jpeg
    monkeypatch.setattr(decoder, "decode_jpeg", lambda *a, **k: calls.append(1) or decode(*a, **k))
    file = jpeg_of(orientation=orientation)
    fast, slow = (decoded_by(package, monkeypatch, file, shrink) for package in (True, False))
    assert len(calls) == 1 and fast.dtype == torch.uint8 and torch.equal(fast, slow)


def test_pillow_decodes_what_simplejpeg_does_not(monkeypatch) -> None:
    pytest.importorskip("simplejpeg")
    for mode in ("L", "CMYK"):
        fast, slow = (decoded_by(package, monkeypatch, jpeg_of(mode), 2.0) for package in (True, False))
        assert torch.equal(fast, slow)
    for package in (True, False):
        with pytest.raises(OSError, match="truncated"):
            decoded_by(package, monkeypatch, jpeg_of(cut=900), 1.0)


@pytest.mark.parametrize(("shrink", "size"), [(1.9, (74, 101)), (2.0, (37, 51)), (5.0, (19, 26))])
def test_jpegs_are_decoded_no_smaller_than_asked(shrink, size, monkeypatch) -> None:
    assert decoded_by(False, monkeypatch, jpeg_of(), shrink).shape == (3, *size)


def write_unreadable(path: Path, kind: str) -> Path:
    if kind == "floats":
        PIL.Image.new("F", (8, 8)).save(path, "tiff")
    elif kind == "floats of numpy":
        np.save(path, np.zeros((8, 8, 3), np.float32))
    else:
        path.write_bytes({"empty": b"", "text": b"words", "truncated": jpeg_of(cut=900).getvalue()}[kind])
    return path


UNREADABLE = {
    "empty": (PIL.UnidentifiedImageError, "the file is empty"),
    "text": (PIL.UnidentifiedImageError, "it is no image that Pillow can open"),
    "truncated": (OSError, "truncated"),
    "floats": (ValueError, "its pixels are floating-point numbers"),
    "floats of numpy": (ValueError, "its pixels are float32"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("as_text", [False, True])
def test_an_image_that_cannot_be_read_is_named(kind, as_text, tmp_path):
    path = write_unreadable(tmp_path / "image.npy", kind)
    error_type, why = UNREADABLE[kind]
    with pytest.raises(error_type) as raised:
        read_image(str(path) if as_text else path)
    assert str(raised.value).startswith(f"{path}: ") and why in str(raised.value)
    cause = raised.value.__cause__
    assert type(cause) is type(raised.value) and "_io.BytesIO" not in str(raised.value)


def test_errors_of_any_type_name_the_image(tmp_path, monkeypatch):
    class Odd(Exception):
        def __init__(self, number: int, text: str):
            super().__init__(number, text)

    def fail(error):
        raise error

    path = write_unreadable(tmp_path / "image", "text")
    for error, kind in ((SyntaxError("broken PNG file"), SyntaxError), (Odd(3, "words"), ValueError)):
        monkeypatch.setattr(decoding, "open_image", lambda _, error=error: fail(error))
        with pytest.raises(kind) as raised:
            read_image(path)
        assert str(raised.value).startswith(f"{path}: ") and raised.value.__cause__ is error


def test_a_missing_image_keeps_the_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        read_image(tmp_path / "none.jpg")
