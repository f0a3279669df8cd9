"""The tables of the account database. Times are seconds since 1970 (UTC); structured values are JSON."""

from __future__ import annotations

VERSION = 4

# A trigger adds every inserted usage row to the daily sums, in one transaction: a row that comes twice counts once, and
# retention may delete rows without changing the spend. A row of `usage` is one request, or the sum of several.
# estimated: how many of them have tokens that no replica counted. reasoning_tokens: of the output, as far as replicas
# count them.
SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, prefix TEXT NOT NULL, name TEXT NOT NULL, scopes TEXT NOT NULL,
    limits TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
);
CREATE TABLE IF NOT EXISTS usage (
    id INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, ended_at REAL NOT NULL, key_id TEXT NOT NULL,
    model TEXT NOT NULL, endpoint TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL, queue_s REAL NOT NULL, ttft_s REAL, e2e_s REAL, status INTEGER NOT NULL,
    outcome TEXT NOT NULL, error TEXT NOT NULL, replica TEXT NOT NULL, cost_usd REAL NOT NULL,
    requests INTEGER NOT NULL DEFAULT 1, estimated INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS usage_by_time ON usage (ended_at);
CREATE TABLE IF NOT EXISTS daily (
    day TEXT NOT NULL, key_id TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL, errors INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    cost_usd REAL NOT NULL, refused INTEGER NOT NULL DEFAULT 0, estimated INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (day, key_id, model)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS usage_to_daily AFTER INSERT ON usage BEGIN
    INSERT INTO daily (
        day, key_id, model, requests, errors, refused, estimated, prompt_tokens, cached_tokens, output_tokens,
        reasoning_tokens, cost_usd
    ) VALUES (
        date(NEW.ended_at, 'unixepoch'), NEW.key_id, NEW.model, NEW.requests,
        NEW.requests * (NEW.outcome IN ('error', 'timed_out')), NEW.requests * (NEW.outcome = 'refused'),
        NEW.estimated,
        NEW.prompt_tokens, NEW.cached_tokens, NEW.output_tokens, NEW.reasoning_tokens, NEW.cost_usd
    ) ON CONFLICT (day, key_id, model) DO UPDATE SET
        requests = requests + excluded.requests, errors = errors + excluded.errors,
        refused = refused + excluded.refused, estimated = estimated + excluded.estimated,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens, cached_tokens = cached_tokens + excluded.cached_tokens,
        output_tokens = output_tokens + excluded.output_tokens,
        reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens, cost_usd = cost_usd + excluded.cost_usd;
END;
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, what TEXT NOT NULL,
    hash TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS feedback (
    request_id TEXT PRIMARY KEY, at REAL NOT NULL, key_id TEXT NOT NULL, score REAL NOT NULL, comment TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS feedback_by_time ON feedback (at);
CREATE TABLE IF NOT EXISTS content (
    request_id TEXT PRIMARY KEY, at REAL NOT NULL, key_id TEXT NOT NULL, prompt TEXT NOT NULL, output TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS content_by_time ON content (at);
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, at REAL NOT NULL, key_id TEXT NOT NULL, request_id TEXT NOT NULL, previous_id TEXT,
    redacted INTEGER NOT NULL, input BLOB NOT NULL, response BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_by_time ON responses (at);
CREATE INDEX IF NOT EXISTS responses_by_key ON responses (key_id);
PRAGMA user_version = 4;
"""

# What an older file needs before SCHEMA, by its version; all in one transaction with it.
CHANGES = {
    1: """
ALTER TABLE usage ADD COLUMN requests INTEGER NOT NULL DEFAULT 1;
ALTER TABLE daily ADD COLUMN refused INTEGER NOT NULL DEFAULT 0;
DROP TRIGGER usage_to_daily;
""",
    2: """
ALTER TABLE usage ADD COLUMN estimated INTEGER NOT NULL DEFAULT 0;
ALTER TABLE daily ADD COLUMN estimated INTEGER NOT NULL DEFAULT 0;
DROP TRIGGER IF EXISTS usage_to_daily;
""",
    3: """
ALTER TABLE usage ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE daily ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0;
DROP TRIGGER IF EXISTS usage_to_daily;
""",
}
