"""Margins, where to run, what it would cost: computed from the ledger's figures, rendered elsewhere."""
