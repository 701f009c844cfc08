"""From receipts to decisions: pure computation over the ledger's figures, rendered elsewhere."""
