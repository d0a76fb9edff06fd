"""The command: `sfexport`, and `python -m sfexport`."""

from sfexport.cli import main
from sfexport.engines.huge_pages import relaunch_with_huge_pages


def run() -> None:
    """What the installed script calls."""
    relaunch_with_huge_pages()
    main()


if __name__ == "__main__":
    run()
