"""Says which commands of the documentation no test has run: `python tests/documented.py`, after the tests.

While tests run, tests/conftest.py writes down every process that they start. A command of a page counts as run when one
of these had the same program and subcommand and at least its options. What cannot be run here, and why, stands in
`NOT_HERE`; there is no other way out of the list.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "build" / "commands"
OURS = {"orchestrator.admin.cli": "fednnunet", "orchestrator.cli": "orchestrator", "appliance.cli": "appliance"}
OTHERS = ("docker", "helm", "kubectl", "podman", "openssl", "ssh-keygen", "make", "tar", "sha256sum")
GROUPS = {  # programs whose subcommands have subcommands
    "fednnunet": {"federation", "site", "study", "simulate", "image", "predict", "audit"},
    "appliance": {"ledger", "config"},
    "orchestrator": set(),
}
NOT_HERE = {
    "kubectl": "no cluster: the charts' pods are run by tests/kubelet.py, and what stands after -- is looked for",
    "helm install": "no cluster: rendered by `helm template`, and the pods run by tests/kubelet.py",
    "helm upgrade": "no cluster: as helm install",
    "helm test": "no cluster: the test's pod is run by tests/kubelet.py",
    "helm uninstall": "no cluster",
    "podman": "not installed; the page says so",
    "make": "called by .ci/run, or by whoever runs the tests",
    "docker run --gpus": "no GPU: run without that option",
    "docker cp": "copies a file, by docker alone",
    "fednnunet federation init --as-secret": "within the tests' own process: tests/test_enrollment.py",
    "fednnunet site invite --output": "within the tests' own process: tests/test_enrollment.py",
    "fednnunet audit show": "within the tests' own process: tests/test_enrollment.py",
    "appliance predict --previous-stage": "within the tests' own process: tests/test_predict.py",
}


@dataclass(frozen=True)
class Call:
    """One call of a program: its name and subcommands, its options."""

    name: str
    options: frozenset[str]
    line: str

    def covers(self, other: Call) -> bool:
        """Whether whoever ran this has run the other one."""
        return self.name == other.name and other.options <= self.options


def call(words: list[str]) -> Iterator[Call]:
    """What a list of words calls: itself, and what it has another program run (`docker exec NAME appliance health`)."""
    if len(words) > 2 and words[1] == "-m" and words[2] in OURS:
        words = [OURS[words[2]], *words[3:]]
    elif len(words) > 2 and words[1] == "-c" and Path(words[0]).name in ("bash", "sh"):
        yield from calls(words[2])
        return
    while words and (re.fullmatch(r"[A-Za-z_]+=.*", words[0]) or words[0] in ("exec", "timeout", "5")):
        words = words[1:]
    if not words:
        return
    program = Path(words[0]).name
    if program in OTHERS or program in OURS.values() or program.startswith("nnUNetv2_"):
        yield _call(program, words[1:])
    if program not in ("docker", "podman", "kubectl"):
        return
    for at, word in enumerate(words[1:], 1):
        if word in OURS.values() and at + 1 < len(words) and not words[at + 1].startswith("-"):
            yield from call(words[at + (words[at + 1] in OURS.values()) :])  # a container may have the program's name
            break
        if "fednnunet/appliance:" in word and at + 1 < len(words):  # an image whose entry point is the program
            yield from call(["appliance", *words[at + 1 :]])
            break


def _call(program: str, rest: list[str]) -> Call:
    names, options = [program], []
    deepest = 1 if program in (*GROUPS, "docker", "helm", "openssl", "kubectl", "podman") else 0
    if program == "docker" and rest[:1] == ["compose"]:  # its own words alone: what stands after is a service's
        verb = next((word for word in rest if word in ("up", "exec", "down", "config", "logs", "ps")), "")
        return Call(f"docker compose {verb}", frozenset(), shlex.join([program, *rest]))
    for word in rest:
        if word.startswith("-") and len(word) > 1:
            options.append(word.partition("=")[0])
        elif len(names) <= deepest and (program == names[-1] or names[-1] in GROUPS.get(program, ())):
            names.append(word)
            deepest += word in GROUPS.get(program, ()) and len(names) == 2
    if program in ("docker", "podman", "kubectl"):  # what stands after the image or the container is another program's
        options = [option for option in options if option in ("--gpus", "--network", "--read-only", "--cap-drop")]
    return Call(" ".join(names), frozenset(options), shlex.join([program, *rest]))


def calls(script: str) -> Iterator[Call]:
    """The calls in lines of shell."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            continue
        for control, part in itertools.groupby(words, lambda word: bool(re.fullmatch(r"[|&;<>()]+", word))):
            if not control:
                yield from call(list(part))


def documented() -> Iterator[tuple[Path, Call]]:
    """Every call in the bash blocks of the pages."""
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]):
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for found in calls(block):
                yield page, found


def recorded() -> Iterator[Call]:
    """Every call that tests have made."""
    seen: set[str] = set()
    for path in RECORDS.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line not in seen:
                seen.add(line)
                yield from call(json.loads(line))


def excused(found: Call) -> bool:
    """Whether it cannot be run here, or is run where nobody writes it down."""
    for key in NOT_HERE:
        words = key.split()
        name = " ".join(word for word in words if not word.startswith("-"))
        options = {word for word in words if word.startswith("-")}
        if (found.name == name or found.name.startswith(f"{name} ")) and options <= found.options:
            return True
    return False


def missing(ran: Iterable[Call]) -> list[str]:
    """The documented calls that nobody has run, one line each."""
    known = list(ran)
    return [
        f"{page.relative_to(ROOT)}: {found.line}"
        for page, found in documented()
        if not excused(found) and not any(one.covers(found) for one in known)
    ]


if __name__ == "__main__":
    left = missing(recorded())
    print("\n".join(left) or "every command of the documentation has been run by a test, or cannot be run here")
    sys.exit(bool(left))
