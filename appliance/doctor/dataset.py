"""Whether the dataset fits the study's contract, in every file; without a study, whether there is one.

Every case is read, as the worker does it before a study (appliance.worker.dataset), in a child process. File names
stay in the house; outside there is the number of the error and how often it was met.
"""

from __future__ import annotations

from appliance.doctor import child
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, Status, ok, warn
from federation.errors import Code

SECONDS, SECONDS_WITH_STUDY = 120.0, 3500.0
_MOST_LINES = 6


def check(context: Context) -> list[Finding]:
    """Ask the worker's half."""
    seconds = SECONDS if context.study is None else SECONDS_WITH_STUDY
    answer = child.ask(context, "dataset", seconds)
    findings: list[Finding] = []
    for status, entries in ((Status.FAIL, answer["problems"]), (Status.WARN, answer["warnings"])):
        for entry in entries:
            code = Code.of(entry["number"])
            lines, count = entry["lines"], entry["count"]
            rest = f"\n... and {count - _MOST_LINES} more" if count > _MOST_LINES else ""
            listed = Private("", ":\n" + "\n".join(lines[:_MOST_LINES]) + rest)
            findings.append(
                Finding(
                    status,
                    f"{code.title} ({'once' if count == 1 else f'{count} times'})[files]",
                    code.advice,
                    code,
                    {"files": listed},
                    {"count": count},
                )
            )
    if any(finding.status is Status.FAIL for finding in findings):
        return findings
    cases, test = answer["training_cases"], answer["test_cases"]
    if context.study is None:
        own_words = f" and lists {cases} training cases" if isinstance(cases, int) else ""  # else: any text
        return [
            *findings,
            ok(f"dataset.json is there{own_words}; give --study to check it against a study"),
        ]
    if context.settings.name not in context.study.sites:
        findings.append(
            warn(
                "the study does not name this site",
                "Compare `name` in site.toml with the study's `sites`.",
                Code.SITES_MISMATCH,
            )
        )
    return [
        *findings,
        ok(
            f"{cases} training cases and {test} test cases with a label fit study {context.study.id[:12]}, every file",
            measured={"training_cases": cases, "test_cases": test},
        ),
    ]
