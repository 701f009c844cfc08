"""The nouns, and the seams between the rooms. Depends on nothing else of ours."""
