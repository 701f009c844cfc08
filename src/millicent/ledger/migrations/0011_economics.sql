-- What requests took, per quarter-hour, hour and day (UTC), feature and model: histograms and sums, as `core.tallies` packs them.
-- Receipts created before `raw_before_ns` are not in them yet.
CREATE TABLE tallies (
    span_s INTEGER NOT NULL CHECK (span_s IN (900, 3600, 86400)),
    start_ns INTEGER NOT NULL CHECK (start_ns % (span_s * 1000000000) = 0),
    feature TEXT NOT NULL,
    model TEXT NOT NULL,
    tally BLOB NOT NULL,
    PRIMARY KEY (span_s, start_ns, feature, model)
) STRICT, WITHOUT ROWID;
CREATE TABLE tally_progress (raw_before_ns INTEGER NOT NULL, since_ns INTEGER NOT NULL) STRICT;
INSERT INTO tally_progress
SELECT coalesce(max(created_at_ns) + 1, -9223372036854775808), coalesce(max(created_at_ns) + 1, -9223372036854775808)
FROM receipts;

-- What came in, and what was spent elsewhere, for [from_ns, to_ns): it accrues evenly over that time. A row never changes;
-- another corrects it.
CREATE TABLE entries (
    id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('revenue', 'cost')),
    amount_nanousd INTEGER NOT NULL,
    from_ns INTEGER NOT NULL,
    to_ns INTEGER NOT NULL CHECK (to_ns > from_ns),
    feature TEXT,
    user TEXT,
    tier TEXT,
    note TEXT,
    posted_at_ns INTEGER NOT NULL,
    PRIMARY KEY (kind, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX entries_time ON entries (to_ns, from_ns);
CREATE TRIGGER entries_settled BEFORE UPDATE ON entries WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'an entry never changes: add another that corrects it');
END;
CREATE TRIGGER entries_kept BEFORE DELETE ON entries BEGIN
    SELECT raise(ABORT, 'entries are never deleted: add another that corrects it');
END;
