"""Says what bytes are that cannot be decoded as a picture, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping

HEAD = 4096
"""Bytes at the beginning of a file by which its kind is recognized."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2")
"""Brands (ISO 14496-12, `ftyp`) of HEIC pictures; mif1 and msf1 are those of every HEIF, AVIF too."""

PICTURES = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM", "BMP"),
    (rb"(II[*+]\0|MM\0[*+])", "TIFF"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\0\0\x01\0.\0", "ICO"),
    (rb"P[1-7fF]\s", "PNM"),
)
"""Pattern of the first bytes -> the name of a format that is read."""

_SUBFILE_TYPE, _SUB_IFDS, _DNG = 254, 330, 50706
"""TIFF tags: a first picture that is a reduced one, others below it, the version of a digital negative."""

_ANEW = "download or copy it again"

_OTHERS = (
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture, which cannot be read: convert it to JPEG or PNG, as with djxl"),
    (rb"8BPS", "a Photoshop file, which cannot be read: export it as JPEG or PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file, which is never run: convert it to PNG"),
    (rb"%PDF", "a PDF document, not a picture: convert its pages to PNG"),
    (rb"\x76\x2f\x31\x01|#\?RADIANCE", "an HDR picture (OpenEXR, Radiance), which cannot be read: convert it to PNG"),
    (rb"SIMPLE  =", "a FITS file, which cannot be read: convert it to PNG"),
    (rb".{128}DICM", "a DICOM file, which cannot be read: convert it to PNG"),
    (rb"\x1f\x8b", "gzip, not a picture: unpack it first"),
    (rb"(PK[\x03\x05]|Rar!|7z\xbc\xaf|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd)", "an archive, not a picture: unpack it first"),
    (
        rb"....ftypcrx |FUJIFILMCCD-RAW|\0MRM|FOVb",
        "a camera's raw file, which cannot be read: convert it to JPEG or PNG",
    ),
    (
        rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]|FLV\x01|OggS",
        "a video, not a picture: extract its frames",
    ),
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture itself: git lfs pull"),
)
"""Pattern of the first bytes -> what they are, and what to do."""

HEIF_REMEDY = "a HEIC picture, for which a reader is missing: pip install pillow-heif (or 'clip-batch[heif]')"
AVIF_REMEDY = "an AVIF picture, which this Pillow cannot read: pip install 'pillow>=11.3'"


def is_heif(data: bytes | memoryview) -> bool:
    """Whether bytes begin as a HEIC picture does: with its brand, or with another one and its brand among the rest."""
    head = bytes(data[:64])
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]
    return brands[0] in HEIF_BRANDS and not {b"avif", b"avis"} & set(brands)


def has_avif() -> bool:
    """Whether the installed Pillow reads AVIF; before 11.3 it does not know the word."""
    from PIL import features

    return "avif" in features.modules and bool(features.check("avif"))


def camera(tags: Mapping[int, object], data: bytes | memoryview) -> str | None:
    """What a TIFF is that a camera wrote as raw data, with a preview in place of its picture; None for other TIFFs."""
    if data[8:10] == b"CR" or _DNG in tags or (_SUB_IFDS in tags and tags.get(_SUBFILE_TYPE) == 1):
        return "a camera's raw file, of which only a small preview could be read: convert it to JPEG or PNG"
    return None


def picture(data: bytes | memoryview) -> str | None:
    """The name of the format that bytes begin as, such as "JPEG"; None if it is no common one that can be read.

    >>> picture(b"GIF89a")
    'GIF'
    """
    if is_heif(data):
        return "HEIC"
    head = bytes(data[:16])
    return next((name for pattern, name in PICTURES if re.match(pattern, head, re.DOTALL)), None)


def explain(data: bytes | memoryview, problem: str, readable: bool) -> str:
    """One line that says what bytes are, and how to mend it.

    `problem` is the decoder's message; `readable` is whether a decoder knew the format and failed later.

    >>> explain(b"<html>404</html>", "cannot identify image file", False)
    'an HTML page, not a picture: download or copy it again'
    """
    if not len(data):
        return f"an empty file of 0 bytes: {_ANEW}"
    head = bytes(data[:HEAD])
    if not any(head) and not any(bytes(data)):
        return f"{len(data):,} bytes that are all zero: {_ANEW}"
    if is_heif(data):
        return f"a HEIC picture that cannot be decoded ({problem}): {_ANEW}" if readable else HEIF_REMEDY
    name = picture(head)
    if name == "AVIF" and not readable:
        return AVIF_REMEDY if not has_avif() else f"a broken AVIF ({problem}): {_ANEW}"
    if name and _is_cut(data, name):
        return f"a {name} that breaks off ({problem}): {_ANEW}"
    if name == "TIFF" and not readable:
        return "a TIFF of a kind that cannot be read (colours of 32 bits, a raw file, or broken): convert it to PNG"
    if name:
        return f"a broken {name} ({problem}): {_ANEW}"
    other = next((what for pattern, what in _OTHERS if re.match(pattern, head, re.DOTALL)), None) or _text(head)
    if other:
        return other
    return f"{problem}: {_ANEW}" if readable else f"no picture of a known format, it begins with {head[:12]!r}: {_ANEW}"


def _is_cut(data: bytes | memoryview, name: str) -> bool:
    """Whether a picture lacks its end; always False for formats whose end is not marked."""
    if name == "JPEG":
        return b"\xff\xd9" not in bytes(data[-4096:])
    if name == "PNG":
        return b"IEND" not in bytes(data[-4096:])
    if name == "WebP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return False


def _text(head: bytes) -> str | None:
    """What a text is, by its beginning; None if the bytes are no text."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"<"):
        if re.match(rb"<(svg|\?xml|!--|!doctype svg)", start) and b"<svg" in start:
            return "an SVG drawing, which cannot be read: convert it to PNG"
        if re.match(rb"<(!doctype html|html|head|body|script|meta|title|!--)", start) or b"<html" in start:
            return f"an HTML page, not a picture: {_ANEW}"
        if start.startswith(b"<?xml"):
            return f"an XML document, as of a store's error, not a picture: {_ANEW}"
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = head.decode("utf-16" if utf16 else "utf-8-sig", "ignore")
    if utf16 or (len(text.encode()) > len(head) - 8 and all(c.isprintable() or c.isspace() for c in text)):
        kind = "JSON" if text.lstrip()[:1] in ("{", "[") else "text"
        return f"{kind}, not a picture ({' '.join(text.split())[:40]!r}): {_ANEW}"
    return None
