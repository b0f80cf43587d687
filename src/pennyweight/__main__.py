"""`python -m pennyweight` is `penny`."""

from pennyweight.cli import main

main()
