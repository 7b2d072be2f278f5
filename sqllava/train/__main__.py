"""`python -m sqllava.train --help`."""

from sqllava.train.run import main

main()
