-- Sums of receipts, so that a report need not read every one. A receipt's figures are posted to rollup_deltas by the
-- transaction that closes it or adds a line to it; folding moves them to rollups. Reports add up both, so they are
-- right at every instant. Dimensions are '' where a receipt has none.

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

-- A cube keeps some dimensions and sums over the others, which are '' here. `archive` keeps all, of receipts whose
-- detail was deleted.
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

-- Receipts created before this are in no rollup yet: those that an older version wrote are taken in bit by bit, newest
-- first, while the gateway runs. The least integer when all are in.
CREATE TABLE rollup_progress (raw_before_ns INTEGER NOT NULL) STRICT;
INSERT INTO rollup_progress SELECT coalesce(max(created_at_ns) + 1, -9223372036854775808) FROM receipts;

-- What one closed receipt adds to the sums. It is unpriced when one of its lines is, or when it has none although
-- something may have run; then nothing of it is in the cost. No GROUP BY, so that conditions reach the indices.
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

-- A line of a closed receipt: what the receipt adds now, less what it added without the line.
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

-- A row here permits, for the transaction that puts it there and takes it away again, what is otherwise refused:
-- deleting detail that has outlived its retention, and taking a person's name off receipts.
CREATE TABLE maintenance (reason TEXT NOT NULL) STRICT;

DROP TRIGGER receipts_settled;
CREATE TRIGGER receipts_settled BEFORE UPDATE ON receipts
WHEN old.status IS NOT NULL AND NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'a closed receipt never changes: add a line instead');
END;
DROP TRIGGER receipts_kept;
CREATE TRIGGER receipts_kept BEFORE DELETE ON receipts WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'receipts are never deleted');
END;
DROP TRIGGER attempts_kept;
CREATE TRIGGER attempts_kept BEFORE DELETE ON attempts WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'attempts are never deleted');
END;
DROP TRIGGER lines_kept;
CREATE TRIGGER lines_kept BEFORE DELETE ON lines WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'lines are never deleted: add another that corrects it');
END;
DROP TRIGGER lines_settled;
CREATE TRIGGER lines_settled BEFORE UPDATE ON lines WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'a line never changes: add another that corrects it');
END;
DROP TRIGGER feedback_settled;
CREATE TRIGGER feedback_settled BEFORE UPDATE ON feedback WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'feedback never changes: add another');
END;
DROP TRIGGER device_time_kept;
CREATE TRIGGER device_time_kept BEFORE DELETE ON device_time WHEN NOT EXISTS (SELECT 1 FROM maintenance) BEGIN
    SELECT raise(ABORT, 'device time is never deleted');
END;

-- Device time of receipts that were deleted: `millicent doctor` adds it to what the receipts say.
CREATE TABLE device_time_archived (
    session TEXT NOT NULL,
    hour_ns INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL,
    PRIMARY KEY (session, hour_ns)
) STRICT, WITHOUT ROWID;

-- What holds of receipts that were deleted had spent, likewise.
CREATE TABLE holds_archived (
    budget TEXT NOT NULL REFERENCES budgets (name) ON DELETE CASCADE,
    subject TEXT NOT NULL,
    period_ns INTEGER NOT NULL,
    spent_nanousd INTEGER NOT NULL,
    PRIMARY KEY (budget, subject, period_ns)
) STRICT, WITHOUT ROWID;
