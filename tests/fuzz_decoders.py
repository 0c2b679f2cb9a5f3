"""Coverage-guided fuzzing of everything that reads what a peer sends; run by tests/test_fuzz.py, or by hand for hours::

    python tests/fuzz_decoders.py -max_total_time=3600

A decoder may take its input or raise a FednnunetError; whatever else happens ends the run with the input that did it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
with atheris.instrument_imports(include=["federation"]):
    from federation import keypairs, signing, study, tasks
    from federation.errors import FednnunetError
    from federation.plans import check_plans
    from federation.weights import TensorFile

STUDY = study.parse(
    {
        "name": "t",
        "dataset": "Dataset001_T",
        "sites": ["a"],
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "x": 1},
    }
)
ARRIVED = Path(tempfile.mkdtemp()) / "arrived"


def one_input(data: bytes) -> None:
    """Give one input to every decoder."""
    ARRIVED.write_bytes(data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    decoders = [
        lambda: tasks.parse_task(data),
        lambda: tasks.parse_result(data),
        lambda: signing.open_message(data.decode("latin-1"), "task", "coordinator", []),
        lambda: keypairs.load_public(data, "fuzz"),
        lambda: [opened.read(name) for opened in [TensorFile(ARRIVED)] for name in opened.names],
        lambda: study.parse(value),
    ]
    if isinstance(value, dict):
        decoders.append(lambda: check_plans(value, STUDY))
    for decode in decoders:
        try:
            decode()
        except FednnunetError:
            continue


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
