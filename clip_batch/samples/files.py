"""Folders of images with captions and JSON beside them: every image is a sample of its own.

A sample's key is the path below the folder without its last extension. File names in the wild carry dots,
so unlike in a tar the first dot does not end the key. Where that key would be another image's too, it is the whole
path: cat.jpg and cat.png are two samples, not two views of one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from clip_batch.errors import InputError, one_line, some
from clip_batch.samples import listings
from clip_batch.samples.kinds import picture
from clip_batch.samples.listings import Listing, Version
from clip_batch.storage.names import name_text
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import local_etag
from clip_batch.storage.tree import Say, Tree, list_tree, silent
from clip_batch.types import IMAGE_EXTENSIONS, Failure, Item, Plan, Sample, Shard, Slice
from clip_batch.types import extension as extension_of


class Folder(NamedTuple):
    """What is in a folder and below it.

    - `samples`: its samples.
    - `passed_over`: the number of files that are part of none, by extension.
    - `unreadable`: folders that cannot be listed, and why.
    - `versions`: the version of each file that is part of a sample, by its name; {} where it was not asked for.
    """

    samples: Listing
    passed_over: Counter[str]
    unreadable: dict[str, str]
    versions: dict[str, Version]


def read_files(piece: Slice, plan: Plan, options: dict[str, Any] | None = None) -> Iterator[Item]:
    """Read the samples [start, stop) of a folder's sorted listing; see `clip_batch.samples.read_slice`."""
    if listings.is_frozen(piece.shard):
        samples = listings.read(plan.listings, piece.shard.etag or "", options, piece.start, piece.stop)
    else:  # planned by a version that froze none
        samples = _planned_listing(piece.shard, plan, options)[piece.start : piece.stop]
    yield from read_samples(samples, piece.shard.url, plan, options)


def read_samples(samples: Listing, folder: str, plan: Plan, options: dict[str, Any] | None = None) -> Iterator[Item]:
    """Read samples of a folder, of which a plan says which files are images and captions."""
    url = name_text(folder)
    store = Store(folder, options)
    for key, names in samples:
        key = name_text(key)
        image = _first(names, plan.image_extensions) if "image" in plan.modalities else None
        if image is None and "image" in plan.modalities:
            extensions = ", ".join(plan.image_extensions)
            yield Failure(key, url, None, "missing_image", f"no file of this key ends in {extensions}")
            continue
        caption = _first(names, plan.caption_extensions)
        data: list[bytes | None] = []
        name: str | None = None
        try:
            for name in (image, caption, names.get("json")):
                data.append(store.read(name) if name else None)
        except OSError as error:
            if not _concerns_file(store, error):
                raise
            message = f"{name} cannot be read ({error.strerror or one_line(error)}): mend it, and {_RETRY}"
            yield Failure(key, url, None, "unreadable_file", name_text(message))
            continue
        yield Sample(key, url, None, None, data[0], data[1], data[2])


_RETRY = "run clip-batch repair --retry-failed unreadable_file"

_OF_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EIO),
}
"""Numbers of local errors that are of one file; others are of the machine, such as too many open files."""


def _concerns_file(store: Store, error: OSError) -> bool:
    """Whether an error is of the file that was read, not of its store or its disk, which other attempts may find well.

    A remote store answers for a file only by having none of that name: it refuses one as it refuses all once
    credentials have ended. A local disk must still be there.
    """
    if not store.local:
        return isinstance(error, FileNotFoundError)
    return error.errno in _OF_FILE and bool(store.list(""))


_USUAL = ("jpg", "JPG", "jpeg", "png", "webp")
"""Extensions that are tried before a folder is listed."""


def read_picture(store: Store, key: str) -> bytes | None:
    """The picture of a key in a folder: the file of that name, or of that name and an extension; None without one.

    Extensions of images come first, in any case. Files of others are taken by their first bytes. OSError: the store or
    the disk refuses it.
    """
    if ".." in key.split("/"):
        return None
    whole = key.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
    for name in [key] if whole else [f"{key}.{extension}" for extension in _USUAL]:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            return store.read(name)
    folder, slash, base = key.rpartition("/")
    names = [name for name in store.list(folder) if name == base or name.rpartition(".")[0] == base]
    known = {name: extension_of(name) in IMAGE_EXTENSIONS for name in names}
    for name in sorted(names, key=lambda name: not known[name]):
        if known[name] or extension_of(name) not in ("txt", "json"):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                data = store.read(folder + slash + name)
                if known[name] or picture(data):
                    return data
    return None


def list_samples(
    url: str,
    image_extensions: Sequence[str],
    caption_extensions: Sequence[str],
    options: dict[str, Any] | None = None,
    say: Say = silent,
    versions: bool = False,
) -> Folder:
    """Every sample of a folder, and what is part of none. InputError if there is no such folder.

    `versions` looks at each file, which takes a local disk some microseconds and a network disk a request.
    """
    url = absolute(url).rstrip("/")
    tree = list_tree(url, options, say)
    if not (tree.entries or is_local(url)):
        raise InputError(f"no files in {url}: check the URL")
    names = [entry.url[len(url) + 1 :] for entry in tree.entries]
    samples, unused = pair_files(names, image_extensions, caption_extensions)
    passed_over = tree.passed_over + Counter(name_text(extension_of(name)) for name in unused)
    return Folder(samples, passed_over, tree.unreadable, _versions(url, tree, unused) if versions else {})


def _versions(url: str, tree: Tree, unused: Iterable[str]) -> dict[str, Version]:
    """The version of each file of a tree that is used, by its name below `url`."""
    start, left = len(url) + 1, set(unused)
    entries = [entry for entry in tree.entries if entry.url[start:] not in left]
    if is_local(url):
        paths = [entry.url for entry in entries]
        chunks = [paths[at : at + _LOOKS] for at in range(0, len(paths), _LOOKS)]
        with ThreadPoolExecutor(_LOOKERS) as pool:
            found = chain.from_iterable(pool.map(lambda chunk: [_local_version(path) for path in chunk], chunks))
            return {path[start:]: version for path, version in zip(paths, found, strict=True)}
    return {entry.url[start:]: (entry.size, entry.etag) for entry in entries}


_LOOKERS, _LOOKS = 16, 1000
"""Threads that look at local files, as a network disk answers many at once, and the files that one is given."""


def _local_version(path: str) -> Version:
    try:
        status = os.stat(path)
    except OSError:  # it has gone since it was listed; whoever reads it says so
        return None, None
    return status.st_size, local_etag(status)


def pair_files(
    names: Iterable[str], image_extensions: Sequence[str], caption_extensions: Sequence[str]
) -> tuple[Listing, list[str]]:
    """The samples of a folder's files, which are given by their sorted names, and the files that are part of none.

    A caption or JSON belongs to the image of which it has the full name ("cat.jpg.txt"), else to every image of its
    stem. One without any image is a sample without image, but not img2dataset's NAME_stats.json. Keys are unique.

    >>> pair_files(["a.JPG", "a.jpg", "a.jpg.txt", "a.txt", "b.jpg", "b.md", "c.txt"], ["jpg"], ["txt"])[0][1:]
    [('a.jpg', {'jpg': 'a.jpg', 'txt': 'a.jpg.txt'}), ('b', {'jpg': 'b.jpg'}), ('c', {'txt': 'c.txt'})]
    """
    images: dict[str, tuple[str, str]] = {}
    beside: dict[str, dict[str, str]] = {}
    unused: set[str] = set()
    for name in names:
        stem, _, extension = name.rpartition(".")
        extension = extension.lower()
        if stem and extension in image_extensions:
            images[name] = stem, extension
        elif stem and (extension in caption_extensions or extension == "json"):
            beside.setdefault(stem, {}).setdefault(extension, name)
            unused.add(name)
        else:
            unused.add(name)
    samples: Listing = []
    of_stem = Counter(stem for stem, _ in images.values())
    for name, (stem, extension) in images.items():
        files = {extension: name}
        for wanted in (caption_extensions, ("json",)):
            sources = (beside.get(name, {}), beside.get(stem, {}))
            if found := next((file for source in sources if (file := _first(source, wanted))), None):
                files[found.rpartition(".")[2].lower()] = found
        unused.difference_update(files.values())
        key = name if of_stem[stem] > 1 or stem in images else stem
        samples.append((key, dict(sorted(files.items(), key=itemgetter(1)))))
    for stem, files in beside.items():
        if not of_stem[stem] and stem not in images and not (stem.endswith("_stats") and list(files) == ["json"]):
            unused.difference_update(files.values())
            samples.append((stem, files))
    return sorted(samples), sorted(unused)


def listing_digest(samples: Listing) -> str:
    """The version of a folder, its Shard's `etag`: a digest of the names of its files."""
    return hashlib.sha256(repr(samples).encode()).hexdigest()[:16]


_last: tuple[object, Listing] | None = None
"""The listing that was used last, and what it is of."""


def _planned_listing(folder: Shard, plan: Plan, options: dict[str, Any] | None) -> Listing:
    """The listing that a folder was planned with. InputError: the names of its files have changed since.

    Slices are ranges of the listing. The last one stays in memory, so that a process walks a folder once, not once
    a slice.
    """
    global _last
    what = folder, plan.image_extensions, plan.caption_extensions, repr(options)
    if (last := _last) and last[0] == what:
        return last[1]
    listed = list_samples(folder.url, plan.image_extensions, plan.caption_extensions, options)
    samples, unreadable = listed.samples, listed.unreadable
    also = f" ({some(list(unreadable))} cannot be listed)" if unreadable else ""
    if folder.samples is not None and len(samples) != folder.samples:
        raise InputError(f"{folder.url} has {len(samples)} samples, planned were {folder.samples}{also}: plan again")
    if folder.etag is not None:  # without it nothing tells whether the folder is still the planned one
        if listing_digest(samples) != folder.etag:
            raise InputError(f"{folder.url} has files of other names than were planned{also}: plan again")
        _last = what, samples
    return samples


def _first(names: dict[str, str], extensions: Sequence[str]) -> str | None:
    return next((names[extension] for extension in extensions if extension in names), None)
