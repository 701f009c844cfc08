-- Times are UTC nanoseconds, money is integer nano-dollars, unit prices and quantities are exact decimals as text.

CREATE TABLE receipts (
    id TEXT PRIMARY KEY,
    gateway TEXT NOT NULL,
    created_at_ns INTEGER NOT NULL,
    checkpointed_at_ns INTEGER,
    settled_at_ns INTEGER,
    status TEXT,
    model TEXT NOT NULL,
    served_model TEXT,
    placement TEXT,
    backend TEXT,
    dialect TEXT NOT NULL,
    stream INTEGER NOT NULL,
    finish_reason TEXT,
    key TEXT,
    team TEXT,
    user TEXT,
    feature TEXT,
    tier TEXT,
    conversation TEXT,
    run TEXT,
    tags TEXT NOT NULL,
    usage TEXT NOT NULL,
    input_tokens INTEGER,
    output_tokens INTEGER,
    queue_ns INTEGER,
    ttft_ns INTEGER,
    tpot_ns INTEGER,
    total_ns INTEGER,
    serving_ns INTEGER NOT NULL,
    prefill_ns INTEGER NOT NULL,
    decode_ns INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    batch_sum INTEGER NOT NULL,
    accelerator_provenance TEXT NOT NULL,
    joules TEXT,
    energy_provenance TEXT NOT NULL,
    hold_nanousd INTEGER,
    list_nanousd INTEGER,
    saved TEXT NOT NULL,
    basis TEXT NOT NULL,
    price_source TEXT NOT NULL,
    price_snapshot TEXT NOT NULL,
    policy TEXT,
    error TEXT,
    CHECK ((status IS NULL) = (settled_at_ns IS NULL))
) STRICT;

-- Pages are read newest first; the partial indices keep unattributed traffic out of each.
CREATE INDEX receipts_created ON receipts (created_at_ns, id);
CREATE INDEX receipts_key ON receipts (key, created_at_ns, id) WHERE key IS NOT NULL;
CREATE INDEX receipts_team ON receipts (team, created_at_ns, id) WHERE team IS NOT NULL;
CREATE INDEX receipts_user ON receipts (user, created_at_ns, id) WHERE user IS NOT NULL;
CREATE INDEX receipts_feature ON receipts (feature, created_at_ns, id) WHERE feature IS NOT NULL;
CREATE INDEX receipts_tier ON receipts (tier, created_at_ns, id) WHERE tier IS NOT NULL;
CREATE INDEX receipts_conversation ON receipts (conversation, created_at_ns, id) WHERE conversation IS NOT NULL;
CREATE INDEX receipts_run ON receipts (run, created_at_ns, id) WHERE run IS NOT NULL;
CREATE INDEX receipts_open ON receipts (gateway) WHERE status IS NULL;

CREATE TABLE attempts (
    receipt TEXT NOT NULL REFERENCES receipts (id),
    ordinal INTEGER NOT NULL,
    backend TEXT NOT NULL,
    placement TEXT NOT NULL,
    model TEXT NOT NULL,
    role TEXT NOT NULL,
    started_at_ns INTEGER NOT NULL,
    ended_at_ns INTEGER,
    status TEXT,
    error TEXT,
    PRIMARY KEY (receipt, ordinal)
) STRICT, WITHOUT ROWID;

CREATE TABLE lines (
    receipt TEXT NOT NULL REFERENCES receipts (id),
    ordinal INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    role TEXT NOT NULL,
    meter TEXT NOT NULL,
    quantity TEXT NOT NULL,
    unit TEXT NOT NULL,
    unit_price_usd TEXT,
    amount_nanousd INTEGER,
    provenance TEXT NOT NULL,
    incurred_at_ns INTEGER NOT NULL,
    posted_at_ns INTEGER NOT NULL,
    book TEXT NOT NULL,
    note TEXT,
    PRIMARY KEY (receipt, ordinal)
) STRICT, WITHOUT ROWID;

CREATE TABLE device_sessions (
    id TEXT PRIMARY KEY,
    gateway TEXT NOT NULL,
    device TEXT NOT NULL,
    placement TEXT NOT NULL,
    accelerators INTEGER NOT NULL CHECK (accelerators > 0),
    usd_per_hour TEXT,
    rate_provenance TEXT NOT NULL,
    started_at_ns INTEGER NOT NULL,
    seen_at_ns INTEGER NOT NULL CHECK (seen_at_ns >= started_at_ns),
    busy INTEGER NOT NULL,
    closed INTEGER NOT NULL
) STRICT;

CREATE INDEX device_sessions_device ON device_sessions (device, seen_at_ns);
CREATE INDEX device_sessions_open ON device_sessions (gateway) WHERE NOT closed;

-- serving_ns is the sum of device_time, kept by the triggers below so that accounts need not add up every receipt;
-- `millicent doctor` compares the two. seen_serving_ns is what it was when the session was last seen: what exceeds
-- it was served after that, and recovery must not call it lost.
CREATE TABLE device_hours (
    session TEXT NOT NULL,
    hour_ns INTEGER NOT NULL CHECK (hour_ns % 3600000000000 = 0),
    wall_ns INTEGER NOT NULL DEFAULT 0,
    overhead_ns INTEGER NOT NULL DEFAULT 0,
    lost_ns INTEGER NOT NULL DEFAULT 0,
    down_ns INTEGER NOT NULL DEFAULT 0,
    serving_ns INTEGER NOT NULL DEFAULT 0,
    seen_serving_ns INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (session, hour_ns)
) STRICT, WITHOUT ROWID;

CREATE INDEX device_hours_hour ON device_hours (hour_ns);

CREATE TABLE device_time (
    receipt TEXT NOT NULL REFERENCES receipts (id),
    attempt INTEGER NOT NULL,
    session TEXT NOT NULL,
    hour_ns INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL CHECK (serving_ns >= 0),
    PRIMARY KEY (receipt, attempt, session, hour_ns)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER device_time_added AFTER INSERT ON device_time BEGIN
    INSERT INTO device_hours (session, hour_ns, serving_ns) VALUES (new.session, new.hour_ns, new.serving_ns)
    ON CONFLICT DO UPDATE SET serving_ns = serving_ns + new.serving_ns;
END;

CREATE TRIGGER device_time_changed AFTER UPDATE ON device_time BEGIN
    UPDATE device_hours SET serving_ns = serving_ns + new.serving_ns - old.serving_ns
    WHERE session = new.session AND hour_ns = new.hour_ns;
END;

-- What is settled stays as it is.
CREATE TRIGGER receipts_settled BEFORE UPDATE ON receipts WHEN old.status IS NOT NULL BEGIN
    SELECT raise(ABORT, 'a closed receipt never changes: add a line instead');
END;
CREATE TRIGGER receipts_kept BEFORE DELETE ON receipts BEGIN
    SELECT raise(ABORT, 'receipts are never deleted');
END;
CREATE TRIGGER attempts_settled BEFORE UPDATE ON attempts WHEN old.ended_at_ns IS NOT NULL BEGIN
    SELECT raise(ABORT, 'an ended attempt never changes');
END;
CREATE TRIGGER attempts_kept BEFORE DELETE ON attempts BEGIN
    SELECT raise(ABORT, 'attempts are never deleted');
END;
CREATE TRIGGER lines_settled BEFORE UPDATE ON lines BEGIN
    SELECT raise(ABORT, 'a line never changes: add another that corrects it');
END;
CREATE TRIGGER lines_kept BEFORE DELETE ON lines BEGIN
    SELECT raise(ABORT, 'lines are never deleted: add another that corrects it');
END;
CREATE TRIGGER device_time_settled BEFORE UPDATE ON device_time
WHEN (SELECT status FROM receipts WHERE id = old.receipt) IS NOT NULL
    OR (new.receipt, new.attempt, new.session, new.hour_ns)
        IS NOT (old.receipt, old.attempt, old.session, old.hour_ns)
BEGIN
    SELECT raise(ABORT, 'device time of a closed receipt never changes');
END;
CREATE TRIGGER device_time_late BEFORE INSERT ON device_time
WHEN (SELECT status FROM receipts WHERE id = new.receipt) IS NOT NULL BEGIN
    SELECT raise(ABORT, 'device time of a closed receipt never changes');
END;
CREATE TRIGGER device_time_kept BEFORE DELETE ON device_time BEGIN
    SELECT raise(ABORT, 'device time is never deleted');
END;
CREATE TRIGGER device_sessions_settled BEFORE UPDATE ON device_sessions WHEN old.closed BEGIN
    SELECT raise(ABORT, 'a closed session never changes');
END;
