"""vLLM's processor cache: an image counts as cached in the engine once it was sent, not once it was processed.

The sender cache in the front end lists the items in the engine's receiver cache. Stock vLLM adds an item when it is
processed. If its request is then cancelled, or rejected by a later check, the engine never gets the data, and the next
request with that image fails. Here an entry that was not sent yet returns the data, as long as a request has a
reference to it. After that the entry is invalidated.
"""

from typing import Any
from weakref import ref

from eadaprune_vllm.patching import wrap

_CACHE = "vllm.multimodal.cache.lru:LruKeyReplicatedSenderCache"
_CLIENTS = "vllm.v1.engine.core_client"
_ATTRIBUTE = "eadaprune_unsent"
_LOST = "after a cancelled or rejected request, the next one with its image may fail once, as on stock vLLM"


def _nothing() -> None: ...


class UnsentItems:
    """The items of a cache that were not sent. Requests are processed on one thread and sent from another.

    Attributes:
        data: by hash, weak references to the data.
        kept_alive: by hash, strong references for the request being processed, which relies on these entries.
        is_committed: whether that request has references of its own by now.
    """

    def __init__(self) -> None:
        self.data: dict[str, ref[Any]] = {}
        self.kept_alive: dict[str, Any] = {}
        self.is_committed = False

    def is_orphaned(self, mm_hash: str) -> bool:
        """Whether neither the engine nor any request has the data. Otherwise keeps it alive for the current request."""
        if self.is_committed:
            self.kept_alive, self.is_committed = {}, False
        reference = self.data.get(mm_hash)  # another thread may send it at any moment
        if reference is None:
            return False
        self.kept_alive[mm_hash] = data = reference()
        return data is None

    def add(self, mm_hash: str, item: Any) -> None:
        self.data[mm_hash] = ref(item)
        setattr(item, _ATTRIBUTE, (self, mm_hash))

    def retain(self, hashes: Any) -> None:
        """Forget all items but these."""
        for mm_hash in [other for other in list(self.data) if other not in hashes]:
            self.data.pop(mm_hash, None)


def unsent_items(cache: Any) -> UnsentItems:
    """The unsent items of a cache."""
    found: UnsentItems = vars(cache).setdefault(_ATTRIBUTE, UnsentItems())
    return found


def mark_sent(features: Any) -> None:
    """Mark the items of a request as sent. It must be sent right after this, so that requests with only the hash of an
    item follow its data."""
    sent = set()
    for feature in features or ():
        unsent, mm_hash = getattr(feature.data, _ATTRIBUTE, (None, None))
        if mm_hash in sent:  # the request has the data already
            feature.data = None
        elif unsent:
            sent.add(mm_hash)
            unsent.data.pop(mm_hash, None)


def install() -> None:
    """The cache is only patched if all of vLLM's engine clients can be."""
    if all(wrap(f"{_CLIENTS}:{path}", optional=_LOST)(add) for path, add in _ADD_REQUEST.items()):
        wrap(f"{_CACHE}.get_and_update_item", optional=_LOST)(get_and_update_item)
        wrap(f"{_CACHE}.is_cached_item", optional=_LOST)(is_cached_item)


async def _add_request_async(original: Any, client: Any, request: Any) -> None:
    mark_sent(request.mm_features)
    await original(client, request)


def _add_request(original: Any, client: Any, request: Any) -> None:
    mark_sent(request.mm_features)
    original(client, request)


def get_and_update_item(original: Any, cache: Any, mm_item: Any, mm_hash: str) -> Any:
    unsent, was_cached = unsent_items(cache), mm_hash in cache._cache
    unsent.is_committed = True
    item, updates = original(cache, mm_item, mm_hash)
    if was_cached:
        data = unsent.data.get(mm_hash, _nothing)()
        return data if data is not None else item, updates
    if mm_hash in cache._cache:  # not if the item is larger than the cache
        unsent.add(mm_hash, item)
    if len(unsent.data) > 2 * len(cache._cache):
        unsent.retain(cache._cache)
    return item, updates


def is_cached_item(original: Any, cache: Any, mm_hash: str) -> Any:
    if unsent_items(cache).is_orphaned(mm_hash):
        cache.invalidate(mm_hash)
    return original(cache, mm_hash)


_ADD_REQUEST = {
    "AsyncMPClient.add_request_async": _add_request_async,
    "DPAsyncMPClient.add_request_async": _add_request_async,
    "SyncMPClient.add_request": _add_request,
    "InprocClient.add_request": _add_request,
}
