BEGIN TRANSACTION;
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
CREATE TABLE api_keys_version (number INTEGER NOT NULL) STRICT;
INSERT INTO "api_keys_version" VALUES(0);
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
INSERT INTO "attempts" VALUES('rcpt_0004',1,'local','cpu','smol','inference',1767225600000000004,1767240000000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0005',1,'local','cpu','smol','inference',1767225600000000005,1767243600000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0006',1,'local','cpu','smol','inference',1767225600000000006,1767247200000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0007',1,'local','cpu','smol','inference',1767225600000000007,1767250800000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0008',1,'local','cpu','smol','inference',1767225600000000008,1767254400000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0010',1,'local','cpu','smol','inference',1767225600000000010,1767258000000000900,'succeeded',NULL);
CREATE TABLE budget_periods (
    budget TEXT NOT NULL REFERENCES budgets (name) ON DELETE CASCADE,
    subject TEXT NOT NULL,
    period_ns INTEGER NOT NULL,
    spent_nanousd INTEGER NOT NULL,
    held_nanousd INTEGER NOT NULL CHECK (held_nanousd >= 0),
    PRIMARY KEY (budget, subject, period_ns)
) STRICT, WITHOUT ROWID;
CREATE TABLE budgets (
    name TEXT PRIMARY KEY,
    limit_nanousd INTEGER NOT NULL CHECK (limit_nanousd >= 0),
    every TEXT NOT NULL CHECK (every IN ('hour', 'day', 'week', 'month', 'once')),
    per TEXT CHECK (per IN ('key', 'user', 'team', 'feature', 'tier', 'run')),
    only_value TEXT CHECK (only_value IS NULL OR per IS NOT NULL),
    hard INTEGER NOT NULL,
    source TEXT NOT NULL
) STRICT;
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
INSERT INTO "device_hours" VALUES('sess_1',1767225600000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767229200000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767232800000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767236400000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767240000000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767243600000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767247200000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767250800000000000,3600000000000,0,0,0,700,0);
INSERT INTO "device_hours" VALUES('sess_1',1767254400000000000,3600000000000,0,0,0,1400,0);
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
INSERT INTO "device_sessions" VALUES('sess_1','gw_1','cpu:0','cpu',1,NULL,'assumed',1767225600000000000,1767258000000000000,0,1);
CREATE TABLE device_time (
    receipt TEXT NOT NULL REFERENCES receipts (id),
    attempt INTEGER NOT NULL,
    session TEXT NOT NULL,
    hour_ns INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL CHECK (serving_ns >= 0),
    PRIMARY KEY (receipt, attempt, session, hour_ns)
) STRICT, WITHOUT ROWID;
INSERT INTO "device_time" VALUES('rcpt_0004',1,'sess_1',1767240000000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0005',1,'sess_1',1767243600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0006',1,'sess_1',1767247200000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0007',1,'sess_1',1767250800000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0008',1,'sess_1',1767254400000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0010',1,'sess_1',1767254400000000000,700);
CREATE TABLE device_time_archived (
    session TEXT NOT NULL,
    hour_ns INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL,
    PRIMARY KEY (session, hour_ns)
) STRICT, WITHOUT ROWID;
INSERT INTO "device_time_archived" VALUES('sess_1',1767225600000000000,700);
INSERT INTO "device_time_archived" VALUES('sess_1',1767229200000000000,700);
INSERT INTO "device_time_archived" VALUES('sess_1',1767232800000000000,700);
INSERT INTO "device_time_archived" VALUES('sess_1',1767236400000000000,700);
CREATE TABLE feedback (
    receipt TEXT NOT NULL REFERENCES receipts (id),
    ordinal INTEGER NOT NULL,
    id TEXT,
    posted_at_ns INTEGER NOT NULL,
    score TEXT,
    label TEXT,
    comment TEXT,
    useful INTEGER CHECK (useful IN (0, 1)),
    PRIMARY KEY (receipt, ordinal)
) STRICT, WITHOUT ROWID;
INSERT INTO "feedback" VALUES('rcpt_0007',0,NULL,1767225600000000000,NULL,NULL,NULL,0);
INSERT INTO "feedback" VALUES('rcpt_0008',0,NULL,1767225600000000000,NULL,NULL,NULL,1);
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
CREATE TABLE holds_archived (
    budget TEXT NOT NULL REFERENCES budgets (name) ON DELETE CASCADE,
    subject TEXT NOT NULL,
    period_ns INTEGER NOT NULL,
    spent_nanousd INTEGER NOT NULL,
    PRIMARY KEY (budget, subject, period_ns)
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
    note TEXT, id TEXT,
    PRIMARY KEY (receipt, ordinal)
) STRICT, WITHOUT ROWID;
INSERT INTO "lines" VALUES('rcpt_0004',0,1,'inference','accelerator','0.000000700','second','2.142857',1504,'measured',1767240000000000000,1767240000000001000,'actual','a note',NULL);
INSERT INTO "lines" VALUES('rcpt_0005',0,1,'inference','accelerator','0.000000700','second','2.142857',1505,'measured',1767243600000000000,1767243600000001000,'actual','a note',NULL);
INSERT INTO "lines" VALUES('rcpt_0006',0,1,'inference','accelerator','0.000000700','second','2.142857',1506,'measured',1767247200000000000,1767247200000001000,'actual','a note',NULL);
INSERT INTO "lines" VALUES('rcpt_0007',0,1,'inference','accelerator','0.000000700','second','2.142857',NULL,'unknown',1767250800000000000,1767250800000001000,'actual','a note',NULL);
INSERT INTO "lines" VALUES('rcpt_0008',0,1,'inference','accelerator','0.000000700','second','2.142857',1508,'measured',1767254400000000000,1767254400000001000,'actual','a note',NULL);
INSERT INTO "lines" VALUES('rcpt_0008',1,0,'retrieval','other','2','query','0.00000025',500,'reported',1767261600000000000,1767261600000000000,'actual',NULL,'one');
INSERT INTO "lines" VALUES('rcpt_0010',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767258000000000000,1767258000000001000,'actual','a note',NULL);
CREATE TABLE maintenance (reason TEXT NOT NULL) STRICT;
CREATE TABLE migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at_ns INTEGER NOT NULL) STRICT;
INSERT INTO "migrations" VALUES(1,'0001_receipts.sql',1767225600000000000);
INSERT INTO "migrations" VALUES(2,'0002_control.sql',1767225600000000000);
INSERT INTO "migrations" VALUES(3,'0003_late.sql',1767225600000000000);
INSERT INTO "migrations" VALUES(5,'0005_rollups.sql',1767225600000000000);
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
    error TEXT, recomputed_tokens INTEGER NOT NULL DEFAULT 0, step_time_version TEXT, useful INTEGER CHECK (useful IN (0, 1)),
    CHECK ((status IS NULL) = (settled_at_ns IS NULL))
) STRICT;
INSERT INTO "receipts" VALUES('rcpt_0004','gw_1',1767240000000000000,NULL,1767240000000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,NULL,'u1',NULL,NULL,NULL,NULL,'{}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL,0,NULL,NULL);
INSERT INTO "receipts" VALUES('rcpt_0005','gw_1',1767243600000000000,NULL,1767243600000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,NULL,'u2','f',NULL,NULL,NULL,'{}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL,0,NULL,NULL);
INSERT INTO "receipts" VALUES('rcpt_0006','gw_1',1767247200000000000,NULL,1767247200000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,NULL,'u0',NULL,NULL,NULL,NULL,'{}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL,0,NULL,NULL);
INSERT INTO "receipts" VALUES('rcpt_0007','gw_1',1767250800000000000,NULL,1767250800000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,NULL,'u1','f',NULL,NULL,NULL,'{}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL,0,NULL,NULL);
INSERT INTO "receipts" VALUES('rcpt_0008','gw_1',1767254400000000000,NULL,1767254400000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,NULL,'u2',NULL,NULL,NULL,NULL,'{}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL,0,NULL,NULL);
INSERT INTO "receipts" VALUES('rcpt_0010','gw_1',1767258000000000000,NULL,1767258000000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,NULL,'u1','g',NULL,NULL,NULL,'{}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL,0,NULL,NULL);
CREATE TABLE rollup_deltas (
    id INTEGER PRIMARY KEY,
    quarter_ns INTEGER NOT NULL,
    feature TEXT NOT NULL,
    user TEXT NOT NULL,
    team TEXT NOT NULL,
    model TEXT NOT NULL,
    key TEXT NOT NULL,
    tier TEXT NOT NULL,
    status TEXT NOT NULL,
    placement TEXT NOT NULL,
    requests INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL,
    cost_nanousd INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    assumed INTEGER NOT NULL,
    unknown_usage INTEGER NOT NULL
) STRICT;
INSERT INTO "rollup_deltas" VALUES(1,1767258000000000000,'g','u1','','smol','','','succeeded','cpu',1,12,3,700,1500,0,0,0);
CREATE TABLE rollup_groups (
    id INTEGER PRIMARY KEY,
    cube TEXT NOT NULL,
    feature TEXT NOT NULL DEFAULT '',
    user TEXT NOT NULL DEFAULT '',
    team TEXT NOT NULL DEFAULT '',
    model TEXT NOT NULL DEFAULT '',
    key TEXT NOT NULL DEFAULT '',
    tier TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT '',
    placement TEXT NOT NULL DEFAULT '',
    UNIQUE (cube, user, feature, team, model, key, tier, status, placement)
) STRICT;
INSERT INTO "rollup_groups" VALUES(1,'time','','','','','','','succeeded','');
INSERT INTO "rollup_groups" VALUES(2,'user','','u0','','','','','succeeded','');
INSERT INTO "rollup_groups" VALUES(3,'user','','u1','','','','','succeeded','');
INSERT INTO "rollup_groups" VALUES(4,'user','','u2','','','','','succeeded','');
INSERT INTO "rollup_groups" VALUES(5,'work','','','','smol','','','succeeded','cpu');
INSERT INTO "rollup_groups" VALUES(6,'work','f','','','smol','','','succeeded','cpu');
INSERT INTO "rollup_groups" VALUES(7,'archive','','u0','','smol','','','succeeded','cpu');
INSERT INTO "rollup_groups" VALUES(8,'archive','f','u1','','smol','','','succeeded','cpu');
INSERT INTO "rollup_groups" VALUES(9,'archive','','u2','','smol','','','succeeded','cpu');
INSERT INTO "rollup_groups" VALUES(10,'archive','f','u0','','smol','','','succeeded','cpu');
CREATE TABLE rollup_progress (raw_before_ns INTEGER NOT NULL) STRICT;
INSERT INTO "rollup_progress" VALUES(-9223372036854775808);
CREATE TABLE rollups (
    grouped INTEGER NOT NULL REFERENCES rollup_groups (id),
    span_s INTEGER NOT NULL CHECK (span_s IN (900, 86400)),
    start_ns INTEGER NOT NULL CHECK (start_ns % (span_s * 1000000000) = 0),
    requests INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL,
    cost_nanousd INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    assumed INTEGER NOT NULL,
    unknown_usage INTEGER NOT NULL,
    PRIMARY KEY (grouped, span_s, start_ns)
) STRICT, WITHOUT ROWID;
INSERT INTO "rollups" VALUES(1,900,1767225600000000000,1,12,3,700,1500,0,0,0);
INSERT INTO "rollups" VALUES(1,900,1767229200000000000,1,12,3,700,1501,0,0,0);
INSERT INTO "rollups" VALUES(1,900,1767232800000000000,1,12,3,700,1502,0,0,0);
INSERT INTO "rollups" VALUES(1,900,1767236400000000000,1,12,3,700,1503,0,0,0);
INSERT INTO "rollups" VALUES(1,900,1767240000000000000,1,12,3,700,1504,0,0,0);
INSERT INTO "rollups" VALUES(1,900,1767243600000000000,1,12,3,700,1505,0,0,0);
INSERT INTO "rollups" VALUES(1,900,1767247200000000000,1,12,3,700,1506,0,0,0);
INSERT INTO "rollups" VALUES(1,900,1767250800000000000,1,12,3,700,0,1,0,0);
INSERT INTO "rollups" VALUES(1,900,1767254400000000000,1,12,3,700,2008,0,0,0);
INSERT INTO "rollups" VALUES(1,86400,1767225600000000000,9,108,27,6300,12529,1,0,0);
INSERT INTO "rollups" VALUES(2,900,1767225600000000000,1,12,3,700,1500,0,0,0);
INSERT INTO "rollups" VALUES(2,900,1767236400000000000,1,12,3,700,1503,0,0,0);
INSERT INTO "rollups" VALUES(2,900,1767247200000000000,1,12,3,700,1506,0,0,0);
INSERT INTO "rollups" VALUES(2,86400,1767225600000000000,3,36,9,2100,4509,0,0,0);
INSERT INTO "rollups" VALUES(3,900,1767229200000000000,1,12,3,700,1501,0,0,0);
INSERT INTO "rollups" VALUES(3,900,1767240000000000000,1,12,3,700,1504,0,0,0);
INSERT INTO "rollups" VALUES(3,900,1767250800000000000,1,12,3,700,0,1,0,0);
INSERT INTO "rollups" VALUES(3,86400,1767225600000000000,3,36,9,2100,3005,1,0,0);
INSERT INTO "rollups" VALUES(4,900,1767232800000000000,1,12,3,700,1502,0,0,0);
INSERT INTO "rollups" VALUES(4,900,1767243600000000000,1,12,3,700,1505,0,0,0);
INSERT INTO "rollups" VALUES(4,900,1767254400000000000,1,12,3,700,2008,0,0,0);
INSERT INTO "rollups" VALUES(4,86400,1767225600000000000,3,36,9,2100,5015,0,0,0);
INSERT INTO "rollups" VALUES(5,900,1767225600000000000,1,12,3,700,1500,0,0,0);
INSERT INTO "rollups" VALUES(5,900,1767232800000000000,1,12,3,700,1502,0,0,0);
INSERT INTO "rollups" VALUES(5,900,1767240000000000000,1,12,3,700,1504,0,0,0);
INSERT INTO "rollups" VALUES(5,900,1767247200000000000,1,12,3,700,1506,0,0,0);
INSERT INTO "rollups" VALUES(5,900,1767254400000000000,1,12,3,700,2008,0,0,0);
INSERT INTO "rollups" VALUES(5,86400,1767225600000000000,5,60,15,3500,8020,0,0,0);
INSERT INTO "rollups" VALUES(6,900,1767229200000000000,1,12,3,700,1501,0,0,0);
INSERT INTO "rollups" VALUES(6,900,1767236400000000000,1,12,3,700,1503,0,0,0);
INSERT INTO "rollups" VALUES(6,900,1767243600000000000,1,12,3,700,1505,0,0,0);
INSERT INTO "rollups" VALUES(6,900,1767250800000000000,1,12,3,700,0,1,0,0);
INSERT INTO "rollups" VALUES(6,86400,1767225600000000000,4,48,12,2800,4509,1,0,0);
INSERT INTO "rollups" VALUES(7,900,1767225600000000000,1,12,3,700,1500,0,0,0);
INSERT INTO "rollups" VALUES(8,900,1767229200000000000,1,12,3,700,1501,0,0,0);
INSERT INTO "rollups" VALUES(9,900,1767232800000000000,1,12,3,700,1502,0,0,0);
INSERT INTO "rollups" VALUES(10,900,1767236400000000000,1,12,3,700,1503,0,0,0);
CREATE TABLE step_time_fits (
    version TEXT PRIMARY KEY,
    device TEXT NOT NULL,
    model TEXT NOT NULL,
    configuration TEXT NOT NULL,
    fixed_ns REAL NOT NULL,
    weights_ns REAL NOT NULL,
    row_ns REAL NOT NULL,
    sampled_row_ns REAL NOT NULL,
    kv_token_ns REAL NOT NULL,
    pair_ns REAL NOT NULL,
    steps INTEGER NOT NULL,
    error REAL,
    fitted_at_ns INTEGER NOT NULL
) STRICT;
CREATE INDEX receipts_created ON receipts (created_at_ns, id);
CREATE INDEX receipts_key ON receipts (key, created_at_ns, id) WHERE key IS NOT NULL;
CREATE INDEX receipts_team ON receipts (team, created_at_ns, id) WHERE team IS NOT NULL;
CREATE INDEX receipts_user ON receipts (user, created_at_ns, id) WHERE user IS NOT NULL;
CREATE INDEX receipts_feature ON receipts (feature, created_at_ns, id) WHERE feature IS NOT NULL;
CREATE INDEX receipts_tier ON receipts (tier, created_at_ns, id) WHERE tier IS NOT NULL;
CREATE INDEX receipts_conversation ON receipts (conversation, created_at_ns, id) WHERE conversation IS NOT NULL;
CREATE INDEX receipts_run ON receipts (run, created_at_ns, id) WHERE run IS NOT NULL;
CREATE INDEX receipts_open ON receipts (gateway) WHERE status IS NULL;
CREATE INDEX device_sessions_device ON device_sessions (device, seen_at_ns);
CREATE INDEX device_sessions_open ON device_sessions (gateway) WHERE NOT closed;
CREATE INDEX device_hours_hour ON device_hours (hour_ns);
CREATE TRIGGER device_time_added AFTER INSERT ON device_time BEGIN
    INSERT INTO device_hours (session, hour_ns, serving_ns) VALUES (new.session, new.hour_ns, new.serving_ns)
    ON CONFLICT DO UPDATE SET serving_ns = serving_ns + new.serving_ns;
END;
CREATE TRIGGER device_time_changed AFTER UPDATE ON device_time BEGIN
    UPDATE device_hours SET serving_ns = serving_ns + new.serving_ns - old.serving_ns
    WHERE session = new.session AND hour_ns = new.hour_ns;
END;
CREATE TRIGGER attempts_settled BEFORE UPDATE ON attempts WHEN old.ended_at_ns IS NOT NULL BEGIN
    SELECT raise(ABORT, 'an ended attempt never changes');
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
CREATE TRIGGER device_sessions_settled BEFORE UPDATE ON device_sessions WHEN old.closed BEGIN
    SELECT raise(ABORT, 'a closed session never changes');
END;
CREATE TRIGGER api_keys_added AFTER INSERT ON api_keys BEGIN
    UPDATE api_keys_version SET number = number + 1;
END;
CREATE TRIGGER api_keys_changed AFTER UPDATE ON api_keys BEGIN
    UPDATE api_keys_version SET number = number + 1;
END;
CREATE TRIGGER api_keys_kept BEFORE DELETE ON api_keys BEGIN
    SELECT raise(ABORT, 'keys are never deleted: revoke them');
END;
CREATE INDEX budgets_subject ON budgets (per, only_value);
CREATE INDEX holds_budget ON holds (budget);
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
CREATE TRIGGER lines_late AFTER INSERT ON lines
WHEN new.book = 'actual' AND new.amount_nanousd IS NOT NULL
    AND (SELECT status FROM receipts WHERE id = new.receipt) IS NOT NULL
BEGIN
    UPDATE holds SET spent_nanousd = spent_nanousd + new.amount_nanousd WHERE receipt = new.receipt AND settled;
END;
CREATE INDEX claims_receipt ON claims (receipt);
CREATE INDEX claims_expiry ON claims (expires_at_ns) WHERE expires_at_ns IS NOT NULL;
CREATE UNIQUE INDEX lines_id ON lines (receipt, id) WHERE id IS NOT NULL;
CREATE UNIQUE INDEX feedback_id ON feedback (receipt, id) WHERE id IS NOT NULL;
CREATE INDEX step_time_fits_latest ON step_time_fits (device, configuration, model, fitted_at_ns);
CREATE TRIGGER step_time_fits_settled BEFORE UPDATE ON step_time_fits BEGIN
    SELECT raise(ABORT, 'a version of the step-time model never changes: save another');
END;
CREATE VIEW receipt_sums AS
SELECT id, created_at_ns, created_at_ns - created_at_ns % 900000000000 AS quarter_ns,
    feature, user, team, model, key, tier, status, placement, conversation, run,
    1 AS requests, ifnull(input_tokens, 0) AS input_tokens, ifnull(output_tokens, 0) AS output_tokens, serving_ns,
    ifnull((SELECT CASE WHEN count(*) = count(amount_nanousd) THEN sum(amount_nanousd) END
        FROM lines WHERE lines.receipt = receipts.id AND book = 'actual'), 0) AS cost_nanousd,
    (SELECT CASE WHEN count(*) > 0 THEN count(*) > count(amount_nanousd) ELSE
            status != 'refused' AND (status = 'interrupted' OR input_tokens IS NOT 0 OR output_tokens IS NOT 0
                OR serving_ns != 0) END
        FROM lines WHERE lines.receipt = receipts.id AND book = 'actual') AS unpriced,
    (SELECT count(*) = count(amount_nanousd) AND ifnull(max(provenance = 'assumed'), 0)
        FROM lines WHERE lines.receipt = receipts.id AND book = 'actual') AS assumed,
    input_tokens IS NULL OR output_tokens IS NULL AS unknown_usage
FROM receipts WHERE status IS NOT NULL;
CREATE TRIGGER receipts_rolled AFTER UPDATE OF status ON receipts
WHEN old.status IS NULL AND new.status IS NOT NULL
    AND new.created_at_ns >= (SELECT raw_before_ns FROM rollup_progress)
BEGIN
    INSERT INTO rollup_deltas
    SELECT NULL, quarter_ns, ifnull(feature, ''), ifnull(user, ''), ifnull(team, ''), model, ifnull(key, ''),
        ifnull(tier, ''), status, ifnull(placement, ''), requests, input_tokens, output_tokens, serving_ns,
        cost_nanousd, unpriced, assumed, unknown_usage
    FROM receipt_sums WHERE id = new.id;
END;
CREATE TRIGGER lines_rolled AFTER INSERT ON lines
WHEN new.book = 'actual'
    AND (SELECT status IS NOT NULL AND created_at_ns >= (SELECT raw_before_ns FROM rollup_progress)
         FROM receipts WHERE id = new.receipt)
BEGIN
    INSERT INTO rollup_deltas
    SELECT NULL, s.quarter_ns, ifnull(s.feature, ''), ifnull(s.user, ''), ifnull(s.team, ''), s.model,
        ifnull(s.key, ''), ifnull(s.tier, ''), s.status, ifnull(s.placement, ''), 0, 0, 0, 0,
        s.cost_nanousd - CASE WHEN w.lines = w.priced THEN w.nanousd ELSE 0 END,
        s.unpriced - CASE WHEN w.lines > 0 THEN w.lines > w.priced ELSE
            s.status != 'refused' AND (s.status = 'interrupted' OR s.unknown_usage OR s.input_tokens != 0
                OR s.output_tokens != 0 OR s.serving_ns != 0) END,
        s.assumed - (w.lines = w.priced AND w.assumed), 0
    FROM receipt_sums AS s,
        (SELECT count(*) AS lines, count(amount_nanousd) AS priced, ifnull(sum(amount_nanousd), 0) AS nanousd,
            ifnull(max(provenance = 'assumed'), 0) AS assumed
         FROM lines WHERE receipt = new.receipt AND book = 'actual' AND ordinal != new.ordinal) AS w
    WHERE s.id = new.receipt;
END;
CREATE TRIGGER receipts_settled BEFORE UPDATE ON receipts
WHEN old.status IS NOT NULL AND NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'a closed receipt never changes: add a line instead');
END;
CREATE TRIGGER receipts_kept BEFORE DELETE ON receipts WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'receipts are never deleted');
END;
CREATE TRIGGER attempts_kept BEFORE DELETE ON attempts WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'attempts are never deleted');
END;
CREATE TRIGGER lines_kept BEFORE DELETE ON lines WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'lines are never deleted: add another that corrects it');
END;
CREATE TRIGGER lines_settled BEFORE UPDATE ON lines WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'a line never changes: add another that corrects it');
END;
CREATE TRIGGER feedback_settled BEFORE UPDATE ON feedback WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'feedback never changes: add another');
END;
CREATE TRIGGER device_time_kept BEFORE DELETE ON device_time WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'device time is never deleted');
END;
COMMIT;
