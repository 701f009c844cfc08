"""Receipts, durable: store, group-commit writer, recovery, read-only queries."""
