"""Blocks and the prefix cache, by example."""

from __future__ import annotations

import pytest

from powerband.core.kv_cache import KVCacheManager
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest, Request, cache_root, new_request
from powerband.errors import InvalidRequest, PowerbandError
from powerband.spec.kv_layout import KVLayout


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


# ---- sliding windows: one group of layers that see everything, two with a window of 6 positions in blocks of 4

WINDOWS = KVLayout(4, full=1, windowed=2, window=6, step_tokens=8)
HELD_BEFORE = 2  # blocks before a token's own that it sees


def grown(kv: KVCacheManager, r: Request, n: int) -> Request:
    """`r` computes `n` positions, 8 at a time."""
    while n > 0:
        assert kv.allocate(r, min(n, 8)) is not None
        r.num_computed += min(n, 8)
        kv.publish(r)
        n -= 8
    return r


def test_windowed_groups_hold_the_last_blocks_only() -> None:
    kv = KVCacheManager(64, 4, layout=WINDOWS)
    r = grown(kv, live([*range(41)]), 40)
    assert kv.allocate(r, 1) is not None
    pages = [r.blocks[group::3] for group in range(3)]
    assert all(page >= 0 for page in pages[0])
    assert [page < 0 for page in pages[1]] == [page < 0 for page in pages[2]] == [True] * 8 + [False] * 3
    assert kv.usage().num_used == 11 + 2 * (HELD_BEFORE + 1)
    kv.check([r])
    kv.release(r)
    assert kv.usage().num_used == 0


def test_a_prefix_is_found_as_far_as_the_windows_before_its_end_are_there() -> None:
    kv = KVCacheManager(64, 4, layout=WINDOWS)
    tokens = [*range(41)]
    kv.release(grown(kv, live(tokens), 40))
    whole = kv.match(live(tokens)).blocks
    assert len(whole) == 10 * 3
    assert [page >= 0 for page in whole[1::3]] == [False] * 8 + [True] * HELD_BEFORE
    last = whole[9 * 3 + 2]
    kv.pool.forget(last)  # a page of the last block in one of the groups
    assert len(kv.match(live(tokens)).blocks) == 9 * 3
    for page in whole[0::3][5:]:  # the layers that see everything lack the second half
        kv.pool.forget(page)
    assert len(kv.match(live(tokens)).blocks) == 5 * 3


def test_where_all_layers_have_a_window_the_start_of_a_prefix_is_not_needed() -> None:
    kv = KVCacheManager(12, 4, layout=KVLayout(4, full=0, windowed=1, window=6, step_tokens=8))
    tokens = [*range(200)]
    kv.release(grown(kv, live(tokens), 200))
    assert len(kv.match(live([*tokens, 0])).blocks) == 50
    assert kv.max_tokens > 10**9


def test_groups_find_their_own_pages_only() -> None:
    kv = KVCacheManager(64, 4, layout=WINDOWS)
    kv.release(grown(kv, live([*range(9)]), 9))
    match = kv.match(live([*range(9)])).blocks
    assert len(set(match)) == len(match) == 2 * 3


def test_a_prompt_that_waits_fits_beside_what_other_prompts_still_need() -> None:
    kv = KVCacheManager(39, 4, layout=WINDOWS)
    long = live([*range(60)])
    match = kv.match(long)
    assert kv.fits(long, match)  # 15 pages, and 2 * (2 + 2 + 1) while it is computed
    kv.attach(long, match)
    kv.allocate_prompt(long, 8)
    long.num_computed = 8
    assert kv.usage().num_used == 2 * 3
    other = live([9] * 16)
    assert kv.fits(other, kv.match(other))
    assert not kv.fits(other, kv.match(other), [long])
