"""The expert store: a directory of bundles that a tier can read in one aligned read each."""

from offload.store.catalog import StoreInfo, find, list_stores, remove_store
from offload.store.convert import convert
from offload.store.progress import NoProgress, Progress
from offload.store.shards import SHARD_NBYTES
from offload.store.source import BundleSource, ExpertGroup
from offload.store.store import ExpertStore, Location
from offload.store.verify import StoreProblem, verify
from offload.store.writer import conversion_nbytes

__all__ = [
    "SHARD_NBYTES",
    "BundleSource",
    "ExpertGroup",
    "ExpertStore",
    "Location",
    "NoProgress",
    "Progress",
    "StoreInfo",
    "StoreProblem",
    "conversion_nbytes",
    "convert",
    "find",
    "list_stores",
    "remove_store",
    "verify",
]
