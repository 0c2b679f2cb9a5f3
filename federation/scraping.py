"""Metrics over plain HTTP, for a Prometheus that scrapes: one way for the orchestrator and for a hospital."""

from __future__ import annotations

import logging
from importlib.metadata import version

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.registry import Collector

from federation.errors import Code, FednnunetError

log = logging.getLogger("fednnunet.metrics")


def serve(collector: Collector, host: str, port: int) -> None:
    """Serve /metrics until the process ends; raises FNU-701 when nothing can listen there."""
    REGISTRY.register(collector)
    try:
        _, thread = start_http_server(port, host)
    except OSError as error:
        raise FednnunetError(Code.PORT_IN_USE, f"{host}:{port}: {error.strerror}") from error
    log.info("metrics at http://%s:%d/metrics, version %s", host, port, version("fednnunet"))
    thread.join()
