"""Who may spend what: keys, budgets, rate limits, idempotency."""
