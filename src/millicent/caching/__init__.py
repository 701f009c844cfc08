"""The response cache: an answer that was given before is given again, to whoever may have it."""
