"""`python -m sfexport`."""

from sfexport.cli import main

main()
