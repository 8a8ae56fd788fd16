"""A teacher's maps and logits on disk, for fixed views of every training image: paid for once, used often."""

from .fill import Filler as Filler
from .manifest import Manifest as Manifest
from .records import Layout as Layout
from .shards import Shard as Shard
from .store import Cache as Cache
from .store import megabytes as megabytes
