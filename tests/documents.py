"""A person who types what a page of the documentation says, block after block, in the page's own words.

A page's `bash` blocks are run by bash as they stand. Names of another world are replaced, by one table for all pages:
the folders /srv, /data and /backup by folders of the test, the orchestrator's public name and ports by loopback, a GPU
by the CPU. A block whose last command stays in the foreground (`orchestrator start`, `appliance start`) is left
running. Whatever asks is answered with yes.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from commands import REPOSITORY, Done, end, environment

DOCS = REPOSITORY / "docs"
STAYS = re.compile(r"^(orchestrator|appliance) start ", re.MULTILINE)
SECTION = re.compile(r"^#+ (.*)$", re.MULTILINE)
BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


@dataclass
class Page:
    """One page: the blocks of each section, in order, and which of them have been run."""

    path: Path
    blocks: dict[str, list[str]] = field(default_factory=dict)
    done: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def of(cls, name: str) -> Page:
        """The page docs/NAME."""
        text = (DOCS / name).read_text(encoding="utf-8")
        outside = BLOCK.sub(lambda block: re.sub("^#", " ", block[0], flags=re.MULTILINE), text)
        heads = [(match[1], match.start()) for match in SECTION.finditer(outside)]
        page = cls(DOCS / name)
        for (head, begin), (_, until) in zip(heads, [*heads[1:], ("", len(text))], strict=True):
            if found := BLOCK.findall(text[begin:until]):
                page.blocks[head] = [block.replace("\\\n", " ") for block in found]
        return page

    def left(self) -> list[str]:
        """Blocks that nobody has run."""
        return [
            block
            for head, blocks in self.blocks.items()
            for number, block in enumerate(blocks)
            if (head, number) not in self.done
        ]


@dataclass
class Person:
    """Somebody with a shell.

    Attributes
    ----------
    folder : Path
        Where the shell is; files without a path lie here.
    words : Mapping
        What to type in the place of what stands on the page.
    variables : Mapping
        Variables of the shell from its start.
    answer : str
        What is typed when something asks.
    """

    folder: Path
    words: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)
    answer: str = "yes\n" * 5
    started: list[tuple[subprocess.Popen[str], Path]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._terminals: list[int] = []
        self._shell = self.folder / ".shell"  # where the shell stands and what it has exported
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._shell.write_text(f"cd {shlex.quote(str(self.folder))}\nexport PATH={shlex.quote(path)}\n")

    def typed(self, block: str) -> str:
        """The block as this person types it."""
        for word, other in self.words.items():
            block = block.replace(word, other)
        return block

    def reads(
        self,
        page: Page,
        head: str,
        number: int = 0,
        also: Mapping[str, str] | None = None,
        ends: Collection[int] = (0,),
    ) -> str:
        """Run one block of a section; what it printed.

        Parameters
        ----------
        page : Page
            The page.
        head : str
            The section's heading.
        number : int
            Which of its blocks.
        also : Mapping, optional
            Words to replace in this block alone.
        ends : collection of int
            The exit status that it may have.
        """
        block = page.blocks[head][number]
        page.done.add((head, number))
        for word, other in (also or {}).items():
            assert word in block, f"{word} does not stand in: {block}"
            block = block.replace(word, other)
        return self.types(block, ends)

    def types(self, block: str, ends: Collection[int] = (0,)) -> str:
        """Type lines as a page has them; what they printed."""
        script, stays = self.typed(block), ""
        if found := STAYS.search(script):
            script, stays = script[: found.start()], script[found.start() :].strip()
        keep = f"{{ export -p; echo \"cd '$PWD'\"; }} > {shlex.quote(str(self._shell))}"
        done = end(self._begin(f"set -euo pipefail\n{script}\n{keep}", subprocess.PIPE), 600)
        assert done.status in ends, f"{script}{done}"
        assert "Traceback" not in done.err, f"{script}{done}"
        if stays:
            said = self.folder / f"said-{time.monotonic_ns()}.log"
            with open(said, "w") as stream:
                self.started.append((self._begin(f"exec {stays}", stream), said))
        return done.out + done.err

    def _begin(self, script: str, output: int | IO[str]) -> subprocess.Popen[str]:
        ours, theirs = os.openpty()  # somebody is there to ask
        try:
            os.write(ours, self.answer.encode())
            return subprocess.Popen(
                ["bash", "-c", f". {shlex.quote(str(self._shell))}\n{script}"],
                cwd=self.folder,
                env=environment(**self.variables),
                stdin=theirs,
                stdout=output,
                stderr=output,
                encoding="utf-8",
                start_new_session=True,
            )
        finally:
            os.close(theirs)
            self._terminals.append(ours)

    def stops(self) -> list[Done]:
        """SIGTERM to all that was left running, the newest first; how each ended."""
        ended = []
        while self.started:
            process, said = self.started.pop()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            done = end(process, 120)
            ended.append(Done(done.status, said.read_text(), ""))
        while self._terminals:
            os.close(self._terminals.pop())
        return ended
