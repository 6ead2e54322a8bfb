"""`python -m crfrefine` is the command `crfrefine`."""

from crfrefine.cli.main import main

main()
