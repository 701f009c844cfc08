-- What `store` of OpenAI's Responses asks for: an answer, and what was sent for it, until they expire.
CREATE TABLE stored_responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    user TEXT,
    previous TEXT,
    input TEXT NOT NULL,
    body TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    expires_at_ns INTEGER NOT NULL
) STRICT;

CREATE INDEX stored_responses_expiry ON stored_responses (expires_at_ns);
CREATE INDEX stored_responses_user ON stored_responses (user);

-- Their sum, kept by the triggers below, so that each one that comes can be held against the bound.
CREATE TABLE stored_responses_size (bytes INTEGER NOT NULL) STRICT;
INSERT INTO stored_responses_size VALUES (0);
CREATE TRIGGER stored_responses_added AFTER INSERT ON stored_responses BEGIN
    UPDATE stored_responses_size SET bytes = bytes + NEW.bytes;
END;
CREATE TRIGGER stored_responses_dropped AFTER DELETE ON stored_responses BEGIN
    UPDATE stored_responses_size SET bytes = bytes - OLD.bytes;
END;
