"""The processor cache, on vLLM's own class: what was not sent is not known to the engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import MultiModalKwargsItem

from eadaprune_vllm.patches import sender_cache


class Cache(LruKeyReplicatedSenderCache):  # type: ignore[misc]
    def is_cached_item(self, mm_hash: str) -> bool:
        return bool(sender_cache.is_cached_item(LruKeyReplicatedSenderCache.is_cached_item, self, mm_hash))

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        return sender_cache.get_and_update_item(LruKeyReplicatedSenderCache.get_and_update_item, self, mm_item, mm_hash)

    def process(self, mm_hash: str, nbytes: int = 100) -> Any:
        """What vLLM does with an image: the feature that its request gets."""
        item = None if self.is_cached_item(mm_hash) else (MultiModalKwargsItem.dummy(nbytes), [mm_hash])
        data, updates = self.get_and_update_item(item, mm_hash)
        assert updates == [mm_hash]
        return SimpleNamespace(data=data)


@pytest.fixture
def cache() -> Cache:
    multimodal = SimpleNamespace(mm_processor_cache_gb=10_000 / 2**30)
    return Cache(SimpleNamespace(get_multimodal_config=lambda: multimodal))


def test_sent_items_are_cached(cache: Cache) -> None:
    feature = cache.process("a")
    sender_cache.mark_sent([feature])
    assert cache.process("a").data is None
    del feature
    assert cache.process("a").data is None
    assert cache.is_cached_item("a")


def test_unsent_item_is_returned_with_its_data(cache: Cache) -> None:
    first, second = cache.process("a"), cache.process("a")
    assert second.data is first.data
    del first
    sender_cache.mark_sent([second])
    assert cache.process("a").data is None


def test_item_dropped_before_sending_is_processed_again(cache: Cache) -> None:
    cache.process("a")
    cache.process("b")  # after which nothing is held of the first
    assert not cache.is_cached_item("a")
    sender_cache.mark_sent([cache.process("a")])
    assert cache.process("a").data is None


def test_entry_a_request_relies_on_is_kept_alive(cache: Cache) -> None:
    feature = cache.process("a")
    assert cache.is_cached_item("a")
    del feature  # its request is cancelled while another one with the image is processed
    data, _ = cache.get_and_update_item(None, "a")
    assert data is not None


def test_repeated_image_is_sent_once_per_request(cache: Cache) -> None:
    features = [cache.process(mm_hash) for mm_hash in "abab"]
    assert None not in [feature.data for feature in features]
    sender_cache.mark_sent(features)
    assert [feature.data is None for feature in features] == [False, False, True, True]


def test_dropped_items_leave_no_references(cache: Cache) -> None:
    for number in range(5000):
        cache.process(str(number))
    assert len(cache._cache) <= 100
    assert len(sender_cache.unsent_items(cache).data) <= 2 * 100 + 1


def test_items_larger_than_the_cache_are_not_tracked(cache: Cache) -> None:
    sender_cache.mark_sent([cache.process("a", nbytes=20_000)])
    assert cache.process("a", nbytes=20_000).data is not None
    assert not sender_cache.unsent_items(cache).data
