"""Blocks and the prefix cache, by example."""

from __future__ import annotations

import pytest

from powerband.core.kv_cache import KVCacheManager
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest, Request, cache_root, new_request
from powerband.errors import InvalidRequest, PowerbandError


def live(tokens: list[int], *, tenant: str = "", cache_salt: str = "", **params: int) -> Request:
    source = EngineRequest(
        id="r",
        token_ids=tokens,
        params=SamplingParams(**params),  # type: ignore[arg-type]
        arrival_s=0.0,
        tenant=tenant,
        cache_salt=cache_salt,
    )
    return new_request(source, max_length=1000, epoch=1)


def computed(kv: KVCacheManager, r: Request) -> Request:
    """Give `r` its blocks and publish them, as a step over the whole prompt does."""
    kv.attach(r, kv.match(r))
    n = r.num_missing
    assert kv.allocate(r, n) is not None
    r.num_computed += n
    kv.publish(r)
    return r


def test_blocks_come_back_and_their_content_stays_findable() -> None:
    kv = KVCacheManager(8, 4)
    r = computed(kv, live([*range(10)]))
    assert (kv.usage().num_used, kv.usage().share) == (3, 3 / 8)
    kv.release(r)
    assert (kv.usage().num_used, kv.usage().num_cached) == (0, 2)
    assert len(kv.match(live([*range(10)])).blocks) == 2


def test_a_match_leaves_one_token_to_compute() -> None:
    kv = KVCacheManager(8, 4)
    kv.release(computed(kv, live([*range(8)])))
    assert len(kv.match(live([*range(8)])).blocks) == 1
    assert len(kv.match(live([*range(9)])).blocks) == 2


def test_equal_blocks_behind_different_prefixes_are_different() -> None:
    kv = KVCacheManager(8, 4)
    kv.release(computed(kv, live([1, 1, 1, 1, 7, 7, 7, 7])))
    assert len(kv.match(live([2, 2, 2, 2, 7, 7, 7, 7, 0])).blocks) == 0


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"cache_salt": "s"}])
def test_tenants_and_salts_share_nothing(other: dict[str, str]) -> None:
    kv = KVCacheManager(8, 4)
    kv.release(computed(kv, live([*range(9)])))
    assert kv.match(live([*range(9)], **other)).blocks == []  # type: ignore[arg-type]


def test_a_tenant_cannot_pose_as_another_by_its_salt() -> None:
    assert cache_root("a", "bc") != cache_root("ab", "c")


def test_prompt_logprobs_read_nothing_from_the_cache() -> None:
    kv = KVCacheManager(8, 4)
    kv.release(computed(kv, live([*range(9)])))
    assert kv.match(live([*range(9)], prompt_logprobs=1)).blocks == []


def test_does_not_fit_is_an_answer_and_changes_nothing() -> None:
    kv = KVCacheManager(2, 4)
    r = live([*range(12)])
    assert kv.allocate(r, 12) is None
    assert (r.blocks, kv.usage().num_used) == ([], 0)


def test_never_cached_blocks_are_reused_first_then_the_leaf_of_the_oldest_prefix() -> None:
    kv = KVCacheManager(6, 4)
    old, new = computed(kv, live([1] * 8)), computed(kv, live([2] * 8))
    kv.release(old)
    kv.release(new)
    root = cache_root("", "")
    r = live([3] * 12)
    assert kv.allocate(r, 12) is not None  # two blank blocks, and the second block of `old`
    assert old.block_keys[1] not in kv.pool.block_of
    assert len(kv.match(live([1] * 9)).blocks) == 1
    assert len(kv.match(live([2] * 9)).blocks) == 2
    assert root == kv.pool.parent_of[kv.pool.block_of[new.block_keys[0]]]


def test_the_block_that_leads_to_others_outlives_them_even_if_a_twin_was_first() -> None:
    """Two requests compute the same first block at once; the one whose copy is not findable goes further."""
    kv = KVCacheManager(5, 4)
    first, second = live([1] * 5), live([1] * 4 + [2] * 5)
    for r in (first, second):  # both start before either has published anything
        kv.allocate(r, r.num_missing)
    for r in (first, second):
        r.num_computed = len(r.tokens)
        kv.publish(r)
    kv.release(first)
    kv.release(second)
    kv.check()
    assert kv.pool.take(4) is not None  # three blank ones, and one that is cached: the leaf
    assert len(kv.match(live([1] * 4 + [2] * 5)).blocks) == 1


def test_reset_forgets_everything_also_what_is_in_use() -> None:
    kv = KVCacheManager(8, 4)
    kv.release(computed(kv, live([1] * 9)))
    running = computed(kv, live([2] * 9))
    kv.reset([running])
    assert kv.usage().num_cached == 0
    kv.release(running)
    assert kv.match(live([1] * 9)).blocks == kv.match(live([2] * 9)).blocks == []
    kv.check()


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = KVCacheManager(8, 4, prefix_caching=False)
    kv.release(computed(kv, live([1] * 9)))
    assert kv.match(live([1] * 9)).blocks == []
    assert kv.usage().num_cached == 0


def test_books_that_do_not_balance_are_reported() -> None:
    kv = KVCacheManager(4, 4)
    r = computed(kv, live([1] * 5))
    with pytest.raises(PowerbandError, match="differ from what requests hold"):
        kv.check([])
    kv.release(r)
    with pytest.raises(PowerbandError, match="released more often than held"):
        kv.pool.release(0)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([], "empty prompt"),
        ([1, -1], "token ids from 0"),
        ([1, 2**32], "token ids from 0"),
        (["a"], "token ids from 0"),
    ],
)
def test_a_prompt_that_is_no_list_of_token_ids_is_refused(tokens: list[int], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        live(tokens)
