"""The options of searching, serving, and databases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from clip_batch.config.fields import Options, documented
from clip_batch.config.values import ANY, Count, Device, HostName, Memory, Range, Seconds, Share, Size, Threads


@documented
@dataclass(frozen=True)
class SearchConfig(Options):
    """Search an index from the shell, in process."""

    k: Count = field(default=10, metadata={"short": "-k"})
    """Largest number of hits."""
    threshold: Annotated[float, ANY] | None = None
    """Lowest score of a hit; `filter` then writes every such row, however many there are. Default: no limit."""
    modality: Literal["image", "text"] = "image"
    """Index to search: the images' or the captions'."""
    effort: Count | None = None
    """Search effort of the index (nprobe or efSearch); default: as tuned by merge."""
    where: str | None = field(default=None, metadata={"again": ", and join conditions by and"})
    """Condition that the metadata of a hit must meet, such as 'license = "cc0" and width > 512'; see docs/search.md."""
    unique: bool = False
    """Leave out near duplicates: of hits that are, take only the best."""
    unique_threshold: Share | None = None
    """The cosine from which two hits are near duplicates, with `unique`; default: 0.94."""
    safe: bool = False
    """Leave out hits that the safety head refuses."""
    nonviolent: bool = False
    """Leave out hits that the violence head refuses."""
    aesthetic: Annotated[float, ANY] | None = None
    """Weight of the aesthetic head in the order of the hits; default: none."""
    columns: list[str] = field(default_factory=list)
    """Metadata columns of the hits; default: all, of which `search` prints key and caption unless --json is given."""
    safety_head: str = ""
    """FILE or URL of weights that judge safety, with #sha256=...&activation=relu&output=sigmoid as they need."""
    violence_head: str = ""
    """FILE or URL of weights that judge violence, written as for `safety_head`."""
    aesthetic_head: str = ""
    """FILE or URL of weights that judge beauty, written as for `safety_head`."""
    device: Device = "auto"
    """Device of the query's encoder: cpu, cuda or cuda:N; auto: a GPU if there is one."""
    model: str = ""
    """Model of the encoder on this machine, if it is not where it was planned. Its weights must match."""
    pretrained: str = ""
    """Pretrained tag, or checkpoint file, of that encoder on this machine."""


@documented
@dataclass(frozen=True)
class ServeConfig(Options):
    """Serve indices over HTTP, with a web page."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine alone."""
    port: Annotated[int, Range(0, 65_535)] = 1234
    """Port to listen on; the default is clip-retrieval's."""
    device: Device = "auto"
    """Device of the queries' encoder: cpu, cuda or cuda:N; auto: a GPU if there is one."""
    model: str = ""
    """Model of the encoder on this machine, if it is not where it was planned. Its weights must match."""
    pretrained: str = ""
    """Pretrained tag, or checkpoint file, of that encoder on this machine."""
    poll: Annotated[float, Range(0, 86_400)] = 5.0
    """Seconds between looks for a new version, which is opened beside the old one and replaces it; 0: never look."""
    token: str = ""
    """Token that clients must send as `Authorization: Bearer TOKEN`. Set it as CLIP_BATCH_TOKEN, not as a flag."""
    allowed_hosts: list[HostName] = field(default_factory=list)
    """Names under which clients reach a service without a token, such as search.example.org; * allows any."""
    cors: list[str] = field(default_factory=list)
    """Origins whose web pages may send requests, such as https://example.org; * allows any."""
    columns: list[str] = field(default_factory=list)
    """Metadata columns in answers; default: all. `image` adds the image itself to /knn-service, in base64."""
    show_paths: bool = False
    """Answer with whole paths and URLs of shards, and in messages; by default with their last names."""
    max_k: Count = 10_000
    """Largest number of hits that a request may ask for."""
    prefilter_rows: int = 20_000_000
    """Largest index, in rows, whose whole metadata is filtered before a search, so that rare matches are found."""
    max_scan: Count = 100_000
    """Largest number of candidates that a request with filters may look through in a larger index."""
    filter_timeout: Seconds = 10.0
    """Seconds that the filters of a request may take; a client that disconnects ends them at once."""
    filter_cache: Size = "64MB"
    """Memory for the rows that met filters before, a bit for each row of the index."""
    max_queries: Count = 16
    """Largest number of queries that a request may mix or embed."""
    max_body: Memory = "20MB"
    """Largest size of a request, and of an image that is fetched."""
    max_pixels: Count = 50_000_000
    """Largest width times height of a query's image."""
    max_pending: Count = 256
    """Largest number of requests in progress or waiting; others are answered 503, to be repeated later."""
    max_connections: Count = 1_000
    """Largest number of connections; of those that wait for a request, the oldest is closed for a new one."""
    header_timeout: Seconds = 10.0
    """Seconds that a connection may take to send the header of a request."""
    body_memory: Memory = "256MB"
    """Memory for the bodies of all requests in progress; those that need more are answered 503."""
    decode_memory: Memory = "512MB"
    """Memory for decoding the images of queries at the same time; those that need more alone are refused."""
    rate: float = 0.0
    """Requests per second that each client address may make; 0: no limit."""
    rate_burst: Count = 50
    """Requests that a client may make at once before `rate` limits it."""
    image_url: bool = False
    """Let requests name an image by its URL, which this machine then fetches, though never from private addresses."""
    image_url_private: bool = False
    """Fetch images from private and loopback addresses too. Every client can then reach them: for tests only."""
    fetch_timeout: Seconds = 10.0
    """Seconds for fetching an image, redirects included."""
    page_images: Literal["off", "direct", "proxy"] = "off"
    """How the page shows images that only have a URL. direct: the browser loads them; proxy: this machine does."""
    thumbnail_cache: Size = "1GB"
    """Disk space for smaller copies of images, below $XDG_CACHE_HOME/clip_batch; 0: they are made at each request."""
    query_batch: Count = 32
    """Largest number of queries that are encoded together."""
    query_wait: Annotated[float, Range(0, 60_000)] = 2.0
    """Milliseconds that a query waits for others to be encoded with."""
    text_cache: Size = "64MB"
    """Memory for the vectors of texts that were queried before."""
    serve_threads: Threads = 0
    """Threads that search and read metadata and images; 0: two per core."""
    aesthetic_head: str = ""
    """FILE or URL of weights that judge beauty, with #sha256=...&activation=relu&output=sigmoid as they need."""
    safety_head: str = ""
    """FILE or URL of weights that judge whether a hit is safe to show, written as for `aesthetic_head`."""
    violence_head: str = ""
    """FILE or URL of weights that judge whether a hit shows violence, written as for `aesthetic_head`."""


@documented
@dataclass(frozen=True)
class DatabaseConfig(Options):
    """Databases that `export` fills, and that `serve` answers from if both are given."""

    milvus: str = ""
    """Database of vectors: http://[user:password@]host:port, or a path FILE.db for milvus-lite."""
    milvus_token: str = ""
    """Milvus's token, or user:password, if it is not in the URL. Set it as CLIP_BATCH_MILVUS_TOKEN, not as a flag."""
    milvus_index: Literal["AUTOINDEX", "FLAT", "IVF_FLAT", "HNSW"] = "AUTOINDEX"
    """Kind of Milvus's own index; FLAT is exact."""
    sql: str = ""
    """Database of metadata: SQLAlchemy's kind://user:password@host/database, or a path of SQLite (.sqlite, .db)."""
    table_prefix: str = "clip_batch"
    """First part of the names of tables and collections, <table_prefix>_<version>."""
