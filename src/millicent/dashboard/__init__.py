"""The pages: a chat with a running meter, receipts live and in full, and accounts of device time."""
