"""Builds `emoji.parquet`: every emoji of Unicode 16 as a 64-pixel JPEG with its captions.

The sources are three npm packages, which are downloaded and unpacked by hand:

    npm pack emoji-datasource-google@16.0.0
    npm pack cldr-annotations-full@48.2.0
    npm pack cldr-annotations-derived-full@48.2.0
    for name in emoji-datasource-google cldr-annotations-full cldr-annotations-derived-full; do
        mkdir $name && tar -xzf $name-[0-9]*.tgz -C $name
    done
    python -m clip_batch.demo.build --emoji emoji-datasource-google/package \\
        --annotations cldr-annotations-full/package \\
        --derived cldr-annotations-derived-full/package \\
        --output emoji.parquet

The result depends only on the sources and on the versions of Pillow and pyarrow.
"""

import argparse
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clip_batch.demo.captions import LANGUAGES, Language, name_forms, plain

JPEG_QUALITY = 88
_VARIATION_SELECTOR = "\ufe0f"


class Annotation(NamedTuple):
    """The name and keywords of one character in one language, from CLDR."""

    name: str
    keywords: list[str]


def characters(unified: str) -> str:
    """The emoji of hyphenated code points in hexadecimal, without variation selectors.

    >>> characters("2764-fe0f") == chr(0x2764)
    True
    """
    return "".join(chr(int(code, 16)) for code in unified.split("-")).replace(_VARIATION_SELECTOR, "")


def annotations(folders: list[Path], language: Language) -> dict[str, Annotation]:
    """The names and keywords in `language`, by emoji without variation selectors.

    `folders` are the unpacked CLDR packages: the annotations, and the derived annotations
    (flags, sequences, keycaps).
    """
    by_emoji: dict[str, Annotation] = {}
    for folder in folders:
        for path in sorted(folder.glob(f"annotations*/{language}/annotations.json")):
            (content,) = json.loads(path.read_text(encoding="utf-8")).values()
            for emoji, entry in content["annotations"].items():
                if "tts" in entry:
                    key = emoji.replace(_VARIATION_SELECTOR, "")
                    by_emoji[key] = Annotation(entry["tts"][0], entry.get("default", []))
    return by_emoji


def jpeg(path: Path) -> bytes:
    """The picture at `path` on white, as the bytes of a JPEG of the same size."""
    with Image.open(path) as picture:
        drawn = picture.convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return out.getvalue()


def row(
    entry: dict[str, Any],
    emoji: Path,
    known: dict[Language, dict[str, Annotation]],
) -> dict[str, Any]:
    """The table's row for one entry of emoji.json: all columns except `held_out`."""
    character = characters(entry["unified"])
    fallback = Annotation(entry["name"].lower(), [])
    result: dict[str, Any] = {
        "key": Path(entry["image"]).stem,
        "image": jpeg(emoji / "img" / "google" / "64" / entry["image"]),
        "short_names": entry["short_names"],
        "category": entry["category"],
    }
    for language in LANGUAGES:
        annotation = known[language].get(character, fallback)
        result[f"name_{language}"] = annotation.name
        result[f"keywords_{language}"] = annotation.keywords
    return result


def trained_texts(rows: list[dict[str, Any]]) -> set[str]:
    """The plain form of every name, in all its forms, and of every keyword of the table."""
    texts: set[str] = set()
    for language in LANGUAGES:
        for row in rows:
            texts.update(map(plain, name_forms(row[f"name_{language}"], language)))
            texts.update(map(plain, row[f"keywords_{language}"]))
    return texts


def build(emoji: Path, annotated: list[Path]) -> pa.Table:
    """The whole table, in the order of emoji.json; `held_out` has the short names that training does not use."""
    known = {language: annotations(annotated, language) for language in LANGUAGES}
    entries = json.loads((emoji / "emoji.json").read_text(encoding="utf-8"))
    rows = [row(entry, emoji, known) for entry in entries if entry["has_img_google"]]
    trained = trained_texts(rows)
    for each in rows:
        words = [re.sub(r"[-_]+", " ", name).strip() for name in each["short_names"]]
        each["held_out"] = [text for text in words if plain(text) not in trained]
    strings = pa.list_(pa.string())
    schema = pa.schema(
        {
            "key": pa.string(),
            "image": pa.binary(),
            "name_en": pa.string(),
            "name_zh": pa.string(),
            "keywords_en": strings,
            "keywords_zh": strings,
            "short_names": strings,
            "category": pa.string(),
            "held_out": strings,
        }
    )
    return pa.Table.from_pylist(rows, schema=schema)


def main() -> None:
    """Read the command line and write the table."""
    parser = argparse.ArgumentParser(description="Build the table of captioned emoji images.")
    parser.add_argument("--emoji", type=Path, required=True, help="emoji-datasource-google")
    parser.add_argument("--annotations", type=Path, required=True, help="cldr-annotations-full")
    parser.add_argument("--derived", type=Path, required=True, help="cldr-annotations-derived-full")
    parser.add_argument("--output", type=Path, required=True, help="the parquet file to write")
    arguments = parser.parse_args()
    table = build(arguments.emoji, [arguments.annotations, arguments.derived])
    pq.write_table(table, arguments.output, compression="zstd", compression_level=19, use_dictionary=["category"])
    print(f"{table.num_rows} rows, {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
