"""How our commands talk to a person: a numbered error on one screen, and an exit status to go with it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from federation.errors import FednnunetError


def show(error: FednnunetError) -> None:
    """Print an error: number and title, what was found, what to do."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((f"FNU-{error.code.number} ", "bold red"), (error.code.title, "bold")))
    if error.found:
        console.print(Text(error.found), soft_wrap=True)
    console.print(Text.assemble(("What to do: ", "bold"), error.advice), soft_wrap=True)


def run(app: Callable[[], object]) -> None:
    """Run a command-line application; a numbered error becomes its exit status (10 + the hundreds of its number)."""
    try:
        app()
    except FednnunetError as error:
        show(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
