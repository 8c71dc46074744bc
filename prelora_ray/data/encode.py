"""Turns a source image into the bytes to store: upright, RGB, reduced; or says why a file is no whole image."""

from __future__ import annotations

import functools
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from PIL.TiffTags import TAGS_V2_GROUPS

FORMATS: tuple[str, ...] = (
    *("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"),
    *("PPM", "DIB", "QOI", "DDS", "PCX", "SGI", "TGA"),
)
"""Pillow's names of the formats that are read, of which "JPEG" includes a camera's MPO; HEIF comes with pillow-heif.

None of them runs another program, as EPS does, and none is decoded by opening it, before its size is known, as ICO is.
TGA comes last: it has no mark of its own.
"""

_ENDINGS = """
apng avif avifs blp bmp bw cur dcx dds dib emf eps fit fits flc fli ftc ftu gbr gif icb icns ico iim im j2c j2k jfif
jp2 jpc jpe jpeg jpf jpg jpx mpo msp palm pbm pcd pcx pfm pgm png pnm ppm ps psd pxr qoi ras rgb rgba sgi tga tif tiff
vda vst webp wmf xbm xpm
bpg dcm exr flif hdr heic heics heif heifs hif jfi jif jls jxl jxr psb svg svgz wdp xcf
3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f
"""
"""Pillow's own, further ones, and those of cameras' raw files."""
IMAGE_ENDINGS = frozenset(f".{ending}" for ending in _ENDINGS.split())
"""Endings by which a file claims to be an image, whether or not its format can be read."""

_ENDING = re.compile(r"\.[a-z0-9]*[a-z][a-z0-9]*")
"""It has a letter: what follows the dot in `22.05_0` is none."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LOSSLESS_SIDE = 64
_JPEG_SIDE = 65500
"""Longest side that libjpeg writes."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by its EXIF orientation."""
# Tags of a TIFF.
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC = 254, 258, 262


class BadImageError(Exception):
    """Bytes that are no whole image; its text says what is wrong with the file, and is the same each time."""


def encode(content: bytes, size: int, quality: int, max_pixels: int) -> bytes:
    """An upright image in RGB with a shorter side of at most `size`, as PNG up to 64 pixels, else as JPEG.

    An RGB or grey JPEG or PNG that is so already is left untouched. Of a file with several images the first
    is taken. Raises BadImageError alone, where the bytes are no whole image or it has more than `max_pixels`.
    """
    if not content:
        raise BadImageError("the file is empty")
    try:
        with _pillow_kept_quiet():
            image, content = _read(content, max_pixels)
            turn = _turn(image)
            if turn is None and min(image.size) <= size and _is_stored_untouched(image, content):
                return content
            return _stored(image, turn, size, quality)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # what a decoder raises over broken bytes is anything
        raise BadImageError(_reason(error)) from error


def encode_image(image: Image.Image, size: int, max_pixels: int) -> bytes:
    """An image of Pillow's as `encode` makes it of a file, always as PNG, which keeps its pixels.

    Raises BadImageError where it cannot be decoded, or has more than `max_pixels`.
    """
    try:
        with _pillow_kept_quiet():
            return _saved(_reduced(_load(image, max_pixels), _turn(image), size), "PNG")
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # what a decoder raises over broken bytes is anything
        raise BadImageError(_reason(error)) from error


def is_image_name(name: str) -> bool:
    """Whether a file's name claims that it is an image; one without an ending does."""
    ending = os.path.splitext(name)[1].lower()
    return not _ENDING.fullmatch(ending) or ending in IMAGE_ENDINGS


def is_other_file(name: str, content: bytes) -> bool:
    """Whether a file among the images is none and does not claim to be one: a text, a thumbnail database."""
    if is_image_name(name):
        return False
    try:
        with _pillow_kept_quiet():
            _read(content, max_pixels=0)  # every image has more, so none is decoded
    except Exception as error:  # any other error means an image, if a broken one
        return isinstance(error, UnidentifiedImageError)
    return False


@contextmanager
def _pillow_kept_quiet() -> Iterator[None]:
    """Inside the block, Pillow prints no warnings and sets no limit of its own on an image's size."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _read(content: bytes, max_pixels: int) -> tuple[Image.Image, bytes]:
    """A decoded image, and its bytes: those of a JPEG or PNG without the metadata, if Pillow fails over that.

    Raises UnidentifiedImageError where it is none of a known format, BadImageError where it has more than `max_pixels`.
    """
    try:
        return _load(_identify(content), max_pixels), content
    except (BadImageError, MemoryError):
        raise
    except Exception:
        plain, exif = _plain(content)
        if plain == content:
            raise
    image = _identify(plain)
    if exif:
        image.info["exif"] = exif
    return _load(image, max_pixels), plain


def _identify(content: bytes) -> Image.Image:
    formats = FORMATS
    is_heif = content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS
    if is_heif and _registers_heif():
        formats = (*FORMATS, "HEIF")
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        if is_heif and "HEIF" not in formats:
            raise BadImageError("it is a HEIC image: install prelora-ray[heic] to read it") from None
        raise


@functools.cache
def _registers_heif() -> bool:
    """Whether pillow-heif is there; the first HEIC image of a process loads it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _load(image: Image.Image, max_pixels: int) -> Image.Image:
    """Decodes an image, if its header does not forbid it, and returns it."""
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"it has {width} x {height} pixels, more than {max_pixels:,}")
    if isinstance(image, TiffImageFile):
        if _number(image, _NEW_SUBFILE_TYPE, 0) & 1:
            raise BadImageError("it holds a preview of an image that cannot be read, as a camera's raw file does")
        _drop_metadata(image)
    image.load()
    return image


def _drop_metadata(image: TiffImageFile) -> None:
    """Takes away what loading a TIFF reads besides the image, and fails over where it is of an odd type."""
    if not isinstance(image.info.get("xmp"), bytes):
        image.info.pop("xmp", None)
    for folder in TAGS_V2_GROUPS:
        image.getexif().pop(folder, None)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings a loaded image upright: nothing where its EXIF cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the image itself is whole
        return None


def _is_stored_untouched(image: Image.Image, content: bytes) -> bool:
    """Whether training can read the file as it is. simplejpeg aborts the process when it reduces a lossless JPEG."""
    if image.mode not in ("RGB", "L"):
        return False
    return image.format == "PNG" or (image.format == "JPEG" and _jpeg_process(content) in (0xC0, 0xC1, 0xC2))


def _jpeg_process(jpeg: bytes) -> int | None:
    """The marker that says how a JPEG is coded: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, 0xC3 lossless."""
    tables = (0xC4, 0xC8, 0xCC)
    return next((marker for marker, _, _ in _segments(jpeg) if 0xC0 <= marker <= 0xCF and marker not in tables), None)


def _plain(content: bytes) -> tuple[bytes, bytes]:
    """A JPEG or PNG without its metadata, and the EXIF that has to be put back; other images as they are."""
    if content.startswith(b"\xff\xd8\xff"):
        return _plain_jpeg(content)
    if content.startswith(_PNG_SIGNATURE):
        return _plain_png(content), b""
    return content, b""


def _plain_png(png: bytes) -> bytes:
    """A PNG without its texts and its colour profile. Its EXIF stays."""
    chunks, at = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            chunks.append(png[at:end])
        at = end
    return b"".join(chunks)


def _plain_jpeg(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG without its metadata, and its EXIF. What says how its colours are coded (JFIF, Adobe) stays."""
    plain, exif, at = jpeg[:2], b"", 2
    for marker, start, end in _segments(jpeg):
        if marker in range(0xE1, 0xEE):
            if jpeg.startswith(b"Exif\0\0", start + 4):
                exif = jpeg[start + 4 : end]
        else:
            plain += jpeg[start:end]
        at = end
    return plain + jpeg[at:], exif


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment in front of a JPEG's pixels."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != 0xDA:
        if jpeg[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        yield jpeg[at + 1], at, end
        at = end


def _stored(image: Image.Image, turn: Image.Transpose | None, size: int, quality: int) -> bytes:
    """A loaded image upright, in RGB, reduced and encoded anew."""
    image = _reduced(image, turn, size)
    if min(image.size) <= _LOSSLESS_SIDE or max(image.size) > _JPEG_SIDE:
        return _saved(image, "PNG")
    return _saved(image, "JPEG", quality=quality)


def _reduced(image: Image.Image, turn: Image.Transpose | None, size: int) -> Image.Image:
    """An image upright, in RGB, with a shorter side of at most `size`."""
    image = _eight_bits(image).convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    if min(image.size) > size:
        scale = size / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC, reducing_gap=3.0
        )
    return image


def _saved(image: Image.Image, format_: str, **options: int) -> bytes:
    image.info = {}  # nothing but pixels is stored: to a LAB image the conversion adds a profile with the time of day
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduces grey of more than 8 bits to 8: Pillow's own conversion would clip all but the darkest values to white."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    tiff = image if isinstance(image, TiffImageFile) else None
    if image.mode.startswith("I;16"):
        bits = _number(tiff, _BITS_PER_SAMPLE, 16) if tiff else 16  # 12 of them are not scaled to 16
        grey = (values >> (bits - 8)).astype(np.uint8)
    elif image.mode == "I" and image.format == "PPM":
        grey = (values >> 8).astype(np.uint8)
    else:
        grey = _grey_by_values(values)
    if tiff and _number(tiff, _PHOTOMETRIC, 1) == 0:  # white is zero, which Pillow heeds up to 8 bits
        grey = 255 - grey
    return Image.fromarray(grey)


def _grey_by_values(values: NDArray[np.int32] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """Grey of 32 bits, of which no file says what is white: 1, 255 or 65,535, whichever the values fill.

    Raises BadImageError where they fill none: what is just over one range would be black in the next.
    """
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if low >= 0 and 2 <= high <= 255:
        return np.rint(values).astype(np.uint8)
    if low >= 0 and 512 <= high <= 65535:
        return (values // 256).astype(np.uint8)
    raise BadImageError(f"its values lie in {low:g} to {high:g} and fill none of the ranges 0 to 1, 0 to 255 and 0 to 65,535")


def _number(image: TiffImageFile, tag: int, default: int) -> int:
    """A number that a TIFF states of its first page; `default` where it does not."""
    value: object = image.tag_v2.get(tag)
    if isinstance(value, tuple) and value:  # of each band
        value = value[0]
    return value if isinstance(value, int) else default


def _reason(error: Exception) -> str:
    """What a decoder's error says of the file, in one line and without memory addresses."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a kind that can be read"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", next(iter(str(error).splitlines()), ""))
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if not text or not isinstance(error, OSError | SyntaxError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text[:200]
