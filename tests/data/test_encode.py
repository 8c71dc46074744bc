"""Images as people have them, and files that are none: what is stored of them, and which reasons are given."""

from __future__ import annotations

import base64
import io
import struct
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from prelora_ray.data import encode as encode_module
from prelora_ray.data.augment import read_crop, undecodable
from prelora_ray.data.encode import FORMATS, IMAGE_ENDINGS, BadImageError, encode, encode_image, is_image_name, is_other_file


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encode(content, 64, 90, 10**6)))


def reason(content: bytes, max_pixels: int = 10**6) -> str:
    """Why an image is bad: the same each time, in one line without an address."""
    texts = set()
    for _ in range(2):
        with pytest.raises(BadImageError) as error:
            encode(bytes(content), 64, 90, max_pixels)
        texts.add(str(error.value))
    (text,) = texts
    assert 0 < len(text) <= 200 and text.isprintable() and " at 0x" not in text
    return text


NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
RGB = Image.fromarray(NOISE)
SIXTEEN = np.random.default_rng(1).integers(0, 65536, (20, 30)).astype(np.uint16)
TURNED = Image.Exif()
TURNED[0x0112] = 8

UGLY: dict[str, tuple[bytes, Image.Image]] = {
    "grey": (saved(RGB.convert("L"), "PNG"), RGB.convert("L").convert("RGB")),
    "grey alpha": (saved(RGB.convert("LA"), "PNG"), RGB.convert("L").convert("RGB")),
    "alpha": (saved(RGB.convert("RGBA"), "PNG"), RGB),
    "palette": (saved(RGB.convert("P"), "PNG"), RGB.convert("P").convert("RGB")),
    "clear": (saved(RGB.convert("P"), "PNG", transparency=bytes(range(256))), RGB.convert("P").convert("RGB")),
    "gif": (saved(RGB.convert("P"), "GIF"), RGB.convert("P").convert("RGB")),
    "1 bit": (saved(RGB.convert("1"), "PNG"), RGB.convert("1").convert("RGB")),
    "16 bit": (saved(Image.fromarray(SIXTEEN), "PNG"), Image.fromarray((SIXTEEN >> 8).astype(np.uint8)).convert("RGB")),
    "16 bit tiff": (saved(Image.fromarray(SIXTEEN), "TIFF"), Image.fromarray((SIXTEEN >> 8).astype(np.uint8)).convert("RGB")),
    "bmp": (saved(RGB, "BMP"), RGB),
    "webp": (saved(RGB, "WEBP", lossless=True), RGB),
    "turned": (saved(RGB, "PNG", exif=TURNED), RGB.transpose(Image.Transpose.ROTATE_90)),
    "turned tiff": (saved(RGB, "TIFF", exif=TURNED), RGB.transpose(Image.Transpose.ROTATE_90)),
}
UGLY |= {
    name: (content, Image.open(io.BytesIO(content)).convert("RGB"))
    for name, content in {
        "cmyk": saved(RGB.convert("CMYK"), "JPEG"),
        "progressive": saved(RGB, "JPEG", progressive=True),
        "grey jpeg": saved(RGB.convert("L"), "JPEG"),
        "lab": saved(RGB.convert("LAB"), "TIFF"),
        "palette and alpha": saved(RGB.convert("RGBA").convert("PA"), "TIFF"),
        "16 bits of colour": b"P6 30 20 65535\n" + np.repeat(SIXTEEN, 3).astype(">u2").tobytes(),
    }.items()
}


@pytest.mark.parametrize("kind", UGLY)
def test_ugly_images_come_out_as_pillow_converts_them(kind):
    content, expected = UGLY[kind]
    image = stored(content)
    assert image.mode in ("RGB", "L")
    assert np.array_equal(np.array(image.convert("RGB")), np.array(expected))
    if image.mode == "RGB" and kind != "progressive":
        assert not image.info, "what a file says besides its pixels may be odd, or hold the time of day"


def test_what_is_stored():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8))
    jpeg = saved(noise, "JPEG")
    assert encode(jpeg, 64, 90, 10**6) == jpeg
    reduced = Image.open(io.BytesIO(encode(jpeg, 25, 90, 10**6)))
    assert (reduced.size, reduced.format, reduced.mode) == ((40, 25), "PNG", "RGB")
    long = Image.open(io.BytesIO(encode(saved(Image.new("RGBA", (66000, 70)), "PNG"), 256, 90, 10**7)))
    assert (long.size, long.format) == ((66000, 70), "PNG")  # longer than a JPEG can be


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_brought_upright(orientation: int):
    content = saved(RGB, "PNG", exif=exif((0x0112, SHORT, 1, number(orientation))))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.array(stored(content)), np.array(expected))


BYTE, ASCII, SHORT, LONG, RATIONAL, SIGNED_BYTE, FLOAT = 1, 2, 3, 4, 5, 6, 11


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of entries as (tag, type, count, four bytes)."""
    folder = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + folder + bytes(4)


SIDEWAYS = (0x0112, SHORT, 1, number(6))
ODD_EXIF: dict[str, bytes] = {
    # ImageOps.exif_transpose raises AttributeError, TypeError and struct.error over the first three, ...
    "a rational description": exif(SIDEWAYS, (0x010E, RATIONAL, 1, number(0))),
    "a resolution in letters": exif(SIDEWAYS, (0x011A, ASCII, 1, number(72))),
    "a long unit": exif(SIDEWAYS, (0x0128, LONG, 1, number(2**32 - 1))),
    "a software number": exif(SIDEWAYS, (0x0131, FLOAT, 1, number(0))),
    "a folder before the start": exif(SIDEWAYS, (0x8769, SIGNED_BYTE, 1, number(2**32 - 1))),
    # ... and Pillow does not open a JPEG with the last.
    "a resolution in bytes": exif(SIDEWAYS, (0x0128, SHORT, 1, number(2)), (0x011A, BYTE, 1, number(72))),
}
UPRIGHT_EXIF: dict[str, bytes] = {
    "nothing": b"Exif\0\0",
    "garbage": b"Exif\0\0" + bytes(range(99)),
    "cut": ODD_EXIF["a long unit"][:20],
    "orientation in letters": exif((0x0112, ASCII, 2, b"6\0\0\0")),
    "orientation of floats": exif((0x0112, FLOAT, 1, struct.pack("<f", 6.5))),
    "orientation 9": exif((0x0112, SHORT, 1, number(9))),
    "an orientation elsewhere": exif((0x0112, LONG, 2**31 - 1, number(2**32 - 1))),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD_EXIF)
def test_odd_exif_does_not_spoil_a_photo(kind, odd):
    content = saved(RGB, kind, exif=ODD_EXIF[odd], quality=100)
    plain = Image.open(io.BytesIO(saved(RGB, kind, quality=100))).convert("RGB")
    assert np.array_equal(np.array(stored(content)), np.rot90(np.array(plain), -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("odd", UPRIGHT_EXIF)
def test_an_orientation_that_cannot_be_read_is_upright(kind, odd):
    content = saved(RGB, kind, exif=UPRIGHT_EXIF[odd])
    assert encode(content, 64, 90, 10**6) == content


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + jpeg[2:]


@pytest.mark.parametrize(
    ("marker", "payload"),
    [
        (0xE2, b"MPF\0MM\0*\0\0\0\x08\0\2\xb0\1\0\4\0\0\0\1\0\0\0\2\xb0\2\0\7\0\0\0\x10\0\0\0\x26" + bytes(40)),
        (0xE2, b"ICC_PROFILE\0"),
    ],
    ids=["a list of pictures that ends too soon", "a profile that ends too soon"],
)
def test_a_jpeg_is_stored_without_metadata_that_stops_pillow(marker, payload):
    """So that training, which opens it with Pillow too, can read it."""
    content = saved(RGB, "JPEG")
    broken = with_segment(content, marker, payload)
    with pytest.raises(Exception, match="cannot identify"):
        Image.open(io.BytesIO(broken))
    assert encode(broken, 64, 90, 10**6) == content


def tiff(pixels: bytes, bits: int = 8, bands: int = 3, sample_format: int = 1, **more: tuple[int, int, int]) -> bytes:
    """A TIFF of 30 x 20 pixels; `more` are further entries, or other values, as t254=(type, count, value)."""
    entries = {
        "t256": (SHORT, 1, 30),
        "t257": (SHORT, 1, 20),
        "t258": (SHORT, bands, 8) if bands > 1 else (SHORT, 1, bits),  # the three numbers stand at byte 8
        "t259": (SHORT, 1, 1),
        "t262": (SHORT, 1, 2 if bands > 1 else 1),
        "t273": (LONG, 1, 14),
        "t277": (SHORT, 1, bands),
        "t278": (SHORT, 1, 20),
        "t279": (LONG, 1, len(pixels)),
        "t339": (SHORT, 1, sample_format),
    } | more
    folder = b"".join(struct.pack("<HHII", int(t[1:]), *entries[t]) for t in sorted(entries, key=lambda t: int(t[1:])))
    head = b"II*\0" + number(14 + len(pixels)) + struct.pack("<HHH", bits, bits, bits)
    return head + pixels + struct.pack("<H", len(entries)) + folder + bytes(4)


@pytest.mark.parametrize(
    "more",
    [{"t700": (ASCII, 4, 65)}, {"t700": (RATIONAL, 1, 8)}, {"t34665": (SIGNED_BYTE, 1, 255)}, {"t34853": (16, 1, 2**32 - 1)}],
    ids=["xmp of letters", "xmp of a rational", "exif before the start", "gps far away"],
)
def test_odd_metadata_does_not_spoil_a_tiff(more):
    assert np.array_equal(np.array(stored(tiff(NOISE.tobytes(), **more))), NOISE)


RAMP = np.linspace(0, 1, 600).reshape(20, 30)
LINEAR = (RAMP * 65535).astype(np.uint16)


def packed_12_bits(values: np.ndarray) -> bytes:
    first, second = values.reshape(-1, 2).T.astype(np.uint16)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


DEEP_GREY: dict[str, tuple[bytes, np.ndarray]] = {
    "int 0..255": (saved(Image.fromarray((RAMP * 255).astype(np.int32)), "TIFF"), RAMP * 255),
    "int 0..65535": (saved(Image.fromarray(LINEAR.astype(np.int32)), "TIFF"), LINEAR // 256),
    "int 0 and 1": (saved(Image.fromarray((RAMP > 0.5).astype(np.int32)), "TIFF"), (RAMP > 0.5) * 255),
    "int black": (saved(Image.fromarray(np.zeros((20, 30), np.int32)), "TIFF"), RAMP * 0),
    "signed 16 bits": (tiff((RAMP * 32767).astype("<i2").tobytes(), 16, 1, 2), (RAMP * 32767) // 256),
    "float 0..1": (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), RAMP * 255),
    "float 0..255": (saved(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"), RAMP * 255),
    "float 0..65535": (saved(Image.fromarray(LINEAR.astype(np.float32)), "TIFF"), LINEAR // 256),
    "float pfm": (saved(Image.fromarray(RAMP.astype(np.float32)), "PPM"), RAMP * 255),
    "16 bits": (saved(Image.fromarray(LINEAR), "PPM"), LINEAR // 256),
    "10 bits": (b"P5 30 20 1023\n" + (RAMP * 1023).astype(">u2").tobytes(), RAMP * 255),
    "12 bits": (tiff(packed_12_bits(RAMP * 4095), 12, 1), RAMP * 255),
    "jpeg 2000": (saved(Image.fromarray(LINEAR), "JPEG2000"), LINEAR // 256),
    "16 bits, white is zero": (tiff(LINEAR.tobytes(), 16, 1, t262=(SHORT, 1, 0)), 255 - LINEAR // 256),
    "float, white is zero": (tiff(RAMP.astype("<f4").tobytes(), 32, 1, 3, t262=(SHORT, 1, 0)), 255 - RAMP * 255),
    "dark of 16 bits": (saved(Image.fromarray(LINEAR // 300), "PNG"), RAMP * 0),  # by what it declares
    "dark of 16 bits in a pgm": (saved(Image.fromarray(LINEAR // 300), "PPM"), RAMP * 0),
}


@pytest.mark.parametrize("kind", DEEP_GREY)
def test_deep_grey_is_neither_black_nor_white(kind):
    content, expected = DEEP_GREY[kind]
    assert np.abs(np.array(stored(content)).astype(float) - expected[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("values", "span"),
    [
        (RAMP * 1.02, "0 to 1.02"),
        (RAMP * 300, "0 to 300"),
        (RAMP - 0.25, "-0.25 to 0.75"),
        (RAMP * 70000, "0 to 70000"),
        (np.where(RAMP > 0.9, np.nan, RAMP), "nan to nan"),
        (np.where(RAMP > 0.9, np.inf, RAMP), "0 to inf"),
        ((RAMP * 300).astype(np.int32), "0 to 300"),
        ((RAMP * 255).astype(np.int32) - 5, "-5 to 250"),
        ((RAMP * 2e6).astype(np.int32), "0 to 2e+06"),
    ],
)
def test_grey_that_fills_no_range_is_refused(values, span):
    image = Image.fromarray(values if values.dtype == np.int32 else values.astype(np.float32))
    ranges = "0 to 1, 0 to 255 and 0 to 65,535"
    assert reason(saved(image, "TIFF")) == f"its values lie in {span} and fill none of the ranges {ranges}"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_of_several_images_is_taken(kind):
    white, black = Image.new("RGB", (30, 20), "white"), Image.new("RGB", (30, 20))
    content = saved(white, kind, save_all=True, append_images=[black])
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.n_frames) == (kind, 2)
    assert np.array(stored(content)).min() > 250


# 16 x 16 grey pixels of 8 * row + 4 * column, by libjpeg-turbo's lossless mode, which Pillow cannot write.
LOSSLESS_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/wwALCAAQABABAREA/8QAFgABAQEAAAAAAAAAAAAAAAAAAwQI/9oACAEBAAEAAM/oiIiIiIiIiUIiIiIiIi"
    "IiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIi"
    "IiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIiUIiIiIiIiIif/2Q=="
)


def test_what_is_stored_untouched_can_be_read_by_training():
    """simplejpeg ends the process over a lossless JPEG that it is to reduce."""
    rows, columns = np.mgrid[:16, :16]
    content = encode(LOSSLESS_JPEG, 64, 90, 10**6)
    assert content[:4] == b"\x89PNG"
    assert np.array_equal(np.array(Image.open(io.BytesIO(content)))[..., 0], 8 * rows + 4 * columns)
    for jpeg in (saved(RGB, "JPEG"), saved(RGB, "JPEG", progressive=True), saved(RGB.convert("L"), "JPEG", subsampling=0)):
        assert encode(jpeg, 64, 90, 10**6) == jpeg
        assert simplejpeg.decode_jpeg(jpeg, "RGB", min_height=5, min_width=8).shape == (5, 8, 3)
    # Of a subsampling that simplejpeg does not know.
    odd = bytearray(saved(RGB, "JPEG", subsampling=0))
    odd[odd.find(b"\xff\xc0") + 11] = 0x31
    assert read_crop(encode(bytes(odd), 64, 90, 10**6), 8, lambda width, height: (0, 0, width, height)).size == (8, 8)


KINDS = [*FORMATS, "MPO"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_whole_or_not_at_all(kind):
    content = saved(RGB, kind)
    assert stored(content).size == (30, 20)
    for length in (len(content) // 2, len(content) * 3 // 4):
        reason(content[:length])


def test_whatever_a_decoder_raises_is_a_bad_image():
    rng = np.random.default_rng(0)
    whole = 0
    for kind in KINDS:
        content = saved(RGB, kind)
        for _ in range(40):
            damaged = bytearray(content)
            for place in rng.integers(0, rng.choice([40, len(content)]), 4):
                damaged[place] = rng.integers(256)
            try:
                encode(bytes(damaged), 64, 90, 10**6)
                whole += 1
            except BadImageError:
                pass
    assert 0 < whole < 40 * len(KINDS)


DDS = bytearray(saved(RGB, "DDS"))
DDS[80:88] = number(4) + b"ABCD"
UNKNOWN = "it is no image of a kind that can be read"
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "text": (b"a text", UNKNOWN),
    "zeros": (bytes(99), UNKNOWN),
    "postscript": (saved(RGB, "EPS"), UNKNOWN),  # would start Ghostscript
    "pdf": (saved(RGB, "PDF"), UNKNOWN),
    "icon": (saved(RGB, "ICO", sizes=[(16, 16)]), UNKNOWN),  # is decoded before its size is known
    "cut": (saved(RGB, "BMP")[:-3], "image file is truncated ("),
    "dds": (bytes(DDS), "NotImplementedError: Unimplemented pixel format"),
    "qoi": (saved(RGB, "QOI")[:402], "IndexError: "),
    "avif": (saved(RGB, "AVIF")[:-20], "Failed to decode frame 0: Truncated data"),
    "colour of floats": (tiff(bytes(7200), 32, 3, 3), UNKNOWN),
    "preview": (tiff(NOISE.tobytes(), t254=(LONG, 1, 1)), "it holds a preview of an image that cannot be read"),
    "no pixels": (b"P5 0 20 255\n", UNKNOWN),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_told_why(kind):
    content, expected = BAD[kind]
    assert reason(content).startswith(expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("cannot read <_io.BytesIO object at 0x7f00aa>\nmore"), "cannot read <_io.BytesIO object>"),
        (KeyError("a"), "KeyError: 'a'"),
        (RuntimeError(), "RuntimeError"),
        (OSError("bell \a" + "x" * 999), "bell ?" + "x" * 194),
    ],
)
def test_reasons_are_short_and_the_same_each_time(monkeypatch, error, expected):
    def fails(image: Image.Image) -> None:
        raise error

    monkeypatch.setattr(encode_module, "_turn", fails)
    assert reason(saved(RGB, "PNG")) == expected


def test_running_out_of_memory_is_no_bad_image(monkeypatch):
    def fails(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(encode_module, "_turn", fails)
    with pytest.raises(MemoryError):
        encode(saved(RGB, "PNG"), 64, 90, 10**6)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_a_bomb_is_refused_before_it_is_decoded(kind, recwarn):
    bomb = saved(Image.new("L", (3000, 3000)), kind)
    cut = bomb if kind == "TIFF" else bomb[:1100]  # nothing to decode, and that is not what is said
    assert reason(cut) == "it has 3000 x 3000 pixels, more than 1,000,000"
    assert not recwarn.list


def text_bomb(chunk: bytes) -> bytes:
    """A PNG's chunk of a few KB that says what is 50 MB."""
    packed = zlib.compress(bytes(50_000_000))
    content = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "iCCP": b"a\0\0"}[chunk.decode()] + packed
    return len(content).to_bytes(4, "big") + chunk + content + zlib.crc32(chunk + content).to_bytes(4, "big")


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("where", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_text_in_a_png_may_be_a_bomb_too(chunk, where, orientation):
    """The image is read without it, and what training reads has none."""
    plain = saved(RGB, "PNG", exif=exif((0x0112, SHORT, 1, number(orientation))))
    at = plain.index(where) - 4
    bomb = plain[:at] + text_bomb(chunk) + plain[at:]
    tracemalloc.start()
    read = encode(bomb, 64, 90, 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.array(Image.open(io.BytesIO(read))), NOISE if orientation == 1 else np.rot90(NOISE, -1))
    assert undecodable(read) is None and chunk not in read
    assert peak < 10_000_000
    assert "truncated" in reason(bomb[: bomb.index(b"IDAT") + 40])
    assert not is_other_file("a.txt", bomb)


def test_a_file_is_told_to_be_an_image_without_decoding_it(monkeypatch):
    def fails(image: ImageFile.ImageFile) -> None:
        raise UnidentifiedImageError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    assert not is_other_file("a.txt", saved(RGB, "BMP"))


def test_an_image_of_pillows_obeys_the_rules_of_files():
    with pytest.raises(BadImageError, match=r"^it has 3 x 4 pixels, more than 11$"):
        encode_image(Image.new("L", (3, 4)), size=256, max_pixels=11)
    with pytest.raises(BadImageError, match=r"^its values lie in "):
        encode_image(Image.fromarray(np.array([[0.0, 1e9]], np.float32)), size=256, max_pixels=12)


def test_the_largest_size_is_the_callers_and_pillow_is_left_as_it_was(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = saved(RGB, "PNG")
    assert encode(content, 64, 90, 600) == content
    assert reason(content, 599) == "it has 30 x 20 pixels, more than 599"
    assert Image.MAX_IMAGE_PIXELS == 100
    encode(UGLY["clear"][0], 64, 90, 600)  # Pillow warns of it
    assert not recwarn.list
    with pytest.warns(UserWarning, match="a word"):
        warnings.warn("a word", stacklevel=1)


def test_files_that_claim_to_be_images():
    Image.init()
    no_images = {".pdf", ".mpg", ".mpeg", ".bufr", ".grib", ".h5", ".hdf"}
    assert set(Image.registered_extensions()) - IMAGE_ENDINGS == no_images
    for name in ("a/x.jpg", "x.JPEG", "x.heic", "x.HEIF", "x.jxl", "x.dng", "x.NEF", "x.svg", "x.psd", "x.exr", "noending"):
        assert is_image_name(name)
        assert not is_other_file(name, b"no image")
    for name in ("Thumbs.db", "a.json", "a.txt", "a.xml", "a.csv", "a.md", "a.html", "a.mat", "a.npy", "a.pdf", "a.jpg.txt"):
        assert not is_image_name(name)
        assert is_other_file(name, b"no image")
        assert is_other_file(name, b"")
        assert not is_other_file(name, saved(RGB, "WEBP"))
        assert not is_other_file(name, saved(RGB, "JPEG")[:300])  # broken, and an image


# 24 x 16 pixels, the left half red and the right half blue.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAWhtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAA"
    "AAAERAAAEAAQAAAAABjAABAAAAAAAAAEgAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA6GlwcnAA"
    "AADJaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkA"
    "AAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABRpc3BlAAAAAAAAAEAAAABAAAAAKGNsYXAAAAAYAAAAAQAAABAA"
    "AAAB////2AAAAAL////QAAAAAgAAABBwaXhpAAAAAAMICAgAAAAXaXBtYQAAAAAAAAABAAEEgQIEgwAAAFBtZGF0AAAARCgBrxMhpSBo5TVT/S"
    "qXUgFgfqTALPGmzQy2QXmFNhMQwl0iNA2bs1/kU2Cs/oA3F9Iy/vrJsoDnxyo7uyTAtG/dnOhM"
)


def test_heic_is_read_where_pillow_heif_is_installed():
    pytest.importorskip("pillow_heif", reason="needs the extra heic: pip install 'prelora-ray[heic]'")
    for content in (HEIC, HEIC.replace(b"ftypheic", b"ftypmif1")):
        pixels = np.array(stored(content)).astype(int)
        assert pixels.shape == (16, 24, 3)
        assert np.abs(pixels[:, :8] - (200, 40, 40)).max() < 20
        assert np.abs(pixels[:, 16:] - (40, 40, 200)).max() < 20
    reason(HEIC[:-40])
    assert reason(HEIC, 300) == "it has 24 x 16 pixels, more than 300"


@pytest.fixture
def without_pillow_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    encode_module._registers_heif.cache_clear()
    yield
    encode_module._registers_heif.cache_clear()


@pytest.mark.usefixtures("without_pillow_heif")
def test_heic_without_pillow_heif_says_what_to_install():
    assert reason(HEIC) == "it is a HEIC image: install prelora-ray[heic] to read it"
    assert not is_other_file("photo.dat", HEIC)
    assert stored(saved(RGB, "AVIF")).size == (30, 20)
