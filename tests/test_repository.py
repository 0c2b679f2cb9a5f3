"""The repository keeps its promises: versions, documents and layer rules are in step with the code."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from federation import study
from federation.errors import Code

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("federation", "appliance", "orchestrator")
PROGRAMS = {"fednnunet": "orchestrator.admin.cli", "orchestrator": "orchestrator.cli", "appliance": "appliance.cli"}
EXTRAS = ["torch", "flwr", "nnunetv2", "numpy", "safetensors", "SimpleITK", "httpx", "uvicorn"]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FOUR_PARTS = ("getting-started", "how-to", "reference", "explanation")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert all(found), f"not NAME==VERSION: {[line for line, match in zip(lines, found, strict=True) if not match]}"
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): Version(match[2]) for match in found if match}


def direct_requirements() -> list[Requirement]:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [Requirement(text) for text in itertools.chain.from_iterable(groups) if not text.startswith("fednnunet[")]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(page: Path, *languages: str) -> Iterator[str]:
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield match[2]


# ---- versions -----------------------------------------------------------------------------------------------------


def test_every_direct_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    pinned = pins()
    for requirement in direct_requirements():
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"constraints.txt pins {name} to {pinned[name]}"


def test_the_three_that_everything_hangs_on_are_pinned_as_agreed() -> None:
    pinned = pins()
    assert {name: str(pinned[name]) for name in ("torch", "flwr", "nnunetv2")} == {
        "torch": "2.13.0",
        "flwr": "1.41.0",
        "nnunetv2": "2.8.1",
    }


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_what_the_images_install_is_locked_with_hashes_at_the_versions_that_were_tested(variant: str) -> None:
    text = (ROOT / "images" / f"{variant}.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^([a-z0-9.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith(("#", "    --hash=sha256:"))]
    assert len(entries) == len(lines) > 100, "an entry without a hash"
    names, pinned = {name for name, _, _ in entries}, pins()
    for name, version, _ in entries:
        assert Version(version) == pinned.get(name, Version(version)), name
    assert {"flwr", "nnunetv2", "cryptography", "numpy", "simpleitk"} <= names
    assert ("torch" in names) == ("nvidia-cudnn-cu13" in names) == (variant == "cuda")
    assert "uv" not in names


def test_the_admin_cli_installs_without_torch_flower_and_nnunet() -> None:
    base = {Requirement(text).name.lower() for text in project()["dependencies"]}
    assert not base & {"torch", "flwr", "nnunetv2", "simpleitk", "numpy"}
    for role in ("appliance", "orchestrator"):
        extra = {Requirement(text).name for text in project()["optional-dependencies"][role]}
        assert {"torch", "flwr", "nnunetv2"} <= extra


def test_the_changelog_describes_this_version() -> None:
    headings = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == project()["version"]


def test_python_classifiers_are_the_versions_that_install() -> None:
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(project()["classifiers"]))
    assert versions == ["3.11", "3.12", "3.13"]
    assert project()["requires-python"] == ">=3.11,<3.14"


# ---- commands -------------------------------------------------------------------------------------------------------


def click_command(program: str) -> click.Command:
    return typer.main.get_command(importlib.import_module(PROGRAMS[program]).app)


def subcommands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from subcommands(inner, (*words, name))


ALL_HELP = """
import contextlib, importlib, io, json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[3])))  # these cannot be imported: as if they were not installed
module, paths = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2])
for words in paths:
    sys.argv = [sys.argv[0], *words, "--help"]
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            module.main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    assert "Usage" in text.getvalue(), (words, text.getvalue())
"""


def test_fednnunet_says_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.admin.cli", "--version"],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert done.stdout == f"fednnunet {project()['version']}\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_command_answers_where_torch_flower_and_nnunet_are_not_installed(program: str) -> None:
    paths = json.dumps(list(subcommands(click_command(program))))
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, PROGRAMS[program], paths, json.dumps(EXTRAS)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


def seconds_of_cpu(run: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import sys; sys.argv[1:] = ['--help']; {run}"], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_takes_little_more_cpu_than_that_of_an_empty_program(program: str) -> None:
    """0.2 to 0.3 s and 0.17 s on one machine; another is slower, and so is the same one while it is busy."""
    runs = "import typer; typer.run(lambda: None)", f"from {PROGRAMS[program]} import main; main()"
    taken = [[seconds_of_cpu(run) for run in runs] for _ in range(3)]  # the first may still write byte code
    empty, ours = map(min, zip(*taken, strict=True))
    assert ours < 3.5 * empty, taken


# ---- documents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["study.md", "errors.md", "settings.md", "cli.md", "metrics.md", "nnunet-breadth.md"])
def test_the_reference_is_in_step_with_the_code(name: str) -> None:
    module = generator()
    page = module.REFERENCE / name
    made = getattr(module, f"{page.stem.replace('-', '_')}_page")()
    assert page.read_text(encoding="utf-8") == made, f"docs/reference/{name} is out of step: run `make docs`"


def test_every_error_has_its_own_number_and_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    numbers = [code.number for code in Code]
    assert numbers == sorted(set(numbers)), "each number once, in order"
    for code in Code:
        assert f'<a id="fnu-{code.number}">' in page
        assert code.title
        assert code.advice.endswith(".")


def test_the_study_reference_names_every_key() -> None:
    page = (ROOT / "docs" / "reference" / "study.md").read_text(encoding="utf-8")
    for model in (study.Study, study.Aggregation):
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in page
            assert field.description, f"{name} has no description"


def test_the_tests_that_show_nnunets_breadth_exist() -> None:
    page = (ROOT / "docs" / "reference" / "nnunet-breadth.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert named
    for file, test in named:
        assert f"\ndef {test}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_documentation_builds_as_a_site_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", "-d", tmp_path / "trees", "-b", "html", ROOT / "docs"]
    done = subprocess.run([*build, tmp_path / "site"], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "how-to" / "run-a-study.html").read_text(encoding="utf-8")
    assert "study-watch.svg" in page
    assert "http-equiv" not in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+)"[^>]*(?:rel="stylesheet"|></script>)', page)
    assert not fetched, "the site is read without a network"


def test_the_documentation_has_its_four_parts() -> None:
    for part in FOUR_PARTS:
        assert list((ROOT / "docs" / part).glob("*.md")), part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            other = path.read_text(encoding="utf-8")
            slugs = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", other, re.MULTILINE)
            }
            assert anchor in slugs or f'id="{anchor}"' in other, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_studies_shown_in_the_documents_are_valid(page: Path) -> None:
    for block in code_blocks(page, "yaml"):
        value = yaml.safe_load(block)
        if isinstance(value, dict) and "dataset" in value:
            study.parse(value, str(page))


def commands(line: str) -> Iterator[list[str]]:
    """The calls of our programs in a line of shell: between pipes, and after the -- of kubectl exec."""
    lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    for pipe, part in itertools.groupby(lexer, lambda word: bool(re.fullmatch(r"[|&;<>]+", word))):
        words = [] if pipe else list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Za-z_]+=.*", word), part))
        if words and words[0] == "kubectl" and "--" in words:
            words = words[words.index("--") + 1 :]
        if words and Path(words[0]).name in PROGRAMS:
            yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_shown_in_the_documents_exist(page: Path) -> None:
    for block in code_blocks(page, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for words in commands(line):
                command: Any = click_command(Path(words.pop(0)).name)
                while words and hasattr(command, "commands"):
                    assert words[0] == "--help" or words[0] in command.commands, f"{page.name}: {line}"
                    if words[0] == "--help":
                        break
                    command = command.commands[words.pop(0)]
                flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
                for word in words:
                    if re.match(r"--?[a-z]", word):
                        assert word.split("=")[0] in flags | {"--help"}, f"{page.name}: {word} in {line}"


# ---- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "forbidden"),
    [
        ("federation/study.py", "orchestrator"),
        ("appliance/settings.py", "orchestrator"),
        ("orchestrator/__init__.py", "appliance"),
        ("appliance/link/__init__.py", "appliance.worker"),
        ("appliance/link/__init__.py", "torch"),
        ("federation/study.py", "nnunetv2"),
        ("orchestrator/admin/__init__.py", "flwr"),
        ("appliance/settings.py", "docker"),
        ("appliance/worker/__init__.py", "requests"),
    ],
)
def test_layer_rules_catch(tmp_path: Path, file: str, forbidden: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / file, "a", encoding="utf-8") as stream:
        stream.write(f"\n\ndef _breach():\n    import {forbidden}\n")
    check = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
    assert forbidden in done.stdout


# ---- scripts --------------------------------------------------------------------------------------------------------


def test_make_knows_the_agreed_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    for target in ("demo", "test", "lint", "benchmark", "clean"):
        assert f"make {target} " in done.stdout


def test_ci_runs_the_tests_then_the_lint() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert text.index("\nstep test\n") < text.index("\nstep lint\n")


def test_gitignore_keeps_no_source_out_of_the_repository() -> None:
    """Once it did: a fresh clone lacked the chart's demo, and every test passed where the files had been written."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout")
    folders = [*PACKAGES, "helm", "images", "compose", "tests", "docs", "benchmarks"]
    told = subprocess.run(
        ["git", "status", "--ignored", "--porcelain", "--untracked-files=all", "--", *folders],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if told.returncode != 0:
        pytest.skip(f"git does not answer here: {told.stderr.strip()}")
    made = ("__pycache__", ".pyc", "benchmarks/")
    assert not [
        line for line in told.stdout.splitlines() if line.startswith("!!") and not any(part in line for part in made)
    ]


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text.split("\n\n")[0] + text.split("\n\n")[1]
    assert project()["license"] == "Apache-2.0"
