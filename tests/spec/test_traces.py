"""Traces of every format, read as they are meant; and files that are wrong, hostile or none."""

import hashlib
import json
import math
import random
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.workload import traces
from powerband.spec.workload.lengths import MAX_TOKENS
from powerband.spec.workload.traces import MOONCAKE_BLOCK, read_trace

REAL = Path("/work/shared/data/traces")

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.4799600,3180,8
2023-11-16 18:18:03.9799600,1,0
"""
MOONCAKE = """{"timestamp": 2000, "input_length": 1200, "output_length": 52, "hash_ids": [0, 7, 9]}
{"timestamp": 3500, "input_length": 1536, "output_length": 26, "hash_ids": [0, 7, 12]}
"""
SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "Why is the sky blue?"},
            {"from": "gpt", "value": "Air scatters blue light more."},
            {"from": "human", "value": "And red?"},
            {"from": "gpt", "value": "Less."},
            {"from": "human", "value": "Thanks"},
        ],
    },
    {"id": "b", "conversations": [{"from": "gpt", "value": "Continued"}, {"from": "human", "value": "Go on"}]},
    {"id": "c", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    {"id": "d", "conversations": []},
]
RECORD = {
    "index": 0,
    "scheduled_s": 0.5,
    "asked_tokens": 20,
    "segments": [{"key": "0/prefix 0", "tokens": 64}, {"key": "0/0", "tokens": 9, "text": "Said\u2028so"}],
    "conversation": 0,
    "point": 0,
}


def written(tmp_path, content, name="trace"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*values):
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_azure_has_times_and_lengths_and_nothing_shared(tmp_path):
    trace = read_trace(written(tmp_path, AZURE, "azure.csv"))
    assert [r.time_s for r in trace.requests] == [0, 0.5, 60]
    assert [(r.segments[0].tokens, r.output_tokens) for r in trace.requests] == [(4808, 10), (3180, 8), (1, 1)]
    assert len({r.segments[0].key for r in trace.requests}) == 3
    assert trace.source == {
        "file": "azure.csv",
        "format": "azure",
        "sha256": hashlib.sha256(AZURE.encode()).hexdigest(),
    }


def test_azure_of_2024_has_a_zone_and_sometimes_no_fraction(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.500000+00:00,5,6\n2024-05-10 00:00:01+00:00,7,8\n2024-05-10 02:00:02+02:00,9,9\n"
    )
    assert [r.time_s for r in read_trace(written(tmp_path, text)).requests] == [0, 0.5, 1.5]


def test_mooncake_shares_blocks_by_their_ids(tmp_path):
    trace = read_trace(written(tmp_path, MOONCAKE))
    told = [[(s.key, s.tokens) for s in r.segments] for r in trace.requests]
    assert told == [
        [("mooncake/0", 512), ("mooncake/7", 512), ("mooncake/9", 176)],
        [("mooncake/0", 512), ("mooncake/7", 512), ("mooncake/12", 512)],
    ]
    assert [r.time_s for r in trace.requests] == [0, 1.5]
    assert [r.output_tokens for r in trace.requests] == [52, 26]


def test_mooncake_beyond_its_ids_is_the_requests_own(tmp_path):
    text = lines({"input_length": 600, "output_length": 1}, {"input_length": 600, "output_length": 1, "hash_ids": [3]})
    first, second = read_trace(written(tmp_path, text)).requests
    assert [(s.key, s.tokens) for s in first.segments] == [("mooncake/line 1", 600)]
    assert [(s.key, s.tokens) for s in second.segments] == [("mooncake/3", 512), ("mooncake/line 2", 88)]


def test_sharegpt_has_texts_and_conversations_and_no_times(tmp_path):
    trace = read_trace(written(tmp_path, json.dumps(SHAREGPT)), count_tokens=lambda text: len(text.split()))
    told = [(r.conversation, r.segments[0].text, r.segments[0].tokens, r.output_tokens) for r in trace.requests]
    assert told == [
        ("1", "Why is the sky blue?", 5, 5),
        ("1", "And red?", 2, 1),
        ("3", "Hi", 1, 1),
    ]
    assert {r.time_s for r in trace.requests} == {0}


def test_without_a_tokenizer_four_bytes_are_a_token(tmp_path):
    text = json.dumps([{"conversations": [{"from": "human", "value": "x" * 400}, {"from": "gpt", "value": "é" * 100}]}])
    (request,) = read_trace(written(tmp_path, text)).requests
    assert (request.segments[0].tokens, request.output_tokens) == (100, 50)


def test_records_of_a_run_are_the_same_prompts_at_the_same_times(tmp_path):
    later = {**RECORD, "scheduled_s": 2.0, "segments": [{"key": "0/1", "tokens": 3}], "conversation": None}
    trace = read_trace(written(tmp_path, lines(RECORD, later)))
    assert [(r.time_s, r.output_tokens, r.conversation) for r in trace.requests] == [(0, 20, "0"), (1.5, 20, None)]
    assert [(s.key, s.tokens, s.text) for s in trace.requests[0].segments] == [
        ("0/prefix 0", 64, None),
        ("0/0", 9, "Said\u2028so"),  # an end of line to Python's splitlines, not to JSON
    ]


def test_a_text_with_half_a_character_can_still_be_sent(tmp_path):
    text = json.dumps(
        [{"conversations": [{"from": "human", "value": "ok \ud83d"}, {"from": "gpt", "value": "\ud83d"}]}]
    )
    (request,) = read_trace(written(tmp_path, text)).requests
    assert request.segments[0].text == "ok ?"


def test_the_same_conversation_twice_is_one(tmp_path):
    rows = [{**RECORD, "scheduled_s": time_s, "conversation": talk} for time_s, talk in ((1, 5), (2, 6), (3, 5))]
    assert [r.conversation for r in read_trace(written(tmp_path, lines(*rows))).requests] == ["5", "6", "5"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text + "\n\n",
        lambda text: "\n" + text,
        lambda text: text.rstrip("\n"),
    ],
    ids=["Windows", "byte-order mark", "empty lines at the end", "empty line at the start", "no end of line"],
)
@pytest.mark.parametrize("content", [AZURE, MOONCAKE, lines(RECORD)], ids=["azure", "mooncake", "records"])
def test_ends_of_lines_and_marks_do_not_matter(tmp_path, content, change):
    as_it_is, changed = (read_trace(written(tmp_path, text)) for text in (content, change(content)))
    assert [(r.time_s, [s.tokens for s in r.segments]) for r in as_it_is.requests] == [
        (r.time_s, [s.tokens for s in r.segments]) for r in changed.requests
    ]


@given(order=st.permutations(range(4)))
def test_requests_come_in_the_order_of_their_times(tmp_path_factory, order):
    """From the first one on, wherever in the file it is; times before it are none."""
    rows = [f"2023-11-16 18:17:0{n}.0,{n + 1},1" for n in order]
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows)
    trace = read_trace(written(tmp_path_factory.getbasetemp(), text))
    assert [(r.time_s, r.segments[0].tokens) for r in trace.requests] == [(n, n + 1) for n in range(4)]


# --- sharing ---------------------------------------------------------------------------------------------------------


def shared_tokens(first, second):
    """How many tokens two prompts begin with alike: segments of one key do as far as the shorter goes."""
    total = 0
    for one, other in zip(first.segments, second.segments, strict=False):
        if one.key != other.key:
            break
        total += min(one.tokens, other.tokens)
        if one.tokens != other.tokens:
            break
    return total


def shared_by_ids(first, second):
    common = 0
    for one, other in zip(first["hash_ids"], second["hash_ids"], strict=False):
        if one != other:
            break
        common += 1
    return min(common * MOONCAKE_BLOCK, first["input_length"], second["input_length"])


def mooncake_line(ids_and_last):
    ids, last = ids_and_last
    tokens = (len(ids) - 1) * MOONCAKE_BLOCK + last
    return {"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": ids}


hash_ids = st.lists(st.integers(0, 2), min_size=1, max_size=5)
mooncake_lines = st.lists(
    st.tuples(hash_ids, st.integers(1, MOONCAKE_BLOCK)).map(mooncake_line), min_size=2, max_size=6
)


@given(rows=mooncake_lines)
def test_mooncake_prompts_share_exactly_as_their_ids_do(tmp_path_factory, rows):
    requests = read_trace(written(tmp_path_factory.getbasetemp(), lines(*rows))).requests
    assert [sum(s.tokens for s in r.segments) for r in requests] == [row["input_length"] for row in rows]
    for i, j in pairwise(range(len(rows))):
        assert shared_tokens(requests[i], requests[j]) == shared_by_ids(rows[i], rows[j])


def test_the_mooncake_trace_shares_exactly_as_its_ids_do():
    path = REAL / "mooncake_conversation.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    requests = read_trace(path).requests
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: row["timestamp"])
    assert len(requests) == len(rows) == 12_031
    assert [sum(s.tokens for s in r.segments) for r in requests] == [row["input_length"] for row in rows]
    generator = random.Random(0)
    for _ in range(5000):
        i, j = generator.randrange(len(rows)), generator.randrange(len(rows))
        assert shared_tokens(requests[i], requests[j]) == shared_by_ids(rows[i], rows[j])


# --- what is wrong, hostile or no trace ------------------------------------------------------------------------------

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
TIME = "2023-11-16 18:17:03"
DEEP = "[" * 100_000

WRONG = {
    "empty": (b"", "its format was not recognised"),
    "binary": (bytes(range(256)), "it is not text in UTF-8"),
    "UTF-16": (AZURE.encode("utf-16"), "it is not text in UTF-8"),
    "zeros": (b"\0" * 1000, "its format was not recognised"),
    "prose": (b"Once upon a time", "its format was not recognised"),
    "azure without rows": (HEADER, "has no requests"),
    "azure without a column": ("TIMESTAMP,ContextTokens\n2023-11-16,5", "line 2 has no 'GeneratedTokens'"),
    "azure, short row": (HEADER + f"{TIME},5", "line 2: "),
    "azure, empty row": (HEADER + ",,", "line 2: "),
    "azure, no time": (HEADER + "yesterday,5,6", "line 2: Invalid isoformat string: 'yesterday'"),
    "azure, long nonsense": (HEADER + "x" * 100_000 + ",5,6", "line 2: "),
    "azure, longer nonsense": (HEADER + "x" * 1_000_000 + ",5,6", "field larger than field limit"),
    "azure, no number": (HEADER + f"{TIME},many,6", "line 2: invalid literal for int()"),
    "azure, half a token": (HEADER + f"{TIME},5.5,6", "line 2: invalid literal for int()"),
    "azure, negative": (HEADER + f"{TIME},-5,6", "line 2: -5 tokens; there may be 0 to"),
    "azure, huge": (HEADER + f"{TIME},{'9' * 5000},6", "line 2: "),
    "azure, second row": (HEADER + f"{TIME},5,6\n{TIME},5,x", "line 3: "),
    "mooncake, broken": (lines(ROW) + "\n{", "line 2: "),
    "mooncake, no object": (lines(ROW) + "\n5", "line 2: it is not a JSON object"),
    "mooncake, missing": (lines({"input_length": 5}), "line 1 has no 'output_length'"),
    "mooncake, NaN": (lines({**ROW, "timestamp": math.nan}), "line 1: the time nan"),
    "mooncake, Infinity": (lines({**ROW, "timestamp": math.inf}), "line 1: the time inf"),
    "mooncake, before the start": (lines({**ROW, "timestamp": -1}), "line 1: the time -1"),
    "mooncake, huge time": (lines({**ROW, "timestamp": 10**400}), "line 1: a number has 401 digits"),
    "mooncake, time as text": (lines({**ROW, "timestamp": "5"}), "line 1: the time '5'"),
    "mooncake, NaN tokens": (lines({**ROW, "input_length": math.nan}), "line 1: nan tokens"),
    "mooncake, many tokens": (lines({**ROW, "input_length": MAX_TOKENS + 1}), "line 1: 16777217 tokens"),
    "mooncake, huge tokens": (lines({**ROW, "output_length": 10**400}), "line 1: a number has 401 digits"),
    "mooncake, half a token": (lines({**ROW, "output_length": 1.5}), "line 1: 1.5 tokens"),
    "mooncake, true tokens": (lines({**ROW, "output_length": True}), "line 1: True tokens"),
    "mooncake, ids are null": (lines({**ROW, "hash_ids": None}), "line 1: hash_ids are not a list"),
    "mooncake, ids are text": (lines({**ROW, "hash_ids": ["a", "b"]}), "line 1: 'a' among the hash_ids"),
    "mooncake, ids are lists": (lines({**ROW, "hash_ids": [[1], 2]}), "line 1: [1] among the hash_ids"),
    # Alibaba's Bailian traces look alike, with blocks of 16 tokens and times in seconds.
    "mooncake, smaller blocks": (lines({**ROW, "hash_ids": list(range(38))}), "for each 512 of 600 tokens"),
    "mooncake, deep": ('{"input_length": ' + DEEP, "deeper than 64 levels"),
    "sharegpt, deep": (DEEP, "deeper than 64 levels"),
    "sharegpt, broken": ("[{", "read as sharegpt, "),
    "sharegpt, numbers": ("[1, 2]", "conversation 1: "),
    "sharegpt, empty": ("[]", "has no requests"),
    "sharegpt, turns are text": ('[{"conversations": "hello"}]', "conversation 1: "),
    "sharegpt, no value": (
        '[{"conversations": [{"from": "human"}, {"from": "gpt"}]}]',
        "conversation 1 has no 'value'",
    ),
    "sharegpt, number": (
        json.dumps([{"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "x"}]}]),
        "conversation 1: 5 is not a text",
    ),
    "records, two loads": (lines(RECORD, {**RECORD, "point": 1}), "line 2: a second load begins"),
    "records, no segments": (lines({**RECORD, "segments": []}), "line 1: it has no segments"),
    "records, text is a number": (
        lines({**RECORD, "segments": [{"key": "a", "tokens": 5, "text": 7}]}),
        "7 is not a text",
    ),
    "records, key is a number": (lines({**RECORD, "segments": [{"key": 5, "tokens": 5}]}), "5 is not a text"),
    "records, segments are text": (lines({**RECORD, "segments": "abc"}), "line 1: "),
}


@pytest.mark.parametrize(("content", "why"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_with_its_place(tmp_path, content, why):
    with pytest.raises(UsageError) as caught:
        read_trace(written(tmp_path, content))
    assert why in caught.value.message
    assert caught.value.param == "trace"
    assert len(caught.value.message) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("format", traces.FORMATS)
@given(content=st.binary(max_size=200))
def test_no_bytes_make_a_traceback(tmp_path_factory, format, content):
    path = written(tmp_path_factory.getbasetemp(), content)
    with suppress(UsageError):
        assert read_trace(path, format=format).requests


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["timestamp", "input_length", "output_length", "hash_ids", "segments", "key", "tokens"]),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("format", ["mooncake", "sharegpt", "records"])
@given(value=json_values)
def test_no_json_makes_a_traceback(tmp_path_factory, format, value):
    path = written(tmp_path_factory.getbasetemp(), json.dumps(value))
    with suppress(UsageError):
        assert read_trace(path, format=format).requests


def test_an_unknown_format_is_told_with_those_there_are(tmp_path):
    with pytest.raises(UsageError, match=r"unknown format 'burst'\. Formats: azure, mooncake, sharegpt, records"):
        read_trace(written(tmp_path, AZURE), format="burst")


@pytest.mark.parametrize("name", ["", "missing.csv"])
def test_what_cannot_be_read_is_a_fault_of_the_machine(tmp_path, name):
    with pytest.raises(EnvironmentFault, match=r"Cannot read .*: (Is a directory|No such file or directory)\."):
        read_trace(tmp_path / name)


def test_a_file_without_an_end_is_not_read_without_an_end(monkeypatch):
    monkeypatch.setattr(traces, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(UsageError, match=r"/dev/zero is larger than 1 MiB\. Cut it\."):
        read_trace(Path("/dev/zero"))


@pytest.mark.parametrize(
    "content",
    [
        MOONCAKE.replace("3500", "1e300"),
        MOONCAKE.replace("3500", str(367 * 86_400_000)),
        AZURE.replace("2023-11-16 18:18", "9999-11-16 18:18"),
    ],
)
def test_a_trace_of_more_than_a_year_is_refused(tmp_path, content):
    with pytest.raises(UsageError, match="days after its first; the limit is 366"):
        read_trace(written(tmp_path, content))
