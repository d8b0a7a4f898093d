"""Test that the size in a header equals the size of the decoded image, however it is rotated."""

import io

import numpy as np
import PIL.Image
import pytest

from hf_accel.data.decoding import upright_rgb, upright_size

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
