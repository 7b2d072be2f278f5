"""`python -m sqllava.train --help`."""

from sqllava.train.cli import main

main()
