-- Speculative decoding: tokens that were guessed and checked in an answer's decode steps, and how many were right.

ALTER TABLE receipts ADD COLUMN drafted_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE receipts ADD COLUMN accepted_tokens INTEGER NOT NULL DEFAULT 0;
