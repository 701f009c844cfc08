"""One request's decisions, in order. Backends are injected."""
