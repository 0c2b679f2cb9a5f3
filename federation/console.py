"""How our commands talk to a person: a numbered error on one screen, and an exit status to go with it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from federation import logs
from federation.errors import Code, FednnunetError
from federation.files import disk_error

_ADVICE = "What to do: "


def show(error: FednnunetError) -> None:
    """Print an error on stderr: number and title, what was found, what to do; or a line of JSON (federation.logs)."""
    if (line := logs.error_line(error)) is not None:
        print(line, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((f"FNU-{error.code.number} ", "bold red"), (error.code.title, "bold")))
    if error.found:
        console.print(Text(error.found), soft_wrap=True)
    console.print(Text.assemble((_ADVICE, "bold"), error.advice), soft_wrap=True)


def shown(text: str) -> FednnunetError | None:
    """The numbered error that a command of ours printed last (`show`), read back from its output; None: there is none.

    So a process that starts another one can pass on the error itself.
    """
    for start in reversed(list(re.finditer(r"^FNU-(\d{3}) (.*)$", text, re.MULTILINE))):
        found, advice, rest = text[start.end() :].partition(f"\n{_ADVICE}")
        try:
            code = Code.of(int(start[1]))
        except KeyError:
            continue
        if advice and code.title == start[2].strip():
            return FednnunetError(code, found.strip(), rest.splitlines()[0] if rest else "")
    return None


def require(extra: str, *modules: str) -> None:
    """Raise FNU-704 unless these modules are installed; `extra` names the extra that brings them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise FednnunetError(
            Code.EXTRA_MISSING,
            f"not installed: {', '.join(missing)}",
            f"Install the extra: pip install -c constraints.txt '.[{extra}]'",
        )


def run(app: Callable[[], object]) -> None:
    """Run a command-line application; a numbered error becomes its exit status (10 + the hundreds of its number)."""
    try:
        app()
    except FednnunetError as error:
        show(error)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        numbered = disk_error(error, Path(error.filename or "the disk"))
        if numbered is None:
            raise
        show(numbered)
        sys.exit(numbered.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
