"""Tile bytes to the network's input: the one preprocessing function of the product.

Training, client and server all call `decode_tile`; nothing else decodes or resizes a tile. The rule:

1. JPEG that is grey or YCbCr/RGB, 8 bit, with usual chroma subsampling and without EXIF rotation is decoded
   by libjpeg-turbo (simplejpeg; accurate integer DCT, fancy upsampling), scaled in the DCT domain by the
   smallest of 1/1, 1/2, 1/4, 1/8 that leaves both sides >= `size_px`. Plain files of this kind go through
   `slides.native` where it was compiled, which gives the same pixels to the bit, sooner.
2. Every other JPEG and every PNG goes through Pillow: EXIF orientation applied, 16 bit reduced to its high
   byte, alpha composited on white, CMYK converted as Pillow does, ICC profiles ignored; then reduced by the
   same whole factor with a box filter (`Image.reduce`).
3. Both end in `cv2.resize(..., (size_px, size_px), interpolation=INTER_LINEAR)` unless the size is right.

Tiles are meant to be square; another shape is stretched. Sizes are read from headers and refused before any
pixel is decoded. This module needs numpy, simplejpeg, Pillow and cv2; it must not load openslide or tifffile.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from slides import native
from slides.errors import TileDecodeError

MAX_TILE_BYTES = 16 * 1024 * 1024
MAX_TILE_PIXELS = 4096 * 4096
MIN_TILE_SIDE_PX = 8
MAX_JPEG_SCANS = 100
"""Every scan of a progressive JPEG, however few its bytes, is a pass over all pixels; encoders write ten."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_REFUSED_FORMATS = (
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"II+\0", 0, "BigTIFF"),
    (b"MM\0+", 0, "BigTIFF"),
    (b"WEBP", 8, "WebP"),
    (b"GIF8", 0, "GIF"),
    (b"BM", 0, "BMP"),
    (b"\0\0\0\x0cjP  ", 0, "JPEG 2000"),
    (b"ftyp", 4, "HEIF/AVIF"),
)
_USUAL_SUBSAMPLING = frozenset(
    {b"\x11\x11\x11", b"\x21\x11\x11", b"\x12\x11\x11", b"\x22\x11\x11", b"\x41\x11\x11"}
)


_native_decode = native.load()


class _JpegHeader(NamedTuple):
    width_px: int
    height_px: int
    plain: bool  # step 1 of the rule applies


class _JpegFrame(NamedTuple):
    width_px: int
    height_px: int
    components: int
    sequential: bool
    plain: bool  # the fast decoder's rule covers this kind of frame


def decode_tile(
    data: bytes, size_px: int, *, max_bytes: int = MAX_TILE_BYTES, max_pixels: int = MAX_TILE_PIXELS
) -> NDArray[np.uint8]:
    """Decode an encoded tile to the input of the network, by the rule in this module's docstring.

    Args:
        data: a whole JPEG or PNG file.
        size_px: side of the square result in pixels, >= 1.
        max_bytes: longer data is refused.
        max_pixels: an image with more pixels (by its header) is refused before it is decoded.

    Returns:
        uint8 [size_px, size_px, 3], RGB in 0..255, C-contiguous, owned by the caller.

    Raises:
        TileDecodeError: with `.reason`; nothing else, whatever the bytes are.
    """
    if not isinstance(data, bytes):
        data = bytes(data)
    if not data:
        raise TileDecodeError("empty", "tile has no bytes; send a whole JPEG or PNG file")
    if len(data) > max_bytes:
        raise TileDecodeError(
            "too_many_bytes", f"tile has {len(data)} bytes, at most {max_bytes} are accepted"
        )
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg_header(data)
        _check_size(header.width_px, header.height_px, max_pixels)
        factor = _reduction(header.width_px, header.height_px, size_px)
        if header.plain:
            image_HWC = _decode_plain_jpeg(data, header, factor)
        else:
            image_HWC = _decode_with_pillow(data, "JPEG", factor)
    elif data.startswith(_PNG_SIGNATURE):
        width_px, height_px = _png_size(data)
        _check_size(width_px, height_px, max_pixels)
        image_HWC = _decode_with_pillow(data, "PNG", _reduction(width_px, height_px, size_px))
    else:
        raise _unknown_format(data)
    if image_HWC.shape[:2] == (size_px, size_px):
        return image_HWC
    return cv2.resize(image_HWC, (size_px, size_px), interpolation=cv2.INTER_LINEAR).astype(
        np.uint8, copy=False
    )


def jpeg_decoder() -> str:
    """What decodes plain JPEG tiles in this process, one of `slides.native.DECODERS`; the pixels are the same."""
    return native.DECODERS[_native_decode is not None]


def encode_tile(tile_HWC: NDArray[np.uint8], quality: int) -> bytes:
    """JPEG of a tile as it travels: 4:4:4, so that thin coloured structures keep their edges.

    Args:
        tile_HWC: uint8 [H, W, 3], RGB.
        quality: 1..100 (libjpeg scale).
    """
    return simplejpeg.encode_jpeg(np.ascontiguousarray(tile_HWC), quality, "RGB", "444")


def _reduction(width_px: int, height_px: int, size_px: int) -> int:
    factor = 1
    while factor < 8 and min(-(-width_px // (2 * factor)), -(-height_px // (2 * factor))) >= size_px:
        factor *= 2
    return factor


def _check_size(width_px: int, height_px: int, max_pixels: int) -> None:
    if min(width_px, height_px) < MIN_TILE_SIDE_PX:
        raise TileDecodeError(
            "too_small",
            f"tile is {width_px} x {height_px} px; each side needs at least {MIN_TILE_SIDE_PX} px",
        )
    if width_px * height_px > max_pixels:
        raise TileDecodeError(
            "too_many_pixels",
            f"tile is {width_px} x {height_px} px, at most {max_pixels} pixels are accepted; cut it smaller",
        )


def _decode_plain_jpeg(data: bytes, header: _JpegHeader, factor: int) -> NDArray[np.uint8]:
    if _native_decode:
        image_HWC = _native_decode(data, header.width_px, header.height_px, factor)
        if image_HWC is not None:
            return image_HWC
    try:
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-header.height_px // factor), min_width=-(-header.width_px // factor)
        )
    except ValueError as error:
        reason = "truncated" if "Premature end" in str(error) else "damaged"
        raise TileDecodeError(reason, f"JPEG tile of {len(data)} bytes is {reason}: {error}") from error


def _decode_with_pillow(data: bytes, format_name: str, factor: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=(format_name,)) as opened:
            image: Image.Image = opened
            image.load()
            image = _as_rgb(ImageOps.exif_transpose(image))
            if factor > 1:
                image = image.reduce(factor)
            return np.array(image, dtype=np.uint8)
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, zlib.error, ...
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise TileDecodeError(
            reason, f"{format_name} tile of {len(data)} bytes is {reason} or not supported: {error}"
        ) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _png_size(data: bytes) -> tuple[int, int]:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise TileDecodeError("truncated", f"PNG tile of {len(data)} bytes ends inside its header")
    if data.rfind(b"IEND") < 0:
        raise TileDecodeError("truncated", f"PNG tile of {len(data)} bytes is truncated: it has no end chunk")
    width_px, height_px = struct.unpack(">II", data[16:24])
    return width_px, height_px


def _jpeg_header(data: bytes) -> _JpegHeader:
    """Walk the marker segments up to the first scan (ITU-T T.81, annex B); some microseconds a tile."""
    frame: _JpegFrame | None = None
    rotated = False
    position, end = 2, len(data)
    while position + 4 <= end:
        if data[position] != 0xFF:
            raise TileDecodeError("damaged", f"JPEG tile of {end} bytes has no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xDA:
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:
            raise TileDecodeError(
                "damaged", f"JPEG tile of {end} bytes has marker 0xFF{marker:02X} in its header"
            )
        length = data[position + 2] << 8 | data[position + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame is not None:
                raise TileDecodeError("damaged", f"JPEG tile of {end} bytes has two frame headers")
            frame = _jpeg_frame(data[position + 4 : position + 2 + length], marker)
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            rotated = rotated or _exif_orientation(data[position + 10 : position + 2 + length]) != 1
        position += 2 + length
    else:
        raise TileDecodeError(
            "truncated", f"JPEG tile of {end} bytes is truncated: it ends inside its header"
        )
    if frame is None:
        raise TileDecodeError(
            "damaged", f"JPEG tile of {end} bytes has no frame header before its first scan"
        )
    # Inside a scan every 0xFF is followed by 0x00 or a restart marker, so this counts scans. A sequential JPEG whose first
    # scan has all components has no other one: libjpeg refuses it there, and the count would cost a tenth of decoding.
    one_scan = frame.sequential and data[position + 4 : position + 5] == bytes([frame.components])
    scans = 1 if one_scan else data.count(b"\xff\xda", position)
    if scans > MAX_JPEG_SCANS:
        raise TileDecodeError(
            "too_many_scans",
            f"JPEG tile has {scans} scans, at most {MAX_JPEG_SCANS} are accepted; save it as baseline",
        )
    return _JpegHeader(frame.width_px, frame.height_px, frame.plain and not rotated)


def _jpeg_frame(segment: bytes, marker: int) -> _JpegFrame:
    if len(segment) < 6 or len(segment) < 6 + 3 * segment[5]:
        raise TileDecodeError("truncated", "JPEG tile is truncated: its frame header is too short")
    bits, height_px, width_px, components = struct.unpack(">BHHB", segment[:6])
    usual = components == 1 or (components == 3 and segment[7:15:3] in _USUAL_SUBSAMPLING)
    plain = bits == 8 and usual and marker in (0xC0, 0xC1, 0xC2)
    return _JpegFrame(width_px, height_px, components, marker in (0xC0, 0xC1), plain)


def _exif_orientation(tiff: bytes) -> int:
    """EXIF orientation 1..8 from the TIFF block of an APP1 segment; 1 where it is absent or unreadable."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 10:
        return 1
    (start,) = struct.unpack(order + "I", tiff[4:8])
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack(order + "H", tiff[start : start + 2])
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, values, value = struct.unpack(order + "HHIH", tiff[entry : entry + 10])
        if tag == 0x0112:
            return value if kind == 3 and values == 1 and 1 <= value <= 8 else 1
    return 1


def _unknown_format(data: bytes) -> TileDecodeError:
    for signature, offset, name in _REFUSED_FORMATS:
        if data[offset : offset + len(signature)] == signature:
            return TileDecodeError("unsupported_format", f"tile is {name}; JPEG and PNG are accepted")
    return TileDecodeError(
        "not_an_image",
        f"tile of {len(data)} bytes starting with {data[:8]!r} is no image; JPEG and PNG are accepted",
    )
