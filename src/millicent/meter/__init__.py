"""The meter: whose device time it was, and what it costs."""
