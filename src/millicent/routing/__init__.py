"""Which model a request goes to: policies, the score that one kind rests on, and how that is judged."""
