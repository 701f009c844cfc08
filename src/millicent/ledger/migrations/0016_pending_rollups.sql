-- Sums of receipts by every dimension, per quarter-hour: what was folded, and is in no cube yet. A quarter-hour's receipts are
-- added up here, and go on to the cubes, all their spans at once, when it is over.
CREATE TABLE rollups_pending (
    quarter_ns INTEGER NOT NULL CHECK (quarter_ns % 900000000000 = 0),
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
    PRIMARY KEY (quarter_ns, feature, user, team, model, key, tier, status, placement)
) STRICT, WITHOUT ROWID;

-- The same of tallies.
CREATE TABLE tallies_pending (
    quarter_ns INTEGER NOT NULL CHECK (quarter_ns % 900000000000 = 0),
    feature TEXT NOT NULL,
    model TEXT NOT NULL,
    tally BLOB NOT NULL,
    PRIMARY KEY (quarter_ns, feature, model)
) STRICT, WITHOUT ROWID;
