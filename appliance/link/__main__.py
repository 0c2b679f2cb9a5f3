"""`python -m appliance.link supernode|link|metrics`: the processes that face the network."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from appliance import settings as site_settings
from federation import logs
from federation.processes import end_with_parent, reach_loopback_directly


def main() -> None:
    """Parse the arguments and become one of them."""
    parser = argparse.ArgumentParser(prog="appliance.link")
    parser.add_argument("role", choices=["supernode", "link", "metrics"])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--runtime-port", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.role != "metrics" and not arguments.runtime_port:
        parser.error("--runtime-port is needed")
    end_with_parent()
    reach_loopback_directly()
    logs.configure()
    settings = site_settings.load(arguments.config)
    if arguments.role == "metrics":
        from appliance.link.metrics import Appliance
        from federation import scraping

        scraping.serve(Appliance(settings.state), settings.metrics_host, settings.metrics_port)
        return
    os.environ["FLWR_HOME"] = str(settings.state / "link" / "flower")
    from appliance.link import app

    if arguments.role == "link":
        app.main(settings, arguments.runtime_port)
        return
    from appliance.link import clock
    from federation.flower import supernode

    files = supernode.SuperNodeFiles(
        settings.ca_certificate, settings.site_key, app.runner_secret(settings), settings.state / "link" / "node_id"
    )
    supernode.run(
        settings.orchestrator, files, arguments.runtime_port, settings.poll, refused=partial(clock.look, settings)
    )


if __name__ == "__main__":
    main()
