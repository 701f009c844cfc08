-- Tallies of eight days beside those of a day, so that months aren't read day by day. Days that began before `wide_before_ns`
-- are not in them yet: checkpoints take in one day each, newest first, since SQL can't add up what is packed.
CREATE TABLE tallies_wide (
    span_s INTEGER NOT NULL CHECK (span_s = 691200),
    start_ns INTEGER NOT NULL CHECK (start_ns % (span_s * 1000000000) = 0),
    feature TEXT NOT NULL,
    model TEXT NOT NULL,
    tally BLOB NOT NULL,
    PRIMARY KEY (span_s, start_ns, feature, model)
) STRICT, WITHOUT ROWID;
ALTER TABLE tally_progress ADD COLUMN wide_before_ns INTEGER NOT NULL DEFAULT 0;
UPDATE tally_progress SET wide_before_ns =
    (SELECT coalesce(max(start_ns) + 86400000000000, -9223372036854775808) FROM tallies WHERE span_s = 86400);
