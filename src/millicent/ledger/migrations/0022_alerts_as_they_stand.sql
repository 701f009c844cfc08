-- An alert shows how it stands now: what it opened with and the worst that was seen stand beside; `receipts` are the
-- filters of those under it. `told` is 0 where there is nothing to tell (any more), 1 where its end will be to be told,
-- 2 and 3 while its beginning, or its end, waits for a rule that is quiet.
ALTER TABLE alerts ADD COLUMN opened_with TEXT NOT NULL DEFAULT '';
ALTER TABLE alerts ADD COLUMN peak TEXT NOT NULL DEFAULT '';
ALTER TABLE alerts ADD COLUMN peak_size REAL NOT NULL DEFAULT 0;
ALTER TABLE alerts ADD COLUMN receipts TEXT NOT NULL DEFAULT '{}';
UPDATE alerts SET title = replace(title, '`', '"'),
    receipts = CASE WHEN dimension IN ('feature', 'key', 'model') THEN json_object(dimension, member) ELSE '{}' END;
CREATE INDEX alerts_waiting ON alerts (told) WHERE told > 1;

-- Rules whose messages somebody doesn't want until then.
CREATE TABLE watch_mutes (rule TEXT PRIMARY KEY, until_ns INTEGER NOT NULL) STRICT, WITHOUT ROWID;

-- Detectors measure what was ever usual in other units now: they learn anew.
DELETE FROM watch_series;
