"""What clip-retrieval wrote, read as if it were ours: an embeddings folder for `merge`, an index for search.

Nothing vouches for such a folder: there are no commits, no sha256 and no encoder's fingerprint. What can
be seen (names, headers, sizes, row counts, norms) is checked, and the rest is flagged as unverified.
"""

from clip_batch.foreign.embeddings import Foreign as Foreign
from clip_batch.foreign.embeddings import is_folder as is_folder
from clip_batch.foreign.embeddings import open_folder as open_folder
from clip_batch.foreign.index import ForeignIndex as ForeignIndex
from clip_batch.foreign.index import is_index as is_index
from clip_batch.foreign.index import open_index as open_index
