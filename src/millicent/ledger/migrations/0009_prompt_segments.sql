-- What was asked, without its words: a keyed digest of the request, and the keyed hashes and lengths of its prompt's
-- segments, packed as core/prompts.py says. Older receipts have neither.

ALTER TABLE receipts ADD COLUMN request_digest BLOB;
ALTER TABLE receipts ADD COLUMN segments BLOB;
