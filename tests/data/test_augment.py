import io
import random
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_sample_image
from torchvision.transforms import functional as torchvision

from prelora_ray.data import augment
from prelora_ray.data.augment import (
    Augmentation,
    Augmenter,
    ColorJitter,
    center_box,
    random_resized_box,
    read_crop,
    undecodable,
)
from prelora_ray.data.augment_settings import AugmentSettings

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def augmenter(size: int = 32, seed: int = 0, crop_ratio: float = 1.0, **options) -> Augmenter:
    return Augmenter(Augmentation(size, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), AugmentSettings(**options)), seed, crop_ratio)


@pytest.mark.parametrize(
    "options",
    [{}, {"crop": "padded"}, {"policy": "rand-m9-mstd0.5-inc1"}, {"policy": "3a", "color_jitter": 0.3}, {"erase": 1.0}],
)
def test_drawn_by_seed_epoch_and_sample_alone(options):
    make = lambda seed=0: augmenter(seed=seed, **options)  # noqa: E731
    keys = [(epoch, sample) for epoch in range(3) for sample in range(12)]
    first = {key: make().train(png(NOISE), *key) for key in keys}
    again = make()
    random.seed(123)
    np.random.seed(123)
    for key in reversed(keys):
        assert np.array_equal(again.train(png(NOISE), *key), first[key])
    assert len({image.tobytes() for image in first.values()}) > len(keys) / 2
    assert any(not np.array_equal(make(1).train(png(NOISE), *key), first[key]) for key in keys)
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in first.values())


@pytest.mark.parametrize("options", [{"crop": "center"}, {"crop": "padded", "policy": "rand-m9-mstd0.5-inc1"}])
def test_an_image_that_no_epoch_crops_at_random_is_decoded_once(options):
    keeps = augmenter(**options)
    for sample, encoded in enumerate((png(NOISE), png(255 - NOISE))):
        keeps.train(encoded, 0, sample)
        for epoch in range(8):
            anew = augmenter(**options).train(encoded, epoch, sample)
            assert np.array_equal(keeps.train(b"not decoded again", epoch, sample), anew)
    drawn = augmenter(crop="random_resized")
    drawn.train(png(NOISE), 0, 0)
    with pytest.raises(UnidentifiedImageError):
        drawn.train(b"decoded again", 1, 0)


def test_as_many_images_are_kept_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(augment, "_KEPT_BYTES", 3 * 32 * 32 * 3 - 1)
    keeps = augmenter(crop="center", flip=0)
    for sample in range(4):
        keeps.train(png(NOISE), 0, sample)
    assert np.array_equal(keeps.train(b"", 1, 0), keeps.train(b"", 1, 1))
    for sample in (2, 3):
        with pytest.raises(UnidentifiedImageError):
            keeps.train(b"", 1, sample)


def test_padded_crop_shifts_by_at_most_the_padding():
    square = NOISE[:32, :32]
    bordered = np.pad(square, ((3, 3), (3, 3), (0, 0)))
    windows = {np.ascontiguousarray(bordered[y : y + 32, x : x + 32]).tobytes(): (y, x) for y in range(7) for x in range(7)}
    make = augmenter(crop="padded", padding=3, flip=0)
    shifts = [windows[make.train(png(square), 0, sample).tobytes()] for sample in range(300)]
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(7))


def test_flip():
    square = NOISE[:32, :32]
    images = [augmenter(crop="center", flip=0.5).train(png(square), 0, sample) for sample in range(200)]
    flipped = sum(np.array_equal(image, square[:, ::-1]) for image in images)
    assert flipped + sum(np.array_equal(image, square) for image in images) == 200
    assert 70 < flipped < 130


def test_random_resized_box_keeps_area_and_aspect():
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = random_resized_box(640, 480, 0.2, rng)
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
        assert 0.19 < (right - left) * (bottom - top) / (640 * 480) <= 1
        assert 0.74 < (right - left) / (bottom - top) < 1.35
    left, top, right, bottom = random_resized_box(1000, 10, 0.9, rng)  # too long for any such box
    assert (right - left, bottom - top) == (13, 10)


def test_erasing_touches_one_rectangle():
    plain = augmenter(crop="center", flip=0, size=32)
    erasing = augmenter(crop="center", flip=0, size=32, erase=1.0)
    square = png(NOISE[:32, :32])
    for sample in range(20):
        changed = (plain.train(square, 0, sample) != erasing.train(square, 0, sample)).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert 0.01 < box.size / 32**2 < 0.4
        assert box.mean() > 0.9  # noise may equal a pixel by chance


@pytest.mark.parametrize("seed", range(6))
def test_color_jitter_is_torchvisions(seed):
    image = Image.fromarray(load_sample_image("flower.jpg")[:64, :64])
    random.seed(seed)
    jittered = ColorJitter(0.4)(image)

    random.seed(seed)
    adjust = {
        "Brightness": torchvision.adjust_brightness,
        "Contrast": torchvision.adjust_contrast,
        "Color": torchvision.adjust_saturation,
    }
    for name in random.sample(list(adjust), 3):
        factor = random.uniform(0.6, 1.4)
        image = adjust[name](image, factor)
    assert np.array_equal(np.array(jittered), np.array(image))


def test_decoders_do_without_torch():
    """It would take each of them seconds to start, and 400 MB."""
    code = """
import sys
from prelora_ray.data import augment, stream
settings = augment.AugmentSettings(policy="rand-m9-mstd0.5-inc1", color_jitter=0.3)
augment.Augmenter(augment.Augmentation(32, (0.5,) * 3, (0.2,) * 3, settings), 0, 1.0)
print([name for name in ("torch", "torchvision", "timm") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_evaluation_is_pillows_resized_centre_crop():
    image = Image.fromarray(NOISE)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC, (12.5, 2.5, 47.5, 37.5))  # 35 of 40 pixels, centred
    assert np.array_equal(augmenter(16, crop_ratio=0.875).evaluate(png(NOISE)), np.array(expected))
    square = NOISE[:16, :16]
    assert np.array_equal(augmenter(16).evaluate(png(square)), square)


def photograph() -> Image.Image:
    """One of scikit-learn's two photographs, 640 x 427."""
    return Image.fromarray(load_sample_image("china.jpg"))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def test_a_jpeg_is_decoded_as_pillow_does():
    encoded = jpeg(photograph())
    box = (10, 20, 110, 120)
    image = read_crop(encoded, 100, lambda *_: box)
    expected = Image.open(io.BytesIO(encoded)).crop(box)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 2  # two builds of libjpeg-turbo


@pytest.mark.parametrize(("side", "scale"), [(112, 1), (223, 1), (224, 2), (400, 2)])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale(side, scale, monkeypatch):
    """Close to the crop of the whole image, resized by Pillow, and from no more pixels than that takes."""
    encoded, sizes = jpeg(photograph()), []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: sizes.append((i := decode(*a, **k)).shape) or i)
    box = (100, 10, 100 + side, 10 + side)
    image = np.asarray(read_crop(encoded, 112, lambda *_: box)).astype(float)
    expected = Image.open(io.BytesIO(encoded)).resize((112, 112), Image.Resampling.BICUBIC, box)
    assert np.abs(image - np.asarray(expected)).mean() < 4  # a filter of another kind; a shift by a pixel makes 15
    assert sizes[0][1] == 640 // scale


def test_a_jpeg_with_a_flaw_that_pillow_overlooks_is_read():
    encoded = jpeg(photograph())
    scan = encoded.index(b"\xff\xda")
    flawed = encoded[:scan] + b"\x01\x02\x03" + encoded[scan:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(flawed)
    box = (10, 20, 110, 120)
    expected = Image.open(io.BytesIO(flawed)).crop(box)
    assert np.array_equal(read_crop(flawed, 100, lambda *_: box), expected.resize((100, 100)))


def test_grey_and_cmyk_jpegs_are_read():
    for mode in ("L", "CMYK"):
        image = photograph().convert(mode)
        read = read_crop(jpeg(image), 64, lambda width, height: center_box(width, height, 1.0))
        expected = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC, (106.5, 0, 533.5, 427))
        assert np.abs(np.asarray(read).astype(float) - np.asarray(expected)).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PPM", "EPS"])
def test_no_decoder_is_asked_but_those_of_what_prepare_stores(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    encoded = buffer.getvalue()
    with pytest.raises(UnidentifiedImageError):
        read_crop(encoded, 8, lambda width, height: (0, 0, width, height))
    assert undecodable(encoded) == "it is no JPEG or PNG"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_stored_image_that_is_cut_off_cannot_be_decoded(kind):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, kind)
    encoded = buffer.getvalue()
    assert undecodable(encoded) is None
    assert "truncated" in undecodable(encoded[: len(encoded) // 2])
    assert undecodable(b"") == "it is no JPEG or PNG"
