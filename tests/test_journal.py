"""Journal, hash chain and spool: what was written is found, what was torn or changed is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.spool import WEIGHTS, Spool
from federation import audit, files, tasks
from federation.errors import Code, FednnunetError
from federation.study import Study, parse
from federation.tasks import Kind, Result, Task
from orchestrator.journal import Journal


def a_study(**changes: object) -> Study:
    return parse(
        {
            "name": "t",
            "dataset": "Dataset001_T",
            "sites": ["a", "b"],
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "x": 1},
            **changes,
        }
    )


# ---- the chain ----------------------------------------------------------------------------------------------------


def chain(path: Path, lines: int = 3) -> bytes:
    opened = audit.Chain(path)
    for number in range(lines):
        opened.append("event", number=number)
    opened.close()
    return path.read_bytes()


def test_a_torn_last_line_never_counted_and_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j"
    data = chain(path)
    for cut in range(1, 40):
        path.write_bytes(data[:-cut])
        assert [line["number"] for line in audit.read(path)] == [0, 1]
    opened = audit.Chain(path)
    opened.append("event", number=2)
    assert [line["number"] for line in audit.read(path)] == [0, 1, 2]


def test_a_changed_dropped_or_swapped_line_is_found(tmp_path: Path) -> None:
    path = tmp_path / "j"
    lines = chain(path, 4).splitlines(keepends=True)
    changed = lines[1].replace(b'"number":1', b'"number":7')
    for damaged in (
        [lines[0], changed, *lines[2:]],
        [lines[0], *lines[2:]],
        lines[1:],
        [lines[0], lines[2], lines[1], lines[3]],
        [*lines[:2], b"garbage\n", *lines[2:]],
        [*lines, lines[0]],
        [*lines[:2], b"[]\n"],
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(FednnunetError) as caught:
            audit.read(path)
        assert caught.value.code is Code.JOURNAL_DAMAGED
        with pytest.raises(FednnunetError):
            audit.Chain(path)


def test_a_line_whose_hash_was_made_again_is_found_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "j"
    lines = chain(path).splitlines()
    forged = json.loads(lines[0])
    forged["number"] = 9
    forged["hash"] = files.sha256_json({key: value for key, value in forged.items() if key != "hash"})
    path.write_bytes(b"\n".join([files.canonical_json(forged), *lines[1:], b""]))
    with pytest.raises(FednnunetError, match="line 2"):
        audit.verify(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from federation import files
path = Path(sys.argv[1])
with files.replacing(path) as temporary:
    temporary.write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_it_writes_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write_bytes(path, b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, cwd=Path(__file__).parents[1])
    assert done.returncode < 0
    assert path.read_bytes() == b"old"


def test_private_files_are_private_from_the_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "key"
    files.write_bytes(path, b"secret", 0o600)
    assert os.stat(path).st_mode & 0o777 == 0o600


# ---- the study's journal ------------------------------------------------------------------------------------------


def test_a_journal_opened_again_knows_what_happened(tmp_path: Path) -> None:
    study = a_study()
    journal = Journal(tmp_path, study)
    task = Task(study=study, site="a", kind=Kind.DESCRIBE)
    journal.write("opened", run=1, submission="one")
    journal.phase("describing")
    journal.record(task, Result.answering(task, description=tasks.Description(training_cases=5, test_cases=0)))
    journal.write("failed_answer", site="b", key="describe", attempt=1, reason="FNU-216")
    journal.write("failed", number=502, reason="because", advice="do")
    journal.close()
    again = Journal(tmp_path, study)
    assert (again.state.phase, again.state.ended, again.state.reason) == ("describing", "failed", "because")
    assert again.state.ended_submissions == {"one"}
    recorded = again.answer(task)
    assert recorded is not None
    assert recorded.description is not None
    other = task.model_copy(update={"site": "b"})
    assert again.answer(other) is None
    assert again.attempt(other) == 2, "a failed answer is asked for again under a new number"


def test_another_study_cannot_be_put_under_a_known_folder(tmp_path: Path) -> None:
    Journal(tmp_path, a_study()).close()
    with pytest.raises(FednnunetError) as caught:
        Journal(tmp_path, a_study(rounds=7))
    assert caught.value.code is Code.JOURNAL_DAMAGED


def test_only_what_recovery_needs_stays_on_the_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path, a_study())
    for number in range(4):
        folder = journal.round_folder("0", number) / "updates"
        folder.mkdir(parents=True)
        for path in (journal.global_file("0", number), folder / "a.safetensors", folder / "a.json"):
            path.write_bytes(b"x")
        journal.forget_round("0", number)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert left == ["rounds/fold_0/0002/global.safetensors", "rounds/fold_0/0003/global.safetensors"]
    assert len(list(tmp_path.rglob("updates/a.json"))) == 4, "what each site answered stays as a record"


# ---- the spool ----------------------------------------------------------------------------------------------------


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def a_task(number: int = 1, attempt: int = 1) -> Task:
    return Task(study=a_study(), site="a", kind=Kind.TRAIN, fold="0", round=number, attempt=attempt)


def incoming(spool: Spool, content: bytes = b"weights") -> Path:
    path = spool.root / "incoming"
    path.write_bytes(content)
    return path


def failure(task: Task) -> Result:
    return Result.answering(task, failure=tasks.Failure(problems=[tasks.Count(code=402, count=1)]))


def finished(task: Task) -> Result:
    return Result.answering(task, finished=tasks.Finished(model_sha256="ab" * 32))


def test_a_task_asked_twice_lies_in_the_inbox_once_and_is_done_once(spool: Spool) -> None:
    for _ in range(2):
        spool.put_task(a_task(), incoming(spool))
    assert spool.waiting() == [a_task()]
    assert spool.task_parcel(a_task()).weights is not None
    spool.put_result(a_task(), finished(a_task()))
    spool.put_task(a_task(), incoming(spool))
    assert spool.waiting() == []


def test_a_failure_is_done_again_only_for_a_later_attempt(spool: Spool) -> None:
    spool.put_task(a_task(), incoming(spool))
    spool.put_result(a_task(), failure(a_task()))
    spool.put_task(a_task(), incoming(spool))
    assert spool.waiting() == []
    spool.put_task(a_task(attempt=2), incoming(spool))
    assert spool.waiting() == [a_task(attempt=2)]
    assert spool.result(a_task()) is None


def test_a_cancelled_task_waits_no_more_until_it_is_asked_for_again(spool: Spool) -> None:
    spool.put_task(a_task(), incoming(spool))
    spool.cancel(a_task())
    assert spool.waiting() == []
    assert spool.cancelled(a_task())
    spool.put_task(a_task(), incoming(spool))
    assert spool.waiting() == [a_task()]


def test_an_answer_whose_weights_were_freed_is_done_again(spool: Spool) -> None:
    """A coordinator restored from a backup asks for an old round: the site does it again instead of failing."""
    task = a_task()
    header = tasks.Weights(encoding="full", file_sha256="ab" * 32, nbytes=7, digest="ab" * 32)
    spool.put_task(task, incoming(spool))
    spool.put_result(task, Result.answering(task, weights=header), incoming(spool))
    freed = spool.result_parcel(task).weights
    assert freed is not None
    freed.unlink()
    spool.put_task(task, incoming(spool))
    assert spool.waiting() == [task]
    assert (spool.task_parcel(task).folder / WEIGHTS).exists()


def test_no_field_of_a_task_can_name_a_folder_outside_the_spool() -> None:
    body = json.loads(a_task().model_dump_json())
    for changes in ({"fold": "../../x"}, {"round": 10**9}, {"kind": "../x"}, {"site": "../x"}, {"unknown": 1}):
        with pytest.raises(FednnunetError) as caught:
            tasks.parse_task(json.dumps(body | changes))
        assert caught.value.code is Code.ENVELOPE_INVALID
