"""Measures a model on the embedded images: text-to-image recall over the whole set.

    python -m clip_batch.demo.evaluate [FOLDER]

FOLDER is any folder of open_clip with `open_clip_config.json`, by default the embedded model.
recall@k of names and held-out short names is the fraction of queries whose image is among the k
nearest of all images. A keyword belongs to many images, so recall@k of keywords is the fraction of
keywords with at least one of their images among the k nearest.
"""

import argparse
import io
from collections.abc import Container
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image

from clip_batch.demo.captions import LANGUAGES
from clip_batch.demo.data import load
from clip_batch.encoders.embedded import model_path

SETS = (
    "name_en",
    "name_zh",
    "held_out",
    "held_out_without_flags",
    "keyword_en",
    "keyword_zh",
)
_BATCH = 256


class Queries(NamedTuple):
    """Texts, and the rows of the images that answer each of them."""

    texts: list[str]
    answers: list[list[int]]


def query_sets(rows: list[dict[str, Any]]) -> dict[str, Queries]:
    """The queries of each name in `SETS`, from the rows of the table."""
    sets: dict[str, Queries] = {}
    for language in LANGUAGES:
        names = [row[f"name_{language}"] for row in rows]
        sets[f"name_{language}"] = Queries(names, [[index] for index in range(len(rows))])
    held_out = [(text, index) for index, row in enumerate(rows) for text in row["held_out"]]
    words = [(text, index) for text, index in held_out if rows[index]["category"] != "Flags"]
    for name, pairs in (("held_out", held_out), ("held_out_without_flags", words)):
        sets[name] = Queries([text for text, _ in pairs], [[index] for _, index in pairs])
    for language in LANGUAGES:
        owners: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            for keyword in row[f"keywords_{language}"]:
                owners.setdefault(keyword, []).append(index)
        sets[f"keyword_{language}"] = Queries(list(owners), list(owners.values()))
    return sets


def ranks(texts: torch.Tensor, images: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
    """The rank of each text's best answer, counted from 0: int64 (n,).

    `texts` (n, d) and `images` (m, d) have unit norm. Other images with exactly the score of the
    answer rank before it.
    """
    scores = texts @ images.T
    best = torch.stack([row[rows].max() for row, rows in zip(scores, answers, strict=True)])
    ahead = scores >= best[:, None]
    for row, rows in zip(ahead, answers, strict=True):
        row[rows] = False
    return ahead.sum(1)


@torch.inference_mode()
def evaluate(folder: str, sets: Container[str] = SETS) -> dict[str, float]:
    """recall@1 and recall@10, from 0 to 1, of the `sets` of queries, by "set@k"."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    rows: list[dict[str, Any]] = load().to_pylist()

    def text_features(texts: list[str]) -> torch.Tensor:
        return torch.cat(
            [
                model.encode_text(tokenizer(texts[start : start + _BATCH]), normalize=True)
                for start in range(0, len(texts), _BATCH)
            ]
        )

    pixels = torch.stack([preprocess(Image.open(io.BytesIO(row["image"]))) for row in rows])
    images = torch.cat([model.encode_image(part, normalize=True) for part in torch.split(pixels, _BATCH)])
    result: dict[str, float] = {}
    for name, queries in query_sets(rows).items():
        if name not in sets:
            continue
        rank = ranks(text_features(queries.texts), images, queries.answers)
        for k in (1, 10):
            result[f"{name}@{k}"] = (rank < k).float().mean().item()
    return result


def report(recalls: dict[str, float]) -> str:
    """The recalls as one line of text."""
    return "  ".join(f"{name} {value:.4f}" for name, value in recalls.items())


def main() -> None:
    """Read the command line and print one line for each set and k."""
    parser = argparse.ArgumentParser(description="Measure recall over the embedded images.")
    parser.add_argument("folder", nargs="?", default=model_path())
    for name, value in evaluate(parser.parse_args().folder).items():
        print(f"{name:27} {value:.4f}")


if __name__ == "__main__":
    main()
