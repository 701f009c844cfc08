"""What is going on now, for people and for other programs."""
