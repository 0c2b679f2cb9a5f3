"""Signed tasks and answers, and the hospital's policy: each attack by its name, on the real link."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import APPLIANCE, command, good, phantom_study
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.ledger_commands import in_columns
from appliance.link.app import Link
from appliance.link.ledger import Ledger
from appliance.link.policy import DEFAULT, Approvals, Policy, load, write_default
from appliance.link.trust import Trust, allow_rewind
from appliance.plain_words import in_plain_words
from appliance.spool import WEIGHTS, Spool
from appliance.worker import site_report
from federation import enrollment, keypairs, signing, tasks, weights
from federation.audit import read
from federation.errors import Code, FednnunetError
from federation.flower.runner import Answer, Asked
from federation.study import Study, parse
from federation.tasks import Kind, Result, Task
from orchestrator.signatures import CoordinatorSignatures

SITE, OTHER = "hospital_a", "hospital_b"
COORDINATOR = ed25519.Ed25519PrivateKey.generate()
STRANGER = ed25519.Ed25519PrivateKey.generate()
KEYS = {site: ec.generate_private_key(ec.SECP384R1()) for site in (SITE, OTHER)}


def public_line(site: str) -> bytes:
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return KEYS[site].public_key().public_bytes(encoding, form) + f" {site}\n".encode()


def a_study(**changes: Any) -> Study:
    return parse({**phantom_study([SITE, OTHER], rounds=5), **changes})


def a_task(kind: Kind = Kind.DESCRIBE, study: Study | None = None, site: str = SITE, **changes: Any) -> Task:
    if kind is Kind.TRAIN:
        changes = {"fold": "all", "round": 1, **changes}
    return Task(study=study or a_study(), site=site, kind=kind, **changes)


def description(task: Task) -> Result:
    return Result.answering(task, description=tasks.Description(training_cases=5, test_cases=0))


class House:
    """A hospital's link over a real spool, its ledger and its policy; the worker answers at once."""

    def __init__(self, folder: Path, policy: Policy | None = None) -> None:
        self.folder = folder
        self.policy = policy or Policy(studies="any")
        self.approvals = Approvals(folder / "studies")
        self.spool = Spool(folder / "spool")
        self.answering: Callable[[Task], Result] = description
        self.start()

    def start(self) -> None:
        """A new link on the same files."""
        self.link = Link(
            SITE,
            KEYS[SITE],
            Trust(SITE, [COORDINATOR.public_key()], self.folder / "arrivals.jsonl"),
            lambda: self.policy,
            self.approvals,
            self.spool,
            Ledger(self.folder / "ledger.jsonl", "orchestrator:8443"),
        )

    def arrives(self, message: str) -> Answer:
        """A message reaches the link."""
        over = threading.Event()
        worker = threading.Thread(target=self._work, args=(over,), daemon=True)
        worker.start()
        try:
            return self.link.handle(Asked(message, None), over)
        finally:
            over.set()
            worker.join()

    def _work(self, over: threading.Event) -> None:
        while not over.wait(0.01):
            for task in self.spool.waiting():
                self.spool.put_result(task, self.answering(task))

    @property
    def arrivals(self) -> list[tuple[str, int | None]]:
        return [(line["event"], line.get("number")) for line in read(self.folder / "arrivals.jsonl")]

    @property
    def left(self) -> list[dict[str, Any]]:
        return read(self.folder / "ledger.jsonl")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def signed(task: Task, key: Any = COORDINATOR, signer: str = "coordinator") -> str:
    return signing.sign("task", task.model_dump_json(), signer, key)[0]


def refused(code: Code, call: Callable[[], object]) -> FednnunetError:
    with pytest.raises(FednnunetError) as error:
        call()
    assert error.value.code is code, error.value
    return error.value


def changed(message: str, **changes: Any) -> str:
    return json.dumps({**json.loads(message), **changes})


# tasks, at the site


def test_a_signed_task_is_done_and_its_answer_is_signed_for_it(house: House) -> None:
    signatures = CoordinatorSignatures(COORDINATOR, lambda site: public_line(site))
    message, nonce = signatures.sign_task(a_task().model_dump_json())
    answer = house.arrives(message)
    assert json.loads(signatures.open_answer(SITE, answer.body, nonce))["description"]["training_cases"] == 5
    assert house.arrivals == [("accepted", None)]
    (line,) = house.left
    assert (line["kind"], line["to"], line["tensors"]) == ("describe", "orchestrator:8443", 0)


FORGERIES: dict[str, Callable[[], str]] = {
    "not signed": lambda: a_task().model_dump_json(),
    "nothing": lambda: "",
    "signed by a stranger": lambda: signed(a_task(), STRANGER),
    "signed by another hospital": lambda: signed(a_task(), KEYS[OTHER], OTHER),
    "signed by another hospital as coordinator": lambda: signed(a_task(), KEYS[OTHER]),
    "a changed body": lambda: changed(signed(a_task()), body=a_task(study=a_study(rounds=6)).model_dump_json()),
    "one more blank in the body": lambda: changed(signed(a_task()), body=a_task().model_dump_json() + " "),
    "another nonce": lambda: changed(signed(a_task()), nonce="0" * 32),
    "another purpose": lambda: changed(signed(a_task()), purpose="answer"),
    "a signature of nothing": lambda: changed(signed(a_task()), signature=""),
    "one more key": lambda: changed(signed(a_task()), trusted=True),
    "an answer to something": lambda: changed(signed(a_task()), answers="0" * 32),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_task_is_refused_and_recorded_and_never_reaches_the_worker(house: House, forgery: str) -> None:
    refused(Code.SIGNATURE_REFUSED, lambda: house.arrives(FORGERIES[forgery]()))
    assert house.arrivals == [("refused", Code.SIGNATURE_REFUSED.number)]
    assert house.spool.waiting() == []
    assert house.left == []


def test_a_task_for_another_site_is_refused_though_it_is_signed(house: House) -> None:
    refused(Code.TASK_REFUSED, lambda: house.arrives(signed(a_task(site=OTHER))))


def test_a_replayed_task_is_refused_also_by_a_link_that_was_started_again(house: House) -> None:
    message = signed(a_task())
    house.arrives(message)
    refused(Code.TASK_REPLAYED, lambda: house.arrives(message))
    house.start()
    refused(Code.TASK_REPLAYED, lambda: house.arrives(message))
    assert len(house.left) == 1
    house.arrives(signed(a_task()))  # sent again by the coordinator: signed again, answered from the outbox
    assert len(house.left) == 2


def trained(task: Task) -> Result:
    report = tasks.Training(
        plans_sha256="0" * 64,
        cases=5,
        epochs=1,
        learning_rate=[0.1],
        train_loss=[1.0],
        val_loss=[1.0],
        pseudo_dice=[[0.5]],
        seconds={},
    )
    return Result.answering(task, training=report)


@pytest.mark.parametrize(
    "change", [{"train_loss": []}, {"pseudo_dice": [[0.5], [0.5]]}, {"learning_rate": [float("nan")]}]
)
def test_a_malformed_report_is_refused_when_it_is_read(change: dict[str, Any]) -> None:
    """Once in the journal it would end the study when the curves are drawn, after all rounds."""
    report = json.loads(trained(a_task(Kind.TRAIN)).model_dump_json())
    report["training"].update(change)
    refused(Code.ENVELOPE_INVALID, lambda: tasks.parse_result(json.dumps(report)))


def test_a_round_that_was_kept_back_is_refused_once_a_later_one_was_seen(house: House) -> None:
    house.answering = trained
    kept_back = signed(a_task(Kind.TRAIN, round=1))
    house.arrives(signed(a_task(Kind.TRAIN, round=3)))
    error = refused(Code.TASK_REPLAYED, lambda: house.arrives(kept_back))
    assert "round 1 of fold all, after round 3" in error.found
    house.arrives(signed(a_task(Kind.TRAIN, round=3)))
    house.arrives(signed(a_task(Kind.TRAIN, round=4)))
    house.start()
    refused(Code.TASK_REPLAYED, lambda: house.arrives(signed(a_task(Kind.TRAIN, round=2))))
    another = a_study(seed=7)
    house.arrives(signed(a_task(Kind.TRAIN, study=another, round=1)))


ONE_NAME = [
    (Kind.DESCRIBE, {"round": 1}),
    (Kind.FINGERPRINT, {"fold": "all"}),
    (Kind.FINGERPRINT, {"fold": "all", "round": 2}),
    (Kind.PREPARE, {"fold": "all"}),
    (Kind.TRAIN, {"fold": "all"}),
    (Kind.TRAIN, {"round": 1}),
    (Kind.VALIDATE, {}),
    (Kind.VALIDATE, {"fold": "all", "round": 1}),
    (Kind.FINISH, {"fold": "all", "round": 1}),
    (Kind.COMPARE, {"fold": "all", "round": 1}),
]


@pytest.mark.parametrize(("kind", "place"), ONE_NAME)
def test_a_task_has_one_name_so_that_its_question_is_answered_once(
    house: House, kind: Kind, place: dict[str, Any]
) -> None:
    """Validate with a round beside it was another task for each number, with other weights to judge each time."""
    body = {**json.loads(a_task(study=a_study(compare="local")).model_dump_json()), "kind": kind, **place}
    message = signing.sign("task", json.dumps(body), "coordinator", COORDINATOR)[0]
    refused(Code.ENVELOPE_INVALID, lambda: house.arrives(message))
    assert house.spool.waiting() == []
    assert house.left == []


def test_after_its_validation_a_fold_is_trained_no_more_and_no_round_leaves_twice(house: House) -> None:
    """With Validate the last round's weights are freed: asked again, it was trained again, from any weights."""
    house.answering = lambda task: trained(task) if task.kind is Kind.TRAIN else description(task)
    for number in range(1, 6):
        house.arrives(signed(a_task(Kind.TRAIN, round=number)))
    house.arrives(signed(a_task(Kind.TRAIN, round=5)))
    house.arrives(signed(a_task(Kind.VALIDATE, fold="all")))
    error = refused(Code.TASK_REPLAYED, lambda: house.arrives(signed(a_task(Kind.TRAIN, round=5))))
    assert "after its training" in error.found
    house.start()
    refused(Code.TASK_REPLAYED, lambda: house.arrives(signed(a_task(Kind.TRAIN, round=5))))
    house.arrives(signed(a_task(Kind.VALIDATE, fold="all")))
    allow_rewind(house.folder / "arrivals.jsonl", a_study().id)
    house.arrives(signed(a_task(Kind.TRAIN, round=5)))


def test_a_study_that_does_not_name_this_hospital_asks_it_for_nothing(house: House) -> None:
    refused(Code.POLICY_REFUSED, lambda: house.arrives(signed(a_task(study=a_study(sites=[OTHER])))))


def test_after_a_restored_backup_a_person_lets_the_study_go_back_once(house: House) -> None:
    house.answering = trained
    house.arrives(signed(a_task(Kind.TRAIN, round=4)))
    allow_rewind(house.folder / "arrivals.jsonl", a_study().id)
    house.arrives(signed(a_task(Kind.TRAIN, round=2)))
    house.start()
    house.arrives(signed(a_task(Kind.TRAIN, round=3)))
    refused(Code.TASK_REPLAYED, lambda: house.arrives(signed(a_task(Kind.TRAIN, round=2))))
    assert ("rewound", None) in house.arrivals


def test_a_changed_or_missing_line_of_what_arrived_is_found_at_start(house: House) -> None:
    house.arrives(signed(a_task()))
    house.arrives(signed(a_task()))
    path = house.folder / "arrivals.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    refused(Code.JOURNAL_DAMAGED, house.start)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=400) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_no_text_makes_the_decoder_do_anything_but_refuse(text: str) -> None:
    keys = [COORDINATOR.public_key()]
    refused(Code.SIGNATURE_REFUSED, lambda: signing.open_message(text, "task", "coordinator", keys))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.characters())
def test_no_changed_character_passes(place: int, character: str) -> None:
    message = signed(a_task())
    place %= len(message)
    forged = message[:place] + character + message[place + 1 :]
    keys = [COORDINATOR.public_key()]
    with contextlib.suppress(FednnunetError):
        opened = signing.open_message(forged, "task", "coordinator", keys)
        assert opened.body == a_task().model_dump_json(), "at most the envelope's own spelling may differ"


def test_a_message_of_any_size_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "MAX_MESSAGE", 1000)
    error = refused(
        Code.SIGNATURE_REFUSED,
        lambda: signing.open_message("[" * 2000, "task", "coordinator", [COORDINATOR.public_key()]),
    )
    assert "2000 characters" in error.found


# answers, at the orchestrator


def an_answer(site: str = SITE, key: Any = None, nonce: str = "1" * 32) -> str:
    body = description(a_task(site=site)).model_dump_json()
    return signing.sign("answer", body, site, key or KEYS[site], nonce)[0]


def test_an_answer_counts_only_from_its_site_to_its_sending_and_while_the_site_is_registered() -> None:
    registered = {SITE: public_line(SITE), OTHER: public_line(OTHER)}
    signatures = CoordinatorSignatures(COORDINATOR, registered.get)
    good_one = an_answer()
    assert signatures.open_answer(SITE, good_one, "1" * 32)
    attacks = {
        "replayed for a later sending": lambda: signatures.open_answer(SITE, good_one, "2" * 32),
        "another site's": lambda: signatures.open_answer(OTHER, good_one, "1" * 32),
        "another site's key": lambda: signatures.open_answer(SITE, an_answer(key=KEYS[OTHER]), "1" * 32),
        "another site in its name": lambda: signatures.open_answer(OTHER, changed(good_one, signer=OTHER), "1" * 32),
        "a changed body": lambda: signatures.open_answer(SITE, changed(good_one, body="{}"), "1" * 32),
        "a task sent back": lambda: signatures.open_answer(SITE, signed(a_task()), "1" * 32),
    }
    for attack in attacks.values():
        refused(Code.SIGNATURE_REFUSED, attack)
    del registered[SITE]
    refused(Code.SITE_NOT_REGISTERED, lambda: signatures.check_site(SITE))
    refused(Code.SITE_NOT_REGISTERED, lambda: signatures.open_answer(SITE, good_one, "1" * 32))


def test_two_coordinator_keys_are_read_from_one_file_during_a_rotation() -> None:
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    text = b"# old, then new\n" + b"".join(key.public_key().public_bytes(*form) for key in (STRANGER, COORDINATOR))
    keys = keypairs.load_public(text, "coordinator.pub")
    assert len(keys) == 2
    assert signing.open_message(signed(a_task()), "task", "coordinator", keys).body
    refused(Code.STATE_NOT_READY, lambda: keypairs.load_public(b"no key", "coordinator.pub"))
    refused(Code.STATE_NOT_READY, lambda: keypairs.load_private(b"no key", "site.key"))


@pytest.mark.parametrize("letters", ["utf-8", "latin-1"])
def test_a_key_may_have_a_comment_in_any_letters(letters: str) -> None:
    """ssh-keygen takes the comment from the user's and the machine's names."""
    public, comment = COORDINATOR.public_key(), "Jürgen@Käthes-Büro".encode(letters)
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for text in (line + b" " + comment + b"\n", b"# " + comment + b"\n" + pem + b"# " + comment + b"\n"):
        assert keypairs.load_public(text, "coordinator.pub") == [public]
        assert enrollment.fingerprint(text) == enrollment.fingerprint(line)
    damaged = pem.replace(b"BEGIN", b"BEGONE")
    refused(Code.STATE_NOT_READY, lambda: keypairs.load_public(pem + damaged, "coordinator.pub"))


# the policy


def test_a_study_waits_until_a_person_has_approved_it(house: House) -> None:
    house.policy = Policy()
    refused(Code.STUDY_NOT_APPROVED, lambda: house.arrives(signed(a_task())))
    ((waiting, said),) = house.approvals.all()
    assert (waiting.id, said) == (a_study().id, None)
    house.approvals.say(waiting, "approved")
    house.arrives(signed(a_task()))
    refused(Code.STUDY_NOT_APPROVED, lambda: house.arrives(signed(a_task(study=a_study(rounds=6)))))
    house.approvals.say(waiting, "denied")
    refused(Code.STUDY_DENIED, lambda: house.arrives(signed(a_task())))
    assert ("refused", Code.STUDY_DENIED.number) in house.arrivals


LIMITS: dict[str, tuple[Policy, Task]] = {
    "a task": (Policy(studies="any", tasks=[Kind.DESCRIBE]), a_task(Kind.FINGERPRINT)),
    "rounds": (Policy(studies="any", max_rounds=4), a_task()),
    "a fine fingerprint": (Policy(studies="any", fingerprint_min_cases=3), a_task(Kind.FINGERPRINT)),
    "scores": (Policy(studies="any", scores_may_leave=False), a_task(Kind.VALIDATE, fold="all")),
    "what the study is none of: a fingerprint": (
        Policy(studies="any"),
        a_task(Kind.FINGERPRINT, a_study(mode="asymfedavg")),
    ),
    "what the study is none of: training": (Policy(studies="any"), a_task(Kind.TRAIN, a_study(stop_after="prepare"))),
    "what the study is none of: a comparison": (Policy(studies="any"), a_task(Kind.COMPARE, fold="all")),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_the_policy_does_not_allow_is_refused_before_the_worker_sees_it(house: House, limit: str) -> None:
    house.policy, task = LIMITS[limit]
    error = refused(Code.POLICY_REFUSED, lambda: house.arrives(signed(task)))
    assert error.found not in error.scrubbed()
    assert house.spool.waiting() == []


def test_a_study_named_in_the_policy_needs_no_other_approval(house: House) -> None:
    house.policy = Policy(studies=[a_study().id])
    house.arrives(signed(a_task()))
    refused(Code.STUDY_NOT_APPROVED, lambda: house.arrives(signed(a_task(study=a_study(seed=1)))))


def test_more_weights_than_allowed_stay_in_the_house(house: House) -> None:
    house.policy = Policy(studies="any", max_weights_mb=1)
    large = tasks.Weights(encoding="full", file_sha256="0" * 64, nbytes=2_000_000, digest="0" * 64)
    house.answering = lambda task: trained(task).model_copy(update={"weights": large})
    refused(Code.POLICY_REFUSED, lambda: house.arrives(signed(a_task(Kind.TRAIN))))
    assert house.left == []
    assert house.arrivals == [("accepted", None), ("refused", Code.POLICY_REFUSED.number)]


def test_a_study_that_is_denied_while_the_worker_works_leaves_nothing_and_says_so(house: House) -> None:
    def answering(task: Task) -> Result:
        house.approvals.say(task.study, "denied")
        return description(task)

    house.answering = answering
    refused(Code.STUDY_DENIED, lambda: house.arrives(signed(a_task())))
    assert house.left == []
    assert house.arrivals == [("accepted", None), ("refused", Code.STUDY_DENIED.number)]


def test_what_a_later_version_left_here_holds_up_nothing(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """The version was rolled back: a stored study has fields that this one does not know."""
    later = a_study(name="later")
    house.approvals.meet(later)
    house.spool.put_task(Task(study=later, site=SITE, kind=Kind.DESCRIBE), None)
    for path in (house.folder / "studies" / f"{later.id}.json", *house.spool.inbox.glob("*/*/task.json")):
        value = json.loads(path.read_bytes())
        value["study"]["of_a_later_version"] = 1
        path.write_text(json.dumps(value))
    house.arrives(signed(a_task()))
    assert [result.answers(a_task()) for result in [house.spool.result(a_task())] if result] == [True]
    for _ in range(3):
        assert house.spool.waiting() == []
    assert [study.name for study, _ in house.approvals.all()] == [a_study().name]
    assert [study.name for study in site_report.studies(house.spool)] == [a_study().name]
    said = [record.getMessage() for record in caplog.records if "is left out: FNU-605" in record.getMessage()]
    assert len([line for line in said if later.id in line]) == len(said) == len({*said})


def of_a_later_version(path: Path, *parts: str) -> None:
    """Write a field that this version does not know into a file, or into a part of it."""
    value = json.loads(path.read_bytes())
    inner = value
    for part in parts:
        inner = inner[part]
    inner["of_a_later_version"] = 1
    path.write_text(json.dumps(value))


def test_what_a_later_version_left_of_this_very_study_does_not_hold_it_up(house: House) -> None:
    """Its id and its tasks' names are the same there: a default that is new is left out of them."""
    task = a_task()
    house.approvals.say(task.study, "approved")
    house.spool.put_task(task, None)
    stored = house.folder / "studies" / f"{task.study.id}.json"
    of_a_later_version(stored, "study")
    of_a_later_version(house.spool.task_parcel(task).body, "study")
    assert house.spool.waiting() == []
    house.policy = Policy(studies="approve")
    house.arrives(signed(task))
    assert [study.name for study, _ in house.approvals.all()] == [task.study.name], "a person can see it again"

    of_a_later_version(house.spool.result_parcel(task).body)
    house.arrives(signed(task))
    assert [line["kind"] for line in house.left] == [task.kind, task.kind]
    assert [result.answers(task) for result in [house.spool.result(task)] if result] == [True]


def test_a_worker_that_answers_anew_while_its_failure_is_taken_away_keeps_its_answer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, real = a_task(), a_task(attempt=2), shutil.rmtree
    house.spool.put_task(first, None)
    failure = tasks.Failure(problems=[tasks.Count(code=Code.DISK_FULL.number, count=1)])
    house.spool.put_result(first, Result.answering(first, failure=failure))

    def slow(path: Path, **options: Any) -> None:
        if ".retired-" in path.name and path.exists() and house.spool.result(second) is None:
            house.spool.put_result(second, description(second))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    house.spool.put_task(second, None)
    assert house.spool.result(second) == description(second)


def test_the_sites_report_leaves_out_what_a_later_version_has_written_of_its_study(house: House) -> None:
    study = a_study()
    for kind in (Kind.DESCRIBE, Kind.FINGERPRINT):
        task = Task(study=study, site=SITE, kind=kind)
        house.spool.put_task(task, None)
        house.spool.put_result(task, description(task))
    first = Task(study=study, site=SITE, kind=Kind.DESCRIBE)
    of_a_later_version(house.spool.task_parcel(first).body, "study")
    of_a_later_version(house.spool.result_parcel(first).body)
    assert site_report.studies(house.spool) == [study]
    found = site_report.SiteStudy(house.spool, house.folder / "work", study.id)
    assert [result.kind for result in found.results] == [Kind.FINGERPRINT]


@pytest.mark.parametrize(
    ("hours", "now", "is_open"),
    [
        ("any", "03:00", True),
        ("08:00-17:30", "08:00", True),
        ("08:00-17:30", "17:30", False),
        ("19:00-06:30", "23:59", True),
        ("19:00-06:30", "00:10", True),
        ("19:00-06:30", "12:00", False),
    ],
)
def test_hours_may_go_over_midnight(hours: str, now: str, is_open: bool) -> None:
    assert Policy(hours=hours).is_open(dt.time.fromisoformat(now)) is is_open


def test_outside_the_hours_a_task_waits_and_ends_with_its_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.link.app.HOURS_LOOK", 0.05)
    monkeypatch.setattr(Policy, "is_open", lambda self, now: False)
    over = threading.Event()
    threading.Timer(0.3, over.set).start()
    refused(Code.CANCELLED, lambda: house.link.handle(Asked(signed(a_task()), None), over))
    assert house.spool.waiting() == []


def test_a_study_that_is_denied_while_it_waits_for_its_hours_does_not_begin(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.link.app.HOURS_LOOK", 0.05)
    study, closed = a_study(), threading.Event()

    def is_open(policy: Policy, now: dt.time) -> bool:
        if closed.is_set():
            return True
        house.approvals.say(study, "denied")
        closed.set()
        return False

    monkeypatch.setattr(Policy, "is_open", is_open)
    refused(Code.STUDY_DENIED, lambda: house.arrives(signed(a_task())))


def test_the_default_that_is_written_says_what_the_default_is(tmp_path: Path) -> None:
    write_default(tmp_path / "policy.toml")
    assert load(tmp_path / "policy.toml") == Policy() == load(tmp_path / "missing.toml")
    assert (tmp_path / "policy.toml").read_text() == DEFAULT
    (tmp_path / "policy.toml").write_text('studies = "all"\nhours = "late"\nmore = 1\n')
    error = refused(Code.SETTINGS_INVALID, lambda: load(tmp_path / "policy.toml"))
    for named in ("studies", "hours", "more"):
        assert named in error.found


def test_the_link_frees_the_weights_of_a_round_once_the_next_task_of_the_fold_is_there(house: House) -> None:
    """A thousand rounds do not fill the disk: one update for a fold lies in the outbox, and none after validation."""
    study, left = a_study(rounds=3), []
    for kind, number in ((Kind.TRAIN, 1), (Kind.TRAIN, 2), (Kind.TRAIN, 3), (Kind.VALIDATE, None), (Kind.FINISH, None)):
        task = Task(study=study, site=SITE, kind=kind, fold="all", round=number)
        update = None
        if kind is Kind.TRAIN:
            update = house.folder / "update"
            weights.save(update, {"w": np.zeros(3, np.float32)})
        house.spool.put_result(task, trained(task), update)
        house.arrives(signed(task))
        left.append(len(list(house.spool.outbox.rglob(WEIGHTS))))
    assert left == [1, 1, 1, 0, 0]
    assert len(list(house.spool.outbox.rglob("result.json"))) == 5, "the bodies stay as a record"


# for people


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    config = tmp_path / "config"
    good(
        command(
            APPLIANCE,
            *("init", "--name", SITE, "--orchestrator", "localhost:1", "--data", tmp_path),
            *("--config", config, "--state", tmp_path / "state"),
            cwd=tmp_path,
        )
    )
    return config / "site.toml"


def test_a_person_reads_the_study_in_plain_words_and_approves_it(desk: Path, tmp_path: Path) -> None:
    empty = command(APPLIANCE, "studies", "--config", desk, cwd=tmp_path)
    assert "no study has asked" in good(empty).out
    study = a_study(keep_local=["norm"], wire="half")
    Approvals(tmp_path / "state" / "link" / "studies").meet(study)
    assert "waits: appliance approve" in good(command(APPLIANCE, "studies", "--config", desk, cwd=tmp_path)).out
    shown = good(command(APPLIANCE, "approve", study.name, "--config", desk, "--yes", cwd=tmp_path)).out
    assert in_plain_words(study, SITE) in shown
    assert "is approved" in shown
    assert "approved" in good(command(APPLIANCE, "studies", "--config", desk, cwd=tmp_path)).out
    for called in ("nothing", study.id[:3]):  # three letters of an id are too few to approve by
        unknown = command(APPLIANCE, "approve", called, "--config", desk, "--yes", cwd=tmp_path)
        assert "FNU-130" in unknown.err


def test_plain_words_say_what_leaves() -> None:
    plain = in_plain_words(a_study(), SITE)
    assert "spacing and shape of each case" in plain
    assert "with hospital_b" in plain
    asym = in_plain_words(a_study(mode="asymfedavg", keep_local=["seg_head"]), SITE)
    assert "No fingerprint." in asym
    assert "without the layers seg_head" in asym
    assert "as differences in 8 bits" in in_plain_words(a_study(wire="int8"), SITE)
    assert "nothing finer than 3 cases" in in_plain_words(a_study(fingerprint_min_cases=3), SITE)


def test_plain_words_of_a_study_that_ends_early_name_no_more_than_leaves() -> None:
    described = in_plain_words(a_study(stop_after="describe"), SITE)
    assert "ends after describe" in described
    prepared = in_plain_words(a_study(stop_after="prepare"), SITE)
    assert "A fingerprint:" in prepared
    for words in (described, prepared):
        assert "No training." in words
        assert "rounds" not in words
        assert "weights" not in words
    assert "fingerprint" not in described


def test_plain_words_say_where_another_hospital_can_tell_this_ones_weights() -> None:
    five, told = [f"hospital_{letter}" for letter in "abcde"], "each of the two can compute the other's"
    assert told in in_plain_words(a_study(), SITE)
    assert told not in in_plain_words(a_study(sites=five), SITE)
    assert told in in_plain_words(a_study(sites=five, quorum=2), SITE)
    assert told in in_plain_words(a_study(sites=five, mode="asymfedavg"), SITE)
    assert told not in in_plain_words(a_study(sites=five, mode="asymfedavg", layers="common"), SITE)
    assert "perhaps this one's" in in_plain_words(a_study(sites=five, aggregation={"method": "krum"}), SITE)


def test_the_ledger_fits_80_columns_with_every_number_whole() -> None:
    hour = dt.datetime(2026, 11, 25, 21, 53, 39, tzinfo=dt.UTC).isoformat()
    line = {"at": hour, "study": "3f0c" * 16, "kind": "fingerprint", "fold": "all", "round": 10000, "tensors": 1234}
    line |= {"body_bytes": 999_940, "weights_bytes": 0, "body_sha256": "ab" * 32, "weights_sha256": None}
    sent = {**line, "to": "orchestrator.a-long-name.example.org:9444", "failure": None}
    failed = {**line, "to": "other.example.org:9444", "failure": "FNU-402 The device ran out of memory"}
    rows = in_columns([sent, failed])
    assert max(map(len, rows)) <= 80, rows
    told = "2026-11-25 21:53 3f0c3f0c fingerprint all  10000    1234 999.9 kB abababababab"
    assert rows[0] == f"to {sent['to']}"
    assert rows[2:4] == [told, f"to {failed['to']}"]
    assert rows[5:] == [told, f"  {failed['failure']}"]


def test_the_ledger_is_shown_verified_and_exported_and_a_changed_line_is_found(desk: Path, tmp_path: Path) -> None:
    house = House(tmp_path / "state" / "link")
    house.arrives(signed(a_task()))
    house.answering = trained
    house.arrives(signed(a_task(Kind.TRAIN)))
    run = lambda *arguments: command(APPLIANCE, "ledger", *arguments, "--config", desk, cwd=tmp_path)  # noqa: E731
    shown = good(run("show"))
    piped = [row.split("\t") for row in shown.out.splitlines()]
    assert [len(row) for row in piped] == [10] * (1 + len(house.left)), "a head, and a line for each answer"
    assert shown.err.startswith("2 answers, ")
    left = house.left[-1]
    digest, size = left["weights_sha256"] or left["body_sha256"], left["body_bytes"] + left["weights_bytes"]
    assert piped[2][1:6] == [a_study().id, "train", "all", "1", "orchestrator:8443"]
    assert piped[2][6:] == [str(left["tensors"]), str(size), digest, ""]
    assert "2 lines, the chain holds" in good(run("verify")).out
    rows = good(run("export")).out.splitlines()
    assert rows[0].startswith("seq,at,study,kind")
    assert len(rows) == 3
    assert len(json.loads(good(run("export", "--format", "json")).out)) == 2
    other = a_study(name="phantom-2")
    house.arrives(signed(a_task(study=other)))
    for called, answers in ((a_study().name, 2), (a_study().id[:4], 2), (a_study().id, 2), (other.name, 1)):
        assert f"{answers} answers" in good(run("show", "--study", called)).err, called
        assert len(good(run("export", "--study", called)).out.splitlines()) == 1 + answers
    (tmp_path / "state" / "link" / "studies" / f"{other.id}.json").unlink()
    assert "1 answers" in good(run("show", "--study", other.id)).err  # the record stays
    for subcommand in ("show", "export"):
        unknown = run(subcommand, "--study", a_study().id[:3])
        assert unknown.status == 11, unknown
        assert "FNU-130" in unknown.err, unknown
    path = tmp_path / "state" / "link" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"kind":"describe"', '"kind":"finish"'))
    damaged = run("verify")
    assert damaged.status != 0
    assert "FNU-504" in damaged.err
    assert "line 1" in damaged.err
