-- What is watched, what was noticed, and what is to be told. Several gateways share these tables: each evaluation and
-- each message is claimed by one of them with a conditional update.

-- Up to when what was looked at: `minute` and `quarter`.
CREATE TABLE watch_progress (what TEXT PRIMARY KEY, through_ns INTEGER NOT NULL) STRICT, WITHOUT ROWID;

-- A detector's state, of one series of one rule, as MessagePack.
CREATE TABLE watch_series (
    rule TEXT NOT NULL,
    figure TEXT NOT NULL,
    dimension TEXT NOT NULL,
    member TEXT NOT NULL,
    state BLOB NOT NULL,
    seen_at_ns INTEGER NOT NULL,
    PRIMARY KEY (rule, figure, dimension, member)
) STRICT, WITHOUT ROWID;

-- Of each quarter-hour's answers: how many had a latency target, and how many met it.
CREATE TABLE watch_targets (
    quarter_ns INTEGER NOT NULL,
    feature TEXT NOT NULL,
    aimed INTEGER NOT NULL,
    met INTEGER NOT NULL,
    PRIMARY KEY (quarter_ns, feature)
) STRICT, WITHOUT ROWID;

-- `told`: it was noticed when it happened, and not later in what an older ledger holds: its end is told too.
CREATE TABLE alerts (
    id TEXT PRIMARY KEY,
    rule TEXT NOT NULL,
    kind TEXT NOT NULL,
    figure TEXT NOT NULL,
    dimension TEXT NOT NULL,
    member TEXT NOT NULL,
    title TEXT NOT NULL,
    facts TEXT NOT NULL,
    causes TEXT NOT NULL,
    since_ns INTEGER NOT NULL,
    opened_at_ns INTEGER NOT NULL,
    seen_at_ns INTEGER NOT NULL,
    resolved_at_ns INTEGER,
    told INTEGER NOT NULL
) STRICT;

-- The same thing is open once.
CREATE UNIQUE INDEX alerts_open ON alerts (rule, kind, figure, dimension, member) WHERE resolved_at_ns IS NULL;
CREATE INDEX alerts_opened ON alerts (opened_at_ns, id);

-- What is to be sent to a rule's webhook. Delivered or given up where `done_at_ns` is set.
CREATE TABLE alert_messages (
    id TEXT PRIMARY KEY,
    rule TEXT NOT NULL,
    body TEXT NOT NULL,
    created_at_ns INTEGER NOT NULL,
    due_at_ns INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    done_at_ns INTEGER
) STRICT;

CREATE INDEX alert_messages_due ON alert_messages (due_at_ns) WHERE done_at_ns IS NULL;
