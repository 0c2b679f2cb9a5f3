"""`python -m orchestrator superlink|coordinator`: the processes that `orchestrator start` keeps alive."""

from __future__ import annotations

import argparse
from pathlib import Path

from federation import logs
from federation.processes import end_with_parent, reach_loopback_directly
from orchestrator import server


def main() -> None:
    """Parse the arguments and become one of the two."""
    parser = argparse.ArgumentParser(prog="orchestrator")
    parser.add_argument("role", choices=["superlink", "coordinator"])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--fleet-host", required=True)
    parser.add_argument("--fleet-port", type=int, required=True)
    parser.add_argument("--control-host", required=True)
    parser.add_argument("--control-port", type=int, required=True)
    parser.add_argument("--poll", type=float, required=True)
    arguments = vars(parser.parse_args())
    role = arguments.pop("role")
    end_with_parent()
    reach_loopback_directly()
    logs.configure()
    settings = server.Server(**arguments)
    (server.superlink if role == "superlink" else server.coordinator)(settings)


if __name__ == "__main__":
    main()
