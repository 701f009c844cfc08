"""Each dialect, both ways: bytes to a Request, chunks and receipts to bytes."""
