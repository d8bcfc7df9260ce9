"""`python -m cla_export.cli`."""

from cla_export.cli import main

main()
