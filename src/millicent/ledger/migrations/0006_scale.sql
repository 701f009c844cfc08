-- Rollups also hold what roles cost and which outputs were useful, and sums of 32 days beside those of a day.

DROP TRIGGER receipts_rolled;
DROP TRIGGER lines_rolled;
DROP VIEW receipt_sums;
DROP TABLE rollup_deltas;

-- A closed receipt of which the rollups don't hold the latest: nothing of it where `lines` is NULL, else what it was with
-- its lines before that ordinal and its feedback before that one. Reports make up the difference; folding does too,
-- and takes the row away.
CREATE TABLE unrolled (
    receipt TEXT PRIMARY KEY REFERENCES receipts (id),
    lines INTEGER,
    feedback INTEGER,
    CHECK ((lines IS NULL) = (feedback IS NULL))
) STRICT, WITHOUT ROWID;

CREATE TRIGGER receipts_closed AFTER UPDATE OF status ON receipts
WHEN old.status IS NULL AND new.status IS NOT NULL
    AND new.created_at_ns >= (SELECT raw_before_ns FROM rollup_progress)
BEGIN
    INSERT INTO unrolled VALUES (new.id, NULL, NULL);
END;

-- What comes after closing. Ordinals only grow: what has a lower one was there before.
DROP TRIGGER lines_late;
CREATE TRIGGER lines_late AFTER INSERT ON lines
WHEN new.book = 'actual' AND (SELECT status FROM receipts WHERE id = new.receipt) IS NOT NULL
BEGIN
    UPDATE holds SET spent_nanousd = spent_nanousd + new.amount_nanousd
    WHERE receipt = new.receipt AND settled AND new.amount_nanousd IS NOT NULL;
    INSERT INTO unrolled
    SELECT id, new.ordinal, (SELECT count(*) FROM feedback AS f WHERE f.receipt = receipts.id) FROM receipts
    WHERE id = new.receipt AND created_at_ns >= (SELECT raw_before_ns FROM rollup_progress)
    ON CONFLICT DO NOTHING;
END;
CREATE TRIGGER feedback_late AFTER INSERT ON feedback
WHEN new.useful IS NOT NULL AND (SELECT status FROM receipts WHERE id = new.receipt) IS NOT NULL
BEGIN
    INSERT INTO unrolled
    SELECT id, (SELECT ifnull(max(ordinal) + 1, 0) FROM lines AS l WHERE l.receipt = receipts.id), new.ordinal FROM receipts
    WHERE id = new.receipt AND created_at_ns >= (SELECT raw_before_ns FROM rollup_progress)
    ON CONFLICT DO NOTHING;
END;

-- The sums of deleted receipts cannot be made again: what is known of them is kept. Their roles and ratings were deleted
-- with them: they count as unrated, and in no role.
CREATE TEMP TABLE old_archive AS SELECT * FROM rollups
WHERE grouped IN (SELECT id FROM rollup_groups WHERE cube = 'archive');
DROP TABLE rollups;

CREATE TABLE rollups (
    grouped INTEGER NOT NULL REFERENCES rollup_groups (id),
    span_s INTEGER NOT NULL CHECK (span_s IN (900, 86400, 2764800)),
    start_ns INTEGER NOT NULL CHECK (start_ns % (span_s * 1000000000) = 0),
    requests INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    serving_ns INTEGER NOT NULL,
    cost_nanousd INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    assumed INTEGER NOT NULL,
    unknown_usage INTEGER NOT NULL,
    priced INTEGER NOT NULL,
    rated INTEGER NOT NULL,
    useful INTEGER NOT NULL,
    unpriced_lines INTEGER NOT NULL,
    inference_nanousd INTEGER NOT NULL,
    retry_nanousd INTEGER NOT NULL,
    fallback_nanousd INTEGER NOT NULL,
    verification_nanousd INTEGER NOT NULL,
    retrieval_nanousd INTEGER NOT NULL,
    adjustment_nanousd INTEGER NOT NULL,
    PRIMARY KEY (grouped, span_s, start_ns)
) STRICT, WITHOUT ROWID;

INSERT INTO rollups SELECT *, requests - unpriced, 0, 0, 0, 0, 0, 0, 0, 0, 0 FROM old_archive;
DROP TABLE old_archive;

-- The cubes begin anew with what was archived; receipts are taken in again, newest first, while the gateway runs.
DELETE FROM rollup_groups WHERE cube != 'archive';
CREATE TEMP TABLE moved AS
SELECT c.cube, c.span_s, start_ns - start_ns % (c.span_s * 1000000000) AS start_ns,
    iif(c.by_feature, feature, '') AS feature, iif(c.by_user, user, '') AS user, iif(c.by_work, team, '') AS team,
    iif(c.by_work, model, '') AS model, iif(c.by_work, key, '') AS key, iif(c.by_work, tier, '') AS tier, status,
    iif(c.by_work, placement, '') AS placement,
    sum(requests) AS requests, sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens,
    sum(serving_ns) AS serving_ns, sum(cost_nanousd) AS cost_nanousd, sum(unpriced) AS unpriced,
    sum(assumed) AS assumed, sum(unknown_usage) AS unknown_usage, sum(priced) AS priced
FROM rollups JOIN rollup_groups AS g ON g.id = grouped, (
    SELECT 'time' AS cube, 900 AS span_s, 0 AS by_feature, 0 AS by_user, 0 AS by_work
    UNION ALL VALUES ('time', 86400, 0, 0, 0), ('time', 2764800, 0, 0, 0),
        ('user', 900, 0, 1, 0), ('user', 86400, 0, 1, 0), ('user', 2764800, 0, 1, 0),
        ('work', 900, 1, 0, 1), ('work', 86400, 1, 0, 1), ('work', 2764800, 1, 0, 1),
        ('product', 86400, 1, 1, 0)
) AS c
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11;
INSERT INTO rollup_groups (cube, feature, user, team, model, key, tier, status, placement)
SELECT DISTINCT cube, feature, user, team, model, key, tier, status, placement FROM moved;
INSERT INTO rollups
SELECT id, span_s, start_ns, requests, input_tokens, output_tokens, serving_ns, cost_nanousd, unpriced, assumed,
    unknown_usage, priced, 0, 0, 0, 0, 0, 0, 0, 0, 0
FROM moved JOIN rollup_groups USING (cube, feature, user, team, model, key, tier, status, placement);
DROP TABLE moved;
UPDATE rollup_progress SET raw_before_ns =
    (SELECT coalesce(max(created_at_ns) + 1, -9223372036854775808) FROM receipts);
