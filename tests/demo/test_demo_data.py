"""The demo's embedded images, tars and model: counts, sizes, determinism and recall."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_batch.demo import data
from clip_batch.demo.captions import caption, name_forms, plain
from clip_batch.encoders.embedded import model_path

ROWS = 1911


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The embedded table, a dict for each row."""
    loaded: list[dict[str, Any]] = data.load().to_pylist()
    return loaded


@pytest.fixture
def model_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """The embedded model's name to open_clip, with the network forbidden to its libraries."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return f"local-dir:{model_path()}"


def test_table_has_every_emoji_with_both_names(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == ROWS
    assert len({row["key"] for row in rows}) == ROWS
    for language in ("en", "zh"):
        assert len({row[f"name_{language}"] for row in rows}) == ROWS
        assert all(row[f"keywords_{language}"] for row in rows)
    apple = next(row for row in rows if row["key"] == "1f34e")
    assert (apple["name_en"], apple["name_zh"], apple["category"]) == ("red apple", "红苹果", "Food & Drink")


def test_images_are_small_jpegs(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_held_out_names_are_no_trained_text(rows: list[dict[str, Any]]) -> None:
    trained: set[str] = set()
    for row in rows:
        trained.update(map(plain, [*name_forms(row["name_en"], "en"), *name_forms(row["name_zh"], "zh")]))
        trained.update(map(plain, [*row["keywords_en"], *row["keywords_zh"]]))
    held_out = [text for row in rows for text in row["held_out"]]
    assert len(held_out) > 300
    assert not trained & set(map(plain, held_out))


def test_embedded_files_are_small() -> None:
    folder = Path(model_path())
    assert Path(data.table_path()).stat().st_size < 3_000_000
    assert (folder / "open_clip_model.safetensors").stat().st_size < 10_000_000
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000


def test_tars_hold_the_table_and_are_the_same_every_time(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    paths = data.write_tars(str(tmp_path / "a"), shards=3)
    again = data.write_tars(str(tmp_path / "b"), shards=3)
    assert [Path(path).name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    for left, right in zip(paths, again, strict=True):
        assert hashlib.sha256(Path(left).read_bytes()).digest() == hashlib.sha256(Path(right).read_bytes()).digest()
    members: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                members[member.name] = content.read()
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    assert len(members) == 3 * ROWS
    for row in rows:
        assert members[f"{row['key']}.jpg"] == row["image"]
        assert members[f"{row['key']}.txt"].decode() == caption(row["name_en"], row["name_zh"])
        assert json.loads(members[f"{row['key']}.json"]) == {
            name: row[name] for name in ("key", "name_en", "name_zh", "category")
        }


@pytest.mark.parametrize("shards", [0, -1])
def test_tars_need_a_shard(tmp_path: Path, shards: int) -> None:
    with pytest.raises(ValueError, match="shards must be at least 1"):
        data.write_tars(str(tmp_path), shards)


def test_name_forms_undo_the_prefix() -> None:
    assert name_forms("red apple", "en") == ["red apple"]
    assert name_forms("flag: Bolivia", "en") == ["flag: Bolivia", "Bolivia", "Bolivia flag", "flag of Bolivia"]
    assert name_forms("旗: 玻利维亚", "zh") == ["旗: 玻利维亚", "玻利维亚", "玻利维亚旗", "玻利维亚国旗"]
    assert name_forms("person: beard", "en") == ["person: beard", "beard", "beard person"]


@pytest.mark.slow
def test_any_text_has_tokens(model_name: str) -> None:
    import open_clip

    tokenizer = open_clip.get_tokenizer(model_name)
    backend = tokenizer.tokenizer
    end = len(backend) - 1
    texts = ["", "   ", "!?", "Zürich's quokka", "龘靐齉", "😀 ok", "ひらがな", "x" * 1000, "<0x41>", "\x00\u200d", "#"]
    tokens = tokenizer(texts)
    assert tokens.shape == (len(texts), tokenizer.context_length)
    assert (tokens.max(1).values == end).all()
    ends = tokens.argmax(1)
    for row, place in zip(tokens, ends, strict=True):
        assert (row[:place] != 0).all()
        assert (row[place + 1 :] == 0).all()
    assert ends.tolist()[:3] == [0, 0, 0]
    assert ends[4] == 9  # three rare characters, as three bytes each
    same = tokenizer(["Woman’s hat", "WOMANS  hat!", "flag: Côte d’Ivoire", "flag cote divoire"])
    assert (same[0] == same[1]).all()
    assert (same[2] == same[3]).all()
    for text in ("Woman’s hat", "flag: Côte d’Ivoire", "three-thirty", "keycap: *", "日文的“申请”按钮"):
        assert (tokenizer(text) == tokenizer(plain(text))).all()


@pytest.mark.slow
def test_padding_can_be_cut(model_name: str) -> None:
    import open_clip
    import torch

    model, _ = open_clip.create_model_from_pretrained(model_name)
    model.eval()
    tokens = open_clip.get_tokenizer(model_name)(["red apple", "一只猫"])
    length = int(tokens.argmax(1).max()) + 1
    with torch.inference_mode():
        whole = model.encode_text(tokens)
        hidden = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
        cut = hidden[torch.arange(2), tokens.argmax(1)] @ model.text_projection
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recall(model_name: str) -> None:
    from clip_batch.demo.evaluate import evaluate

    recalls = evaluate(model_name.removeprefix("local-dir:"), {"name_en", "name_zh", "held_out"})
    assert recalls["name_en@10"] >= 0.9
    assert recalls["name_zh@10"] >= 0.8
    assert recalls["held_out@10"] >= 0.3
