"""vLLM's processor cache: an image counts as known to the engine once it was sent there, not once it was processed.

The front end's half of the cache lists what the engine's half holds. Stock vLLM enters an image there as soon as it is
processed; if its request is then cancelled, or refused by a later check, the engine never gets the data, and the next
request with that image fails. Here an entry that was not sent yet hands out the data that was made for it, as long as a
request still has it; after that it is no entry any more.
"""

from typing import Any
from weakref import ref

from eadaprune_vllm.patching import wrap

_CACHE = "vllm.multimodal.cache.lru:LruKeyReplicatedSenderCache"
_CLIENTS = "vllm.v1.engine.core_client"
_ATTRIBUTE = "eadaprune_unsent"
_LOST = "after a request that was cancelled or refused, the next one with its image may fail once, as on stock vLLM"


def _nothing() -> None: ...


class UnsentItems:
    """What a cache has that was not sent. Requests are processed on one thread and sent from another.

    Attributes:
        data: by hash, weak references to it.
        held: what the request being processed was told it need not process.
        merged: whether one was since, so that nothing needs to be held any more.
    """

    def __init__(self) -> None:
        self.data: dict[str, ref[Any]] = {}
        self.held: dict[str, Any] = {}
        self.merged = False

    def is_orphaned(self, mm_hash: str) -> bool:
        """Whether neither the engine nor any request has it. Otherwise it is held until the request has it too."""
        if self.merged:
            self.held, self.merged = {}, False
        reference = self.data.get(mm_hash)  # which may be sent at any moment
        if reference is None:
            return False
        self.held[mm_hash] = data = reference()
        return data is None

    def add(self, mm_hash: str, item: Any) -> None:
        self.data[mm_hash] = ref(item)
        setattr(item, _ATTRIBUTE, (self, mm_hash))

    def forget_all_but(self, known: Any) -> None:
        for mm_hash in [other for other in list(self.data) if other not in known]:
            self.data.pop(mm_hash, None)


def unsent(cache: Any) -> UnsentItems:
    """What was not sent of a cache."""
    found: UnsentItems = vars(cache).setdefault(_ATTRIBUTE, UnsentItems())
    return found


def send(features: Any) -> None:
    """Take the features of a request for sent. Nothing may come between this and the message to the engine, so that
    requests with only the hash of an image follow its data."""
    sent = set()
    for feature in features or ():
        waiting, mm_hash = getattr(feature.data, _ATTRIBUTE, (None, None))
        if mm_hash in sent:  # once in a request is enough
            feature.data = None
        elif waiting:
            sent.add(mm_hash)
            waiting.data.pop(mm_hash, None)


def install() -> None:
    """The caches are left as they are where this vLLM has clients that we do not know."""
    if all(wrap(f"{_CLIENTS}:{path}", optional=_LOST)(add) for path, add in _ADD_REQUEST.items()):
        wrap(f"{_CACHE}.get_and_update_item", optional=_LOST)(get_and_update_item)
        wrap(f"{_CACHE}.is_cached_item", optional=_LOST)(is_cached_item)


async def _add_request_async(original: Any, client: Any, request: Any) -> None:
    send(request.mm_features)
    await original(client, request)


def _add_request(original: Any, client: Any, request: Any) -> None:
    send(request.mm_features)
    original(client, request)


def get_and_update_item(original: Any, cache: Any, mm_item: Any, mm_hash: str) -> Any:
    waiting, was_known = unsent(cache), mm_hash in cache._cache
    waiting.merged = True
    item, updates = original(cache, mm_item, mm_hash)
    if was_known:
        data = waiting.data.get(mm_hash, _nothing)()
        return data if data is not None else item, updates
    if mm_hash in cache._cache:  # it is not too large
        waiting.add(mm_hash, item)
    if len(waiting.data) > 2 * len(cache._cache):
        waiting.forget_all_but(cache._cache)
    return item, updates


def is_cached_item(original: Any, cache: Any, mm_hash: str) -> Any:
    if unsent(cache).is_orphaned(mm_hash):
        cache.invalidate(mm_hash)
    return original(cache, mm_hash)


_ADD_REQUEST = {
    "AsyncMPClient.add_request_async": _add_request_async,
    "DPAsyncMPClient.add_request_async": _add_request_async,
    "SyncMPClient.add_request": _add_request,
    "InprocClient.add_request": _add_request,
}
