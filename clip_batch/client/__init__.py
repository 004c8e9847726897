"""The service from Python: Client, AsyncClient, their hits, and FakeService for tests of programs that use them.

with Client("http://127.0.0.1:1234") as client:
    for hit in client.search("a red bicycle", k=20, deduplicate=True):
        print(hit.score, hit.metadata["caption"])
"""

from clip_batch.client.clients import AsyncClient, Client
from clip_batch.client.fake import FakeService
from clip_batch.client.hits import ServiceHits

__all__ = ["AsyncClient", "Client", "FakeService", "ServiceHits"]
