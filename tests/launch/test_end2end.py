"""end2end with the real img2dataset and a real web server; and the formats of URL lists."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_batch.cli import main
from clip_batch.config import DownloadConfig
from clip_batch.errors import ClipBatchError, ConfigError, InputError
from clip_batch.launch.end2end.urls import freeze, read_frozen
from clip_batch.storage.store import Store
from tests import ROOT
from tests.servers.processes import free_ports, kept, mine
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server
from tests.servers.webserver import BAD, Web, web

BESIDE = ROOT / ".img2dataset/bin/img2dataset"


@pytest.fixture(scope="module")
def img2dataset() -> str:
    """The path of img2dataset: IMG2DATASET, or where `make img2dataset` installs it."""
    program = os.environ.get("IMG2DATASET") or (str(BESIDE) if BESIDE.exists() else "")
    if not program:
        pytest.skip("no img2dataset: name it in IMG2DATASET, or make img2dataset")
    return program


@pytest.fixture(scope="module")
def site() -> Iterator[Web]:
    with web() as server:
        yield server


def command(program: str, urls: Path, folder: Path, *more: str) -> list[str]:
    """Return the arguments of an end2end run without its web page, in shards of 20."""
    quick = ["--shard-samples", "20", "--timeout", "1.5", "--retries", "0", "--download-processes", "2"]
    quiet = ["--no-serve", "--no-progress", "--json", "--model", "fake:8"]
    return ["end2end", "--urls", str(urls), "--output", str(folder), "--img2dataset", program, *quick, *quiet, *more]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *rows])
    return path


def embedded(folder: Path) -> list[str]:
    """Return the URLs in the committed metadata, sorted."""
    files = sorted((folder / "embeddings/metadata").iterdir())
    return sorted(row["url"] for file in files for row in pq.read_table(file).to_pylist())


def failures(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "failures.parquet").to_pylist()
    return rows


@pytest.mark.slow
def test_each_url_is_embedded_or_listed_with_its_reason(
    img2dataset: str, site: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [(f"{site.url}/good/{i}.jpg", f"caption {i}") for i in range(42)]
    good += [(f"{site.url}/moved.jpg", "moved"), (good[0][0], "again"), (f"{site.url}/good/50.jpg?a,b", "")]
    bad = [(f"{site.url}{path}", path) for path in BAD]
    none = [("file:///etc/passwd", "x"), ("nonsense", ""), ("", "empty")]
    urls = write_csv(tmp_path / "list.csv", [*good[:20], *bad, *good[20:], *none])
    folder = tmp_path / "dir"

    assert main(command(img2dataset, urls, folder)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["urls"], summary["embedded"], sum(summary["failed"].values())) == (56, 45, 11)
    assert embedded(folder) == sorted(url for url, _ in good)
    told = failures(folder)
    assert [(row["row"], row["url"]) for row in told] == [
        *((20 + i, url) for i, (url, _) in enumerate(bad)),
        *((53 + i, url) for i, (url, _) in enumerate(none)),
    ]
    for row, said in zip(told, BAD.values(), strict=False):
        assert row["stage"] == "download" and said in row["message"]
    assert {row["stage"] for row in told[-3:]} == {"list"}
    assert main(["verify", "--output", f"{folder}/embeddings", "--deep"]) == 0
    assert main(["verify", "--index", f"{folder}/index"]) == 0
    capsys.readouterr()

    asked, said = site.asked.copy(), "all 3 shards are downloaded already"
    assert main(command(img2dataset, urls, folder)) == 0
    second = capsys.readouterr()
    assert json.loads(second.out) == summary and said in second.err
    assert site.asked == asked
    assert main([*command(img2dataset, urls, folder), "--image-size", "64"]) == 2
    assert "image_size differ" in capsys.readouterr().err

    [port] = free_ports(1)
    line = [one for one in command(img2dataset, urls, folder) if one != "--no-serve"]
    server = subprocess.Popen(
        [sys.executable, "-m", "clip_batch", *line, "--port", str(port)], stdout=subprocess.DEVNULL
    )
    try:
        assert indices(server, port)[0]["rows"] == 45
    finally:
        server.terminate()
        server.communicate()

    hits = ["--index", f"{folder}/index", "--text", "caption 3", "-k", "5"]
    assert main(["filter", *hits, "--output", f"{tmp_path}/found"]) == 0
    capsys.readouterr()
    assert main(command(img2dataset, tmp_path / "found", tmp_path / "again")) == 0
    assert json.loads(capsys.readouterr().out)["embedded"] == 5
    rows = pq.read_table(tmp_path / "found/rows").to_pylist()
    again = pq.read_table(tmp_path / "again/embeddings/metadata").to_pylist()
    assert {(row["url"], row["caption"]) for row in again} == {(row["url"], row["caption"]) for row in rows}

    assert main(["search", *hits, "--json"]) == 0
    page = {
        "index": "index",
        "query": "text=caption+3",
        "hits": json.loads(capsys.readouterr().out),
    }  # as page.js saves
    (tmp_path / "hits.json").write_text(json.dumps(page, indent=1))
    home = Store(str(tmp_path / "saved"))
    assert freeze(DownloadConfig(urls=str(tmp_path / "hits.json")), home, {}).captions
    saved = pq.read_table(tmp_path / "saved/urls").to_pylist()
    assert [(row["url"], row["caption"]) for row in saved] == [(row["url"], row["caption"]) for row in rows]


def indices(server: subprocess.Popen[bytes], port: int) -> list[dict[str, Any]]:
    """Return the indices of a server, once it answers."""
    for _ in range(3000):
        assert server.poll() is None, "the service ended"
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/indices", timeout=60) as answer,
        ):
            served: list[dict[str, Any]] = json.load(answer)["indices"]
            if served:
                return served
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
def test_an_image_that_embed_cannot_use_is_listed(
    img2dataset: str, site: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = tmp_path / "list.txt"
    urls.write_text("".join(f"{site.url}{path}\n" for path in ("/page.jpg", "/good/1.jpg", "/cut.jpg", "/missing.jpg")))
    raw = ("--img2dataset-options", '{"disable_all_reencoding": true}')
    assert main(command(img2dataset, urls, tmp_path / "dir", *raw)) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == {
        "embed: undecodable_image": 2,
        "download: failed_to_download": 1,
    }
    assert [(row["row"], row["stage"]) for row in failures(tmp_path / "dir")] == [
        (0, "embed"),
        (2, "embed"),
        (3, "download"),
    ]


@pytest.mark.slow
def test_no_image_at_all_is_an_error_with_the_reasons(
    img2dataset: str, site: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = tmp_path / "list.txt"
    urls.write_text(f"{site.url}/missing.jpg\nhttps://\n")
    assert main(command(img2dataset, urls, tmp_path / "dir")) == 1
    assert "none of 2 URLs gave an image" in capsys.readouterr().err
    assert [row["stage"] for row in failures(tmp_path / "dir")] == ["download", "list"]


@pytest.mark.slow
def test_what_img2dataset_refuses_is_told_in_one_line(
    img2dataset: str, site: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = tmp_path / "list.txt"
    urls.write_text(f"{site.url}/good/1.jpg\n")
    wrong = ("--img2dataset-options", '{"encode_format": "gif"}')  # img2dataset then waits for its logger forever
    assert main(command(img2dataset, urls, tmp_path / "dir", *wrong)) == 1
    assert "Invalid encode format gif" in capsys.readouterr().err
    unknown = ("--img2dataset-options", '{"image_sise": 9}')
    assert main(command(img2dataset, urls, tmp_path / "dir", *unknown)) == 2
    assert "image_sise" in capsys.readouterr().err
    taken = ("--img2dataset-options", '{"output_format": "files"}')
    assert main(command(img2dataset, urls, tmp_path / "other", *taken)) == 2
    assert "output_format" in capsys.readouterr().err
    assert main(command("/nowhere/img2dataset", urls, tmp_path / "other")) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["all", "ours_alone"])
def test_kill_9_while_it_downloads_and_while_it_embeds(
    img2dataset: str, site: Web, tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [(f"{site.url}/good/{i}.jpg?{whole}", str(i)) for i in range(230)]
    urls = write_csv(tmp_path / "list.csv", [*good, (f"{site.url}/missing.jpg", "none")])
    folder = tmp_path / "dir"
    small = ("--partition-samples", "20", "--batch-size", "1")
    line = [sys.executable, "-m", "clip_batch", *command(img2dataset, urls, folder, *small)]
    monkeypatch.setattr(site, "pause", 0.4)
    mark = f"END2END_TEST={tmp_path}"
    with kept(mark):
        kill_when(line, mark, whole, lambda: len(list(folder.glob("images/*_stats.json"))) >= 3)
        began = set(folder.glob("images/*_stats.json"))
        assert len(began) < 12
        monkeypatch.setattr(site, "pause", 0.0)
        kill_when(line, mark, whole, lambda: len(list(folder.glob("embeddings/_clip_batch/commits/*.json"))) >= 2)
        cut = list(folder.glob("embeddings/_clip_batch/commits/*.json"))
        assert len(cut) < 12 and not (folder / "index").exists()
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert embedded(folder) == sorted(url for url, _ in good)
    assert [row["row"] for row in failures(folder)] == [230]
    for path in began:  # the shards that existed were not downloaded again
        first = int(path.name[:5]) * 20
        assert all(site.asked[f"/good/{i}.jpg?{whole}"] == 1 for i in range(first, first + 20))


def kill_when(line: list[str], mark: str, whole: bool, reached: Callable[[], bool]) -> None:
    """Start a run and kill -9 it, with all its processes if `whole`, once `reached` returns true; none may survive."""
    environment = {**os.environ, mark.partition("=")[0]: mark.partition("=")[2]}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    pids = mine(mark) if whole else {process.pid}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while mine(mark):
        assert time.monotonic() < end, "processes of img2dataset survived"
        time.sleep(0.05)
    assert process.stderr
    process.stderr.close()


@pytest.mark.slow
def test_images_and_all_else_on_s3(
    img2dataset: str,
    site: Web,
    s3: S3,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    python = Path(img2dataset).parent / "python"
    if subprocess.run([str(python), "-c", "import s3fs"], capture_output=True).returncode:
        pytest.skip("img2dataset's environment has no s3fs")
    urls = write_csv(tmp_path / "list.csv", [(f"{site.url}/good/{i}.jpg", str(i)) for i in range(30)])
    remote = command(img2dataset, urls, tmp_path, "--storage-options", json.dumps(s3.options))
    remote[remote.index(str(tmp_path))] = f"s3://{BUCKET}/end2end"
    assert main(remote) == 0
    assert json.loads(capsys.readouterr().out)["embedded"] == 30
    assert main(remote) == 0
    assert "all 2 shards are downloaded already" in capsys.readouterr().err


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=20)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, st.none() | TEXT), min_size=1, max_size=30), st.sampled_from(range(8)), st.booleans())
def test_a_list_is_frozen_alike_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str | None]], kind: int, zipped: bool
) -> None:
    folder = tmp_path_factory.mktemp("list")
    rows = [(f"http://a/{text}" if number % 3 else text, caption) for number, (text, caption) in enumerate(rows)]
    if kind == 7:  # TSV without quotes cannot have tabs in its cells
        rows = [(url.replace("\t", " "), caption and caption.replace("\t", " ")) for url, caption in rows]
    name, data = formats(rows)[kind]
    zipped = zipped and kind != 5
    quotes: Any = {"list_quotes": "yes" if kind == 2 else "auto"}
    path = folder / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    home = Store(str(folder / "dir"))
    expected = [(url.strip(), caption) for url, caption in rows if kind or url.strip()]
    config = DownloadConfig(urls=str(path), shard_samples=7, **quotes)
    if not expected:
        with pytest.raises(InputError, match="lists no URL"):
            freeze(config, home, {})
        return
    url_list = freeze(config, home, {})
    assert freeze(config, home, {}) == url_list
    assert (url_list.urls, url_list.shards) == (len(expected), -(-len(expected) // 7))
    [(start, table)] = read_frozen(home, url_list)
    assert start == 0
    got = [one if one is not None else other for one, other in zip(*table.to_pydict().values(), strict=True)]
    assert [url.strip() for url in got] == [url for url, _ in expected]
    for url, _ in zip(table["url"].to_pylist(), expected, strict=True):
        assert url is None or url.startswith("http://a/")
    if kind:
        captions = pq.read_table(folder / "dir/urls/00000.parquet")["caption"].to_pylist()
        assert [caption or "" for caption in captions] == [caption or "" for _, caption in expected]


def formats(rows: list[tuple[str, str | None]]) -> list[tuple[str, bytes]]:
    """Return the name and content of the list in each format; text has no captions."""
    objects = [{"url": url, "caption": caption} for url, caption in rows]
    quoted = ["".join(f'"{(cell or "").replace(chr(34), 2 * chr(34))}"{{}}' for cell in row) for row in rows]
    heads = ("url,caption\n", "url\tcaption\n")
    tables = ["".join(line.replace('"{}"', f'"{sep}"')[:-2] + "\n" for line in quoted) for sep in ",\t"]
    parquet = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(objects, pa.schema([("url", pa.string()), ("caption", pa.string())])), parquet)
    return [
        ("list.txt", "".join(f"{url}\n" for url, _ in rows).encode()),
        ("list.csv", (heads[0] + tables[0]).encode()),
        ("list.tsv", (heads[1] + tables[1]).encode()),
        ("list.json", json.dumps(objects).encode()),
        ("list.jsonl", "\n".join(map(json.dumps, objects)).encode()),
        ("list.parquet", parquet.getvalue().to_pybytes()),
        ("list.csv", (heads[0] + tables[0]).encode("utf-16")),
        ("list.tsv", (heads[1] + "".join(f"{url}\t{caption or ''}\r\n" for url, caption in rows)).encode("utf-8-sig")),
    ]


def test_rows_are_found_by_img2datasets_keys(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"http://a/{i}\n" for i in range(250)))
    for samples, width in ((1, 1), (7, 1), (10, 1), (11, 2), (100, 2), (250, 3)):
        url_list = freeze(
            DownloadConfig(urls=str(tmp_path / "list.txt"), shard_samples=samples), Store(f"{tmp_path}/{samples}"), {}
        )
        width = 0 if samples == 1 else width
        keys = [f"{10**width * (row // samples) + row % samples:0{width + 5}d}" for row in range(250)]
        assert url_list.rows(pa.array(keys)).tolist() == list(range(250))


def test_a_folder_of_files_of_many_types_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_batch.launch.end2end.urls.FILE_URLS", 5)
    source = tmp_path / "lists"
    source.mkdir()
    urls = [f"https://a/{i}" for i in range(24)]
    pq.write_table(pa.table({"url": urls[:11], "score": pa.nulls(11), "n": list(range(11))}), source / "0.parquet")
    pq.write_table(pa.table({"url": urls[11:20], "score": [0.5] * 9, "n": [0.5] * 9}), source / "1.parquet")
    (source / "2.jsonl").write_text(
        "".join(json.dumps({"url": url, "score": None, "n": "x"}) + "\n" for url in urls[20:])
    )
    config = DownloadConfig(urls=str(source), shard_samples=3, save_columns=["score", "n"])
    url_list = freeze(config, Store(str(tmp_path / "dir")), {})
    files = sorted((tmp_path / "dir/urls").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [6, 6, 6, 6]
    tables = [pq.read_table(file) for file in files]
    assert pa.concat_tables(tables)["url"].to_pylist() == urls
    assert (url_list.urls, url_list.captions) == (24, False)
    assert pa.concat_tables(tables)["n"].to_pylist()[-5:] == ["0.5", *"xxxx"]


@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("a.csv", b"URL,TEXT\nhttp://a,b\n", {}, "no column 'url', but URL, TEXT: give --url-column URL"),
        ("a.csv", b"link,TEXT\nhttp://a,b\n", {}, "no column 'url', but link, TEXT: correct --url-column"),
        ("a.csv", b"url,Caption\nhttp://a,b\n", {}, "no column 'caption', but url, Caption: give --caption-column Cap"),
        ("a.tsv", b'"url"\t"caption"\n"http://a"\t"b"\n', {}, "in quotes, so give --list-quotes yes"),
        ("a.csv", b"url;caption\nhttp://a;b\n", {}, "separated by ';'"),
        ("a.csv", b"url\tcaption\nhttp://a\tb\n", {}, "separated by .*, .tsv tabs"),
        ("a.csv", b"url,url\nhttp://a,b\n", {}, "the column 'url' 2 times"),
        ("a.csv", b'url,caption\n\nhttp://a,"b\nc"\nhttp://a\n', {}, "line 5 has 1 cells, the header 2.*--list-q"),
        ("a.csv", b'url\nhttp://a\n"http://a\n', {}, "line 3: unexpected end.*--list-quotes no"),
        ("a.csv", b"url\nhttp://a/caf\xe9\n", {}, "line 2 is not UTF-8.*iconv"),
        ("a.tsv", b"http://a\ta cat\t1\n", {}, "line 1 holds a URL.*put a line before it"),
        ("a.csv", b"http://a,http://b\n", {}, "line 1 holds a URL"),
        ("a.jsonl", b'{"url": "http://a"}\n\n{"url": \n', {}, "line 3 is no JSON"),
        ("a.jsonl", b'{"url": "http://a"}\n' + b"[" * 100_000, {}, "line 2 is no JSON"),
        ("a.jsonl", b'{"url": "http://a"}\n[1]\n', {}, "line 2 is .1., no object"),
        ("a.json", b"[" * 100_000, {}, "recursion|Stack overflow"),
        ("a.json", b"7", {}, "no array"),
        ("a.csv", b"url\n", {}, "lists no URL"),
        ("a.json", b"[1]", {}, "no object"),
        ("a.json", b"[null]", {}, "no object"),
        ("a.json", b"{", {}, "a.json cannot be read"),
        ("a.parquet", b"PAR1", {}, "a.parquet cannot be read"),
        ("a.txt", b"http://a\n\xff\xff", {}, "line 2 is not UTF-8"),
        ("a.txt.gz", b"plain", {}, "not a gzip|Not a gzip"),
        ("a.txt", b"", {}, "lists no URL"),
        ("a.csv", b"url\nhttp://a\n", {"caption_column": "text"}, "no column 'text'"),
        ("a.csv", b"url,key\nhttp://a,b\n", {"save_columns": ["key"]}, "cannot have key"),
        ("a.csv", b"url\nhttp://a\n", {"shard_samples": 0}, "shard_samples"),
    ],
)
def test_what_is_no_list_is_refused_by_name(
    tmp_path: Path, name: str, data: bytes, options: dict[str, Any], said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ClipBatchError, match=said):
        freeze(DownloadConfig(urls=str(tmp_path / name), **options), Store(str(tmp_path / "dir")), {})
    assert not (tmp_path / "dir/urls.json").exists()
    with pytest.raises(InputError, match="no URL list"):
        freeze(DownloadConfig(urls=str(tmp_path / "absent")), Store(str(tmp_path / "dir")), {})


def frozen(folder: Path, name: str, data: bytes, **options: Any) -> tuple[list[Any], list[Any], list[str]]:
    """Return the URLs, the captions and the notes of a list."""
    (folder / name).write_bytes(data)
    url_list = freeze(DownloadConfig(urls=str(folder / name), **options), Store(str(folder / "dir")), {})
    table = pq.read_table(folder / "dir/urls")
    captions = table["caption"].to_pylist() if url_list.captions else []
    return table["url"].to_pylist(), captions, url_list.notes


CAPTIONS = ["a red bicycle", '"quoted" words', '"an open quote', "between", 'closes here" or not', "last, with comma"]


@pytest.mark.parametrize("columns", [["url", "caption"], ["caption", "url"]])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_in_tsv_are_text(tmp_path: Path, columns: list[str], header: bool, coding: str, end: str) -> None:
    rows = [{"url": f"http://a/{number}", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    lines = ["\t".join(row[name] for name in columns) for row in rows]
    text = end.join((["\t".join(columns)] if header else []) + lines)
    urls, captions, notes = frozen(tmp_path, "list.tsv", text.encode(coding))
    assert (urls, captions, notes) == ([row["url"] for row in rows], CAPTIONS, [])


def test_quotes_are_read_as_they_are_told_to_be(tmp_path: Path) -> None:
    quoted = b'url\tcaption\nhttp://a\t"say ""hi"""\n'
    assert frozen(tmp_path, "list.tsv", quoted, list_quotes="yes")[1] == ['say "hi"']
    assert frozen(tmp_path, "list.tsv", quoted)[1] == ['"say ""hi"""']
    assert frozen(tmp_path, "list.csv", b'url,caption\nhttp://a,"b\n', list_quotes="no")[1] == ['"b']
    assert frozen(tmp_path, "list.csv", b'a cat,http://a\n"b, c",http://b\n')[1] == ["a cat", "b, c"]
    renamed = {"url_column": "URL", "caption_column": "TEXT"}
    assert frozen(tmp_path, "list.csv", b"http://a,a cat\n", **renamed)[:2] == (["http://a"], ["a cat"])
    assert frozen(tmp_path, "list.txt", b"http://a\n", url_column="URL")[0] == ["http://a"]


def test_bytes_of_parquet_concern_their_own_row(tmp_path: Path) -> None:
    cells = [b"a cat", b"caf\xe9", None, "猫".encode()]
    urls = [b"http://a/0", b"http://a/1", b"http://a/\xe9", b"http://a/3"]
    for kind in (pa.binary(), pa.string()):
        arrays = [pa.Array.from_buffers(kind, 4, pa.array(one, pa.binary()).buffers()) for one in (urls, cells, cells)]
        table = pa.table(dict(zip(("url", "caption", "note"), arrays, strict=True)))
        pq.write_table(table, tmp_path / "made.parquet")
        data = (tmp_path / "made.parquet").read_bytes()
        read, captions, notes = frozen(tmp_path, "list.parquet", data, save_columns=["note"])
        assert read == ["http://a/0", "http://a/1", "http://a/\ufffd", "http://a/3"]
        assert captions == ["a cat", "caf\ufffd", None, "猫"]
        assert pq.read_table(tmp_path / "dir/urls")["note"].to_pylist() == captions
        assert notes == [f"1 cells of {name} have bytes that are not UTF-8" for name in ("url", "caption", "note")]


def test_of_a_list_of_captions_the_first_text_is_taken_and_nan_is_none(tmp_path: Path) -> None:
    captions = [["", "a cat", "a pet"], [], None, ["a dog"]]
    urls = [f"http://a/{number}" for number in range(4)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), tmp_path / "made.parquet")
    assert frozen(tmp_path, "list.parquet", (tmp_path / "made.parquet").read_bytes())[1] == [
        "a cat",
        None,
        None,
        "a dog",
    ]
    pq.write_table(pa.table({"url": urls, "caption": [float("nan"), None, 1.0, 2.5]}), tmp_path / "made.parquet")
    assert frozen(tmp_path, "list.parquet", (tmp_path / "made.parquet").read_bytes())[1] == [None, None, "1", "2.5"]
    values = [*captions, float("nan"), "NaN", {"en": "a cat"}, "half \ud83d", 7]
    lines = [json.dumps({"url": f"http://a/{n}", "caption": value}) for n, value in enumerate(values)]
    expected = ["a cat", None, None, "a dog", None, "NaN", None, "half \ufffd\ufffd\ufffd", "7"]
    assert frozen(tmp_path, "list.jsonl", "\n".join(lines).encode("utf-8"))[1] == expected
    assert frozen(tmp_path, "list.json", f"[{','.join(lines)}]".encode("utf-16"))[1] == expected


def test_a_list_without_captions_says_which_columns_it_has(tmp_path: Path) -> None:
    [note] = frozen(tmp_path, "list.csv", b"url,TEXT\nhttp://a,a cat\n")[2]
    assert "no captions" in note and "TEXT" in note and "--caption-column" in note
    assert frozen(tmp_path, "list.csv", b"url\nhttp://a\n")[2] == []


def test_numbers_of_two_files_meet_as_doubles(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    for number, values in enumerate(([2**53 + 1], [0.5])):
        table = pa.table({"url": ["http://a"], "n": values})
        pq.write_table(table, tmp_path / f"lists/{number}.parquet")
    config = DownloadConfig(urls=str(tmp_path / "lists"), save_columns=["n"])
    freeze(config, Store(str(tmp_path / "dir")), {})
    assert pq.read_table(tmp_path / "dir/urls")["n"].to_pylist() == [float(2**53), 0.5]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(range(8)), st.booleans(), st.floats(0, 1), st.binary(min_size=1, max_size=8))
def test_a_damaged_list_is_read_or_refused(tmp_path: Path, kind: int, zipped: bool, place: float, noise: bytes) -> None:
    name, data = formats([(f"http://a/{number}", f"caption {number}") for number in range(20)])[kind]
    data = gzip.compress(data) if zipped and kind != 5 else data
    at = int(place * len(data))
    with contextlib.suppress(ClipBatchError):
        urls, _, _ = frozen(
            tmp_path, name + ".gz" * (zipped and kind != 5), data[:at] + noise + data[at + len(noise) :]
        )
        assert urls


def test_another_list_is_refused_where_shards_stand(tmp_path: Path) -> None:
    home, path = Store(str(tmp_path / "dir")), tmp_path / "a.txt"
    path.write_text("http://a/1\n")
    freeze(DownloadConfig(urls=str(path)), home, {})
    path.write_text("http://a/1\nhttp://a/2\n")
    assert freeze(DownloadConfig(urls=str(path)), home, {}).urls == 2
    home.create("images/00000_stats.json", b"{}")
    path.write_text("http://a/3\n")
    with pytest.raises(ConfigError, match="files differ"):
        freeze(DownloadConfig(urls=str(path)), home, {})
