-- What comes after an answer, and what its figures rest on.

ALTER TABLE receipts ADD COLUMN recomputed_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE receipts ADD COLUMN step_time_version TEXT;
ALTER TABLE receipts ADD COLUMN useful INTEGER CHECK (useful IN (0, 1));

-- A caller's own identifier of a line: posting it again changes nothing.
ALTER TABLE lines ADD COLUMN id TEXT;
CREATE UNIQUE INDEX lines_id ON lines (receipt, id) WHERE id IS NOT NULL;

-- score is an exact decimal as text; useful is the feature's rule applied when it came, NULL where it says nothing.
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

CREATE UNIQUE INDEX feedback_id ON feedback (receipt, id) WHERE id IS NOT NULL;

CREATE TRIGGER feedback_settled BEFORE UPDATE ON feedback BEGIN
    SELECT raise(ABORT, 'feedback never changes: add another');
END;

-- Versions of the step-time model, nanoseconds. They are kept as long as receipts may refer to them.
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

CREATE INDEX step_time_fits_latest ON step_time_fits (device, configuration, model, fitted_at_ns);

CREATE TRIGGER step_time_fits_settled BEFORE UPDATE ON step_time_fits BEGIN
    SELECT raise(ABORT, 'a version of the step-time model never changes: save another');
END;
