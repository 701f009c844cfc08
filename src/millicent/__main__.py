"""`python -m millicent`."""

from millicent.cli import main

main()
