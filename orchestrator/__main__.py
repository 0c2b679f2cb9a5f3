"""`python -m orchestrator superlink|coordinator|metrics`: the processes that `orchestrator start` keeps alive."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from federation import console, logs
from federation.errors import FednnunetError
from federation.processes import end_with_parent, reach_loopback_directly
from orchestrator import server


def main() -> None:
    """Parse the arguments and become one of them."""
    parser = argparse.ArgumentParser(prog="orchestrator")
    parser.add_argument("role", choices=["superlink", "coordinator", "metrics"])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--fleet-host", required=True)
    parser.add_argument("--fleet-port", type=int, required=True)
    parser.add_argument("--control-host", required=True)
    parser.add_argument("--control-port", type=int, required=True)
    parser.add_argument("--poll", type=float, required=True)
    parser.add_argument("--metrics-host", required=True)
    parser.add_argument("--metrics-port", type=int, required=True)
    arguments = vars(parser.parse_args())
    role = arguments.pop("role")
    end_with_parent()
    reach_loopback_directly()
    logs.configure()
    settings = server.Server(**arguments)
    try:
        {"superlink": server.superlink, "coordinator": server.coordinator, "metrics": server.metrics}[role](settings)
    except FednnunetError as error:
        console.show(error)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
