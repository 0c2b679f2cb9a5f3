"""One exchange with the sites, over a simulated network: what is lost is sent again, what fails is said, the rest waits
for nobody longer than the deadline.

The exchange's clock is simulated too: it goes on while the exchange sleeps, and stands while an answer is fetched. So
no deadline is met because the machine is busy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from unsigned import Unsigned

from federation import tasks
from federation.errors import Code, FednnunetError
from federation.flower.runner import SITE_LOST, Node
from federation.flower.transfer import Ready, Received
from federation.study import Study, parse
from federation.tasks import Kind, Result, Task, parse_task
from orchestrator import rounds
from orchestrator.journal import Journal
from orchestrator.rounds import Errand, Exchange, Outcome

LOST = sorted(SITE_LOST)[0]


@dataclass
class Clock:
    """What the exchange takes for the module `time`."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.001)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rounds, "time", made)
    return made


@dataclass(frozen=True)
class Envelope:
    """What the simulated network hands out for a message that is ready."""

    message_id: str
    reply_to: str
    received: Received
    weights: bytes | None


@dataclass
class SimulatedNetwork:
    """A carrier without a network: each site is a function from a task to an answer, or None for silence."""

    sites: dict[str, Callable[[Task], Result | Received | None]]
    online: dict[str, bool] = field(default_factory=dict)
    activated: dict[str, str] = field(default_factory=dict)
    pushed: list[Task] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    _waiting: dict[str, tuple[str, Task]] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)

    def check(self) -> None:
        pass

    def nodes(self) -> dict[str, Node]:
        return {
            site: Node(number, self.online.get(site, True), self.activated.get(site, "t0"))
            for number, site in enumerate(self.sites)
        }

    def push(self, node: Node, group: str, body: str, weights: Any, ttl: float) -> str:
        task = parse_task(body)
        self.pushed.append(task)
        message_id = f"m{next(self._numbers)}"
        self._waiting[message_id] = (list(self.sites)[node.node_id], task)
        return message_id

    def ready(self, message_ids: list[str]) -> list[Any]:
        found = []
        for message_id in message_ids:
            site, task = self._waiting[message_id]
            answer = self.sites[site](task)
            if answer is None:
                continue
            received = answer if isinstance(answer, Received) else Received(answer.model_dump_json(), False)
            found.append(Envelope(f"r{message_id}", message_id, received, None))
        return found

    def take(self, ready: Ready, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
        assert isinstance(ready, Envelope)
        return ready.received

    def withdraw(self, message_id: str) -> None:
        site, task = self._waiting[message_id]
        self.withdrawn.append(f"{task.key} {site}")


def a_study() -> Study:
    return parse(
        {
            "name": "t",
            "dataset": "Dataset001_T",
            "sites": ["a", "b", "c"],
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "x": 1},
        }
    )


def description(task: Task) -> Result:
    return Result.answering(task, description=tasks.Description(training_cases=5, test_cases=0))


def failing(code: int, retry: bool = False) -> Callable[[Task], Result]:
    problem = tasks.Count(code=code, count=1)
    return lambda task: Result.answering(task, failure=tasks.Failure(problems=[problem], retry=retry))


def ask(network: SimulatedNetwork, journal: Journal, deadline: float = 5.0, needed: int = 3, **changes: Any) -> Outcome:
    asked_full: list[tuple[str, bool]] = []

    def errand(site: str, full: bool) -> Errand:
        asked_full.append((site, full))
        task = Task(study=journal.study, site=site, kind=kind, fold="0" if kind in tasks.OF_A_FOLD else None)
        return Errand(task.model_copy(update={"attempt": journal.attempt(task)}))

    kind = changes.pop("kind", Kind.DESCRIBE)
    accept = changes.pop("accept", lambda task, result, update: {})
    exchange = Exchange(network, journal, Unsigned(), 0.01)
    outcome = exchange.ask(["c", "a", "b"], errand, accept, needed=needed, deadline=deadline)
    changes.get("asked", []).extend(asked_full)
    return outcome


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path, a_study())


def events(journal: Journal, name: str) -> list[dict[str, Any]]:
    return [line for line in journal._chain if line["event"] == name]


def test_every_answer_is_recorded_before_it_counts(journal: Journal) -> None:
    outcome = ask(SimulatedNetwork(dict.fromkeys("abc", description)), journal)
    assert sorted(outcome.answers) == ["a", "b", "c"]
    assert {line["site"] for line in events(journal, "answered")} == {"a", "b", "c"}


def test_what_was_answered_before_a_restart_is_not_asked_again(journal: Journal, tmp_path: Path) -> None:
    silent = SimulatedNetwork({"a": description, "b": lambda _: None, "c": description})
    assert sorted(ask(silent, journal, deadline=1.0).missing) == ["b"]
    journal.close()
    again = Journal(tmp_path, a_study())
    network = SimulatedNetwork(dict.fromkeys("abc", description))
    assert not ask(network, again).missing
    assert [task.site for task in network.pushed] == ["b"]


def test_the_deadline_ends_an_exchange_and_says_who_is_missing_and_why(journal: Journal, clock: Clock) -> None:
    network = SimulatedNetwork({"a": description, "b": lambda _: None, "c": description}, online={"c": False})
    started = clock.now
    outcome = ask(network, journal, deadline=0.5, needed=1)
    assert clock.now - started == pytest.approx(0.5, abs=0.02)
    assert sorted(outcome.answers) == ["a"]
    assert outcome.missing == {"b": "no answer before the deadline", "c": "offline"}
    assert network.withdrawn == ["describe b"]


def test_a_site_that_restarts_is_sent_its_task_again(journal: Journal) -> None:
    calls = itertools.count()

    def deaf_until_restart(task: Task) -> Result | None:
        if next(calls) == 2:
            network.activated["b"] = "t1"
        return description(task) if network.activated.get("b") == "t1" and len(network.pushed) > 3 else None

    network = SimulatedNetwork({"a": description, "b": deaf_until_restart, "c": description})
    assert not ask(network, journal, deadline=10).missing
    assert [task.site for task in network.pushed].count("b") == 2
    assert [line["why"] for line in events(journal, "asked") if "why" in line] == ["the site restarted"]
    assert network.withdrawn == ["describe b"]


def test_a_site_that_restarts_while_its_answer_is_fetched_is_sent_its_task_again(
    journal: Journal, clock: Clock
) -> None:
    """Nobody has the rest of that answer any more."""

    class CutOff(SimulatedNetwork):
        def take(self, ready: Ready, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
            if ready.reply_to == "m1" and not self.activated:  # b's
                self.activated["b"] = "t1"
                clock.sleep(rounds.LOOK_AT_NODES)
                wait_for(give_up, 60, "the fetch is cut off")
                return Received("", False, LOST, "gave up")
            return super().take(ready, weights, max_weights, give_up)

    network = CutOff(dict.fromkeys("abc", description))
    outcome = ask(network, journal, deadline=30.0)
    assert sorted(outcome.answers) == ["a", "b", "c"]
    assert [task.site for task in network.pushed] == ["a", "b", "c", "b"]


def test_an_answer_that_is_whole_just_after_the_deadline_leaves_nothing(journal: Journal, clock: Clock) -> None:
    class Late(SimulatedNetwork):
        def take(self, ready: Any, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
            if "-b-" in weights.name:
                wait_for(lambda: len(events(journal, "answered")) == 2, 60, "the others' answers")
                clock.sleep(1)
                wait_for(give_up, 60, "the deadline")
                weights.parent.mkdir(parents=True, exist_ok=True)
                weights.write_bytes(b"whole")
            return super().take(ready, weights, max_weights, give_up)

    outcome = ask(Late(dict.fromkeys("abc", description)), journal, deadline=0.5, needed=2)
    assert list(outcome.missing) == ["b"]
    assert list((journal.folder / "incoming").iterdir()) == []


def test_a_message_that_flower_lost_is_sent_again(journal: Journal) -> None:
    lost = iter([Received("", False, LOST, "node unavailable")])
    network = SimulatedNetwork({"a": description, "b": lambda task: next(lost, description(task)), "c": description})
    assert not ask(network, journal, deadline=10).missing
    assert [task.site for task in network.pushed].count("b") == 2


def test_a_failure_is_the_sites_last_word_unless_asking_again_may_help(journal: Journal) -> None:
    outcome = ask(SimulatedNetwork({"a": description, "b": failing(402), "c": description}), journal, needed=2)
    assert outcome.missing["b"].startswith("FNU-402")
    assert [line["reason"] for line in events(journal, "failed_answer")] == [outcome.missing["b"]]


def test_a_site_that_lacks_the_base_is_sent_full_weights(journal: Journal) -> None:
    def lacking(task: Task) -> Result:
        return failing(408, retry=True)(task) if task.attempt == 1 else description(task)

    asked: list[tuple[str, bool]] = []
    network = SimulatedNetwork({"a": description, "b": lacking, "c": description})
    assert not ask(network, journal, deadline=10, asked=asked).missing
    assert ("b", True) in asked
    assert [task.attempt for task in network.pushed if task.site == "b"] == [1, 2]


def test_a_site_that_always_asks_again_is_given_up(journal: Journal) -> None:
    network = SimulatedNetwork({"a": description, "b": failing(408, retry=True), "c": description})
    outcome = ask(network, journal, deadline=30, needed=2)
    assert "FNU-408" in outcome.missing["b"]
    assert [task.site for task in network.pushed].count("b") == 5


def test_an_exchange_that_cannot_succeed_any_more_ends_before_the_deadline(journal: Journal, clock: Clock) -> None:
    network = SimulatedNetwork({"a": failing(401), "b": failing(401), "c": lambda _: None})
    started = clock.now
    outcome = ask(network, journal, deadline=600, needed=2)
    assert clock.now - started == pytest.approx(rounds.LAST_WORDS, abs=1)
    assert sorted(outcome.missing) == ["a", "b", "c"]


def test_the_faults_of_all_sites_are_heard_not_those_of_the_quickest_alone(journal: Journal) -> None:
    calls = itertools.count()

    def slow(task: Task) -> Result | None:
        return failing(211)(task) if next(calls) > 20 else None

    outcome = ask(SimulatedNetwork({"a": failing(216), "b": slow, "c": description}), journal, needed=3)
    assert "FNU-216" in outcome.missing["a"]
    assert "FNU-211" in outcome.missing["b"]


def test_an_answer_that_is_refused_goes_to_quarantine_and_the_others_count(journal: Journal) -> None:
    def accept(task: Task, result: Result, update: Path) -> dict[str, Any]:
        if task.site == "b":
            raise FednnunetError(Code.UPDATE_REFUSED, "it holds NaN")
        return {}

    outcome = ask(SimulatedNetwork(dict.fromkeys("abc", description)), journal, needed=2, accept=accept)
    assert sorted(outcome.answers) == ["a", "c"]
    assert "it holds NaN" in outcome.missing["b"]
    assert (journal.folder / "quarantine" / "describe-b-1.json").exists()
    assert [line["site"] for line in events(journal, "refused")] == ["b"]


def test_an_answer_without_the_weights_that_it_speaks_of_costs_that_site_alone(journal: Journal) -> None:
    outcome = ask(
        SimulatedNetwork(
            {"a": description, "b": lambda task: Received(description(task).model_dump_json(), True), "c": description}
        ),
        journal,
        needed=2,
    )
    assert sorted(outcome.answers) == ["a", "c"]
    assert "FNU-507" in outcome.missing["b"]


def test_a_label_that_the_study_lacks_is_refused(journal: Journal) -> None:
    score = tasks.LabelScore(mean=0.5, std=0.1, minimum=0.4, cases=1)

    def scored(name: str) -> Callable[[Task], Result]:
        report = tasks.Validation(test={name: score}, test_cases=1, seconds=1.0)
        return lambda task: Result.answering(task, validation=report)

    network = SimulatedNetwork({"a": scored("x"), "b": scored("[/red]"), "c": scored("background")})
    outcome = ask(network, journal, needed=1, kind=Kind.VALIDATE)
    assert list(outcome.answers) == ["a"]
    assert all("FNU-507" in outcome.missing[site] for site in "bc")


def test_what_a_site_says_in_words_is_cut_and_obeyed_by_no_terminal(journal: Journal) -> None:
    said = "\x1b]0;mine\x07\x1b[2Jwell\u202e" + "x" * 10**6
    network = SimulatedNetwork({"a": description, "b": lambda task: Received("", False, 99, said), "c": description})
    outcome = ask(network, journal, needed=2)
    (line,) = events(journal, "failed_answer")
    for reason in (outcome.missing["b"], line["reason"]):
        assert reason.startswith("?]0;mine??[2Jwell?xxx")
        assert reason.isprintable()
        assert len(reason) <= 400


def test_a_site_that_loses_whatever_it_is_sent_is_sent_it_less_and_less(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "LOOK_AT_NODES", 0.01)
    network = SimulatedNetwork(
        {"a": description, "b": lambda task: Received("", False, LOST, "unavailable"), "c": description}
    )
    ask(network, journal, needed=2, deadline=1.5)
    assert 3 <= [task.site for task in network.pushed].count("b") <= 9, "0.01 s, 0.02 s, 0.04 s ... between two"


def test_a_full_disk_here_is_not_a_sites_fault(journal: Journal) -> None:
    def accept(task: Task, result: Result, update: Path) -> dict[str, Any]:
        raise FednnunetError(Code.DISK_FULL, "no space left")

    with pytest.raises(FednnunetError) as caught:
        ask(SimulatedNetwork(dict.fromkeys("abc", description)), journal, accept=accept)
    assert caught.value.code is Code.DISK_FULL
    assert events(journal, "refused") == []


@pytest.mark.parametrize(
    "answer",
    [
        Received("{}", False),
        Received("not json", False),
        Received("[" * 5000, False),
        Received('{"protocol": 1, "study_id": "../../x"}', False),
    ],
)
def test_an_answer_that_cannot_be_understood_is_refused(journal: Journal, answer: Received) -> None:
    network = SimulatedNetwork({"a": description, "b": lambda _: answer, "c": description})
    outcome = ask(network, journal, needed=2)
    assert "FNU-605" in outcome.missing["b"]


def test_an_answer_for_another_site_is_refused(journal: Journal) -> None:
    def forged(task: Task) -> Result:
        return description(task.model_copy(update={"site": "a"}))

    outcome = ask(SimulatedNetwork({"a": description, "b": forged, "c": description}), journal, needed=2)
    assert "FNU-507" in outcome.missing["b"]


def test_sites_that_never_appear_are_named(journal: Journal) -> None:
    network = SimulatedNetwork({"a": description, "b": description}, online={"b": False})
    with pytest.raises(FednnunetError, match="not online within 0 s: b, c") as caught:
        Exchange(network, journal, Unsigned(), 0.01).await_sites(["a", "b", "c"], 0.1)
    assert caught.value.code is Code.SITE_NEVER_APPEARED


def test_a_site_that_was_revoked_is_not_waited_for(journal: Journal) -> None:
    class Revoked(Unsigned):
        def check_site(self, site: str) -> None:
            if site == "b":
                raise FednnunetError(Code.SITE_NOT_REGISTERED, site)

    network = SimulatedNetwork({"a": description, "b": lambda task: None, "c": description})
    exchange = Exchange(network, journal, Revoked(), 0.01)

    def errand(site: str, full: bool) -> Errand:
        return Errand(Task(study=journal.study, site=site, kind=Kind.DESCRIBE))

    outcome = exchange.ask(["a", "b", "c"], errand, lambda *_: {}, needed=2, deadline=30)
    assert sorted(outcome.answers) == ["a", "c"]
    assert outcome.missing["b"].startswith("FNU-508")
    assert [task.site for task in network.pushed] == ["a", "c"]
