"""The coordinator's child that has torch at hand: jobs, an end of idleness, and a job that meets that end."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import wait_for

from orchestrator.workshop import Workshop


@pytest.mark.long
def test_an_idle_child_ends_and_the_next_job_gets_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text(
        "import os\ndef main(arguments):\n    print(arguments, os.getppid())\n    return 3\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    workshop, parents = Workshop(idle=3.0), set[str]()

    def job(number: int) -> int:
        log = tmp_path / f"{number}.log"
        status = workshop.run("job", [str(number)], {}, log)
        said, _, parent = log.read_text().rpartition(" ")
        assert said == str([str(number)])
        parents.add(parent)
        return status

    try:
        assert [job(0), job(1)] == [3, 3]
        assert len(parents) == 1, "one child for jobs that follow each other"
        child = workshop._process
        assert child is not None
        wait_for(lambda: child.poll() is not None, 60, "the end of an idle child")
        assert child.returncode == 0

        opened = workshop.open
        calls: list[None] = []

        def open_but_at_first() -> None:  # the child ended between the look at it and the job
            calls.append(None)
            if len(calls) > 1:
                opened()

        monkeypatch.setattr(workshop, "open", open_but_at_first)
        assert job(2) == 3
        assert len(parents) == 2
        assert len(calls) == 2
    finally:
        workshop.close()
