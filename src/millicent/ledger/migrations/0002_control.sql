CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    name TEXT,
    scope TEXT NOT NULL CHECK (scope IN ('admin', 'viewer', 'client')),
    secret_sha256 BLOB NOT NULL,
    old_secret_sha256 BLOB,
    old_until_ns INTEGER,
    created_at_ns INTEGER NOT NULL,
    expires_at_ns INTEGER,
    revoked_at_ns INTEGER,
    team TEXT,
    user TEXT,
    feature TEXT,
    tier TEXT,
    models TEXT,
    rates TEXT NOT NULL
) STRICT;

-- Goes up with every change of a key, so that a running server can ask cheaply whether it knows them all.
CREATE TABLE api_keys_version (number INTEGER NOT NULL) STRICT;
INSERT INTO api_keys_version VALUES (0);
CREATE TRIGGER api_keys_added AFTER INSERT ON api_keys BEGIN
    UPDATE api_keys_version SET number = number + 1;
END;
CREATE TRIGGER api_keys_changed AFTER UPDATE ON api_keys BEGIN
    UPDATE api_keys_version SET number = number + 1;
END;
CREATE TRIGGER api_keys_kept BEFORE DELETE ON api_keys BEGIN
    SELECT raise(ABORT, 'keys are never deleted: revoke them');
END;

CREATE TABLE budgets (
    name TEXT PRIMARY KEY,
    limit_nanousd INTEGER NOT NULL CHECK (limit_nanousd >= 0),
    every TEXT NOT NULL CHECK (every IN ('hour', 'day', 'week', 'month', 'once')),
    per TEXT CHECK (per IN ('key', 'user', 'team', 'feature', 'tier', 'run')),
    only_value TEXT CHECK (only_value IS NULL OR per IS NOT NULL),
    hard INTEGER NOT NULL,
    source TEXT NOT NULL
) STRICT;

CREATE INDEX budgets_subject ON budgets (per, only_value);

-- What one receipt holds of one budget, and once it is settled what it spent. Settling happens in the transaction that
-- closes the receipt, so a hold never outlives it and closes once.
CREATE TABLE holds (
    receipt TEXT NOT NULL REFERENCES receipts (id),
    budget TEXT NOT NULL REFERENCES budgets (name) ON DELETE CASCADE,
    subject TEXT NOT NULL,
    period_ns INTEGER NOT NULL,
    held_nanousd INTEGER NOT NULL CHECK (held_nanousd >= 0),
    spent_nanousd INTEGER NOT NULL DEFAULT 0,
    settled INTEGER NOT NULL DEFAULT 0 CHECK (NOT settled OR held_nanousd = 0),
    PRIMARY KEY (receipt, budget)
) STRICT, WITHOUT ROWID;

CREATE INDEX holds_budget ON holds (budget);

-- Sums of holds, kept by the triggers below; `millicent doctor` compares the two.
CREATE TABLE budget_periods (
    budget TEXT NOT NULL REFERENCES budgets (name) ON DELETE CASCADE,
    subject TEXT NOT NULL,
    period_ns INTEGER NOT NULL,
    spent_nanousd INTEGER NOT NULL,
    held_nanousd INTEGER NOT NULL CHECK (held_nanousd >= 0),
    PRIMARY KEY (budget, subject, period_ns)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER holds_added AFTER INSERT ON holds BEGIN
    INSERT INTO budget_periods VALUES (new.budget, new.subject, new.period_ns, new.spent_nanousd, new.held_nanousd)
    ON CONFLICT DO UPDATE SET
        spent_nanousd = spent_nanousd + new.spent_nanousd, held_nanousd = held_nanousd + new.held_nanousd;
END;
CREATE TRIGGER holds_changed AFTER UPDATE ON holds BEGIN
    UPDATE budget_periods SET
        spent_nanousd = spent_nanousd + new.spent_nanousd - old.spent_nanousd,
        held_nanousd = held_nanousd + new.held_nanousd - old.held_nanousd
    WHERE budget = new.budget AND subject = new.subject AND period_ns = new.period_ns;
END;
CREATE TRIGGER holds_settled BEFORE UPDATE ON holds WHEN old.settled AND NOT (new.settled AND new.held_nanousd = 0)
BEGIN
    SELECT raise(ABORT, 'a settled hold never opens again');
END;

-- A line that is added to a closed receipt counts in the budgets of the period in which the request began.
CREATE TRIGGER lines_late AFTER INSERT ON lines
WHEN new.book = 'actual' AND new.amount_nanousd IS NOT NULL
    AND (SELECT status FROM receipts WHERE id = new.receipt) IS NOT NULL
BEGIN
    UPDATE holds SET spent_nanousd = spent_nanousd + new.amount_nanousd WHERE receipt = new.receipt AND settled;
END;

-- Answers kept for callers that may ask again. `answer` is NULL while the first request runs.
CREATE TABLE claims (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    request_sha256 BLOB NOT NULL,
    receipt TEXT NOT NULL REFERENCES receipts (id),
    answer TEXT,
    expires_at_ns INTEGER,
    CHECK ((answer IS NULL) = (expires_at_ns IS NULL)),
    PRIMARY KEY (owner, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX claims_receipt ON claims (receipt);
CREATE INDEX claims_expiry ON claims (expires_at_ns) WHERE expires_at_ns IS NOT NULL;
