BEGIN TRANSACTION;
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
INSERT INTO "attempts" VALUES('rcpt_0000',1,'local','cpu','large','inference',1767225600000000000,1767225600000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0001',1,'local','cpu','smol','inference',1767225600000000001,1767226300000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0002',1,'local','cpu','smol','inference',1767225600000000002,1767227000000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0003',1,'local','cpu','large','inference',1767225600000000003,1767227700000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0004',1,'local','cpu','smol','inference',1767225600000000004,1767228400000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0005',1,'local','cpu','smol','inference',1767225600000000005,1767229100000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0006',1,'local','cpu','large','inference',1767225600000000006,1767229800000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0007',1,'local','cpu','smol','inference',1767225600000000007,1767230500000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0008',1,'local','cpu','smol','inference',1767225600000000008,1767231200000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0009',1,'local','cpu','large','inference',1767225600000000009,1767231900000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0010',1,'local','cpu','smol','inference',1767225600000000010,1767232600000000900,'succeeded',NULL);
INSERT INTO "attempts" VALUES('rcpt_0011',1,'local','cpu','smol','inference',1767225600000000011,NULL,NULL,NULL);
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
INSERT INTO "device_hours" VALUES('sess_1',1767225600000000000,20000000000,0,0,0,7700,0);
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
INSERT INTO "device_sessions" VALUES('sess_1','gw_1','cpu:0','cpu',2,'0.90','assumed',1767225600000000000,1767225620000000000,1,0);
CREATE TABLE device_time (
    receipt TEXT NOT NULL REFERENCES receipts (id),
    attempt INTEGER NOT NULL,
    session TEXT NOT NULL,
    hour_ns INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL CHECK (serving_ns >= 0),
    PRIMARY KEY (receipt, attempt, session, hour_ns)
) STRICT, WITHOUT ROWID;
INSERT INTO "device_time" VALUES('rcpt_0000',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0001',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0002',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0003',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0004',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0005',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0006',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0007',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0008',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0009',1,'sess_1',1767225600000000000,700);
INSERT INTO "device_time" VALUES('rcpt_0010',1,'sess_1',1767225600000000000,700);
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
INSERT INTO "lines" VALUES('rcpt_0000',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767225600000000000,1767225600000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0001',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767226300000000000,1767226300000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0002',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767227000000000000,1767227000000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0003',0,1,'inference','accelerator','0.000000700','second','2.142857',NULL,'unknown',1767227700000000000,1767227700000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0004',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767228400000000000,1767228400000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0006',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767229800000000000,1767229800000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0007',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'assumed',1767230500000000000,1767230500000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0007',1,1,'inference','other','0.000000700','second','2.142857',1000000000000,'measured',1767230500000000000,1767230500000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0008',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767231200000000000,1767231200000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0009',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767231900000000000,1767231900000001000,'actual','a note');
INSERT INTO "lines" VALUES('rcpt_0010',0,1,'inference','accelerator','0.000000700','second','2.142857',1500,'measured',1767232600000000000,1767232600000001000,'actual','a note');
CREATE TABLE migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at_ns INTEGER NOT NULL) STRICT;
INSERT INTO "migrations" VALUES(1,'0001_receipts.sql',1767225600000000000);
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
INSERT INTO "receipts" VALUES('rcpt_0000','gw_1',1767225600000000000,NULL,1767225600000001000,'succeeded','large','large','cpu','local','openai',1,'stop',NULL,'t',NULL,NULL,NULL,NULL,NULL,'{"n":"0"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0001','gw_1',1767226300000000000,NULL,1767226300000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,'t','user1','search',NULL,NULL,NULL,'{"n":"1"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0002','gw_1',1767227000000000000,NULL,1767227000000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,'t','user2',NULL,NULL,NULL,NULL,'{"n":"2"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0003','gw_1',1767227700000000000,NULL,1767227700000001000,'succeeded','large','large','cpu','local','openai',1,'stop',NULL,'t','user3','search',NULL,NULL,NULL,'{"n":"3"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0004','gw_1',1767228400000000000,NULL,1767228400000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,'t',NULL,NULL,NULL,NULL,NULL,'{"n":"4"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0005','gw_1',1767229100000000000,NULL,1767229100000001000,'failed','smol','smol','cpu','local','openai',1,'stop',NULL,'t','user1','search',NULL,NULL,NULL,'{"n":"5"}','{"leaves":{"input_fresh":{"tokens":null,"provenance":"unknown"}}}',NULL,0,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0006','gw_1',1767229800000000000,NULL,1767229800000001000,'succeeded','large','large','cpu','local','openai',1,'stop',NULL,'t','user2',NULL,NULL,NULL,NULL,'{"n":"6"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0007','gw_1',1767230500000000000,NULL,1767230500000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,'t','user3','search',NULL,NULL,NULL,'{"n":"7"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0008','gw_1',1767231200000000000,NULL,1767231200000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,'t',NULL,NULL,NULL,NULL,NULL,'{"n":"8"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0009','gw_1',1767231900000000000,NULL,1767231900000001000,'succeeded','large','large','cpu','local','openai',1,'stop',NULL,'t','user1','search',NULL,NULL,NULL,'{"n":"9"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0010','gw_1',1767232600000000000,NULL,1767232600000001000,'succeeded','smol','smol','cpu','local','openai',1,'stop',NULL,'t','user2',NULL,NULL,NULL,NULL,'{"n":"10"}','{"leaves":{"input_fresh":{"tokens":12,"provenance":"measured"},"output_text":{"tokens":3,"provenance":"measured"}}}',12,3,1,2,3,4,700,500,200,4,9,'measured','0.125','estimated',1000000000,2000,'{"routing":500}','busy','placements.cpu','{"rate_usd_per_hour":"0.10"}','{"route":"cheapest"}',NULL);
INSERT INTO "receipts" VALUES('rcpt_0011','gw_1',1767233300000000000,NULL,NULL,NULL,'smol','smol','cpu','local','openai',1,NULL,NULL,'t','user3','search',NULL,NULL,NULL,'{"n":"11"}','{"leaves":{}}',0,0,NULL,NULL,NULL,NULL,0,0,0,0,0,'unknown',NULL,'unknown',1000000000,NULL,'{}','busy','none','{}',NULL,NULL);
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
COMMIT;
