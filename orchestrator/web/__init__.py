"""The status page of the orchestrator: read-only, on the control listener, behind its token."""
