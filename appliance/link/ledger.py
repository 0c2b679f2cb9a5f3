"""The ledger: a hash-chained line for everything that leaves the hospital, written before it leaves."""

from __future__ import annotations

from pathlib import Path

from federation.audit import Chain
from federation.files import sha256_of
from federation.tasks import Result
from federation.weights import TensorFile


class Ledger:
    """The ledger of one site.

    Parameters
    ----------
    path : Path
        The file, JSON lines (federation.audit).
    recipient : str
        HOST:PORT of the orchestrator, written into every line.
    """

    def __init__(self, path: Path, recipient: str) -> None:
        self._chain, self._recipient = Chain(path), recipient

    def leaving(self, result: Result, body: Path, weights: Path | None) -> None:
        """Write down an answer that is about to leave.

        Parameters
        ----------
        result : Result
            The answer.
        body, weights : Path
            The files in the outbox that will be sent, byte for byte.
        """
        self._chain.append(
            "leaving",
            study=result.study_id,
            kind=str(result.kind),
            fold=result.fold,
            round=result.round,
            to=self._recipient,
            failure=result.failure.describe() if result.failure else None,
            body_bytes=body.stat().st_size,
            body_sha256=sha256_of(body),
            tensors=len(TensorFile(weights).specs) if weights else 0,
            weights_bytes=weights.stat().st_size if weights else 0,
            weights_sha256=sha256_of(weights) if weights else None,
        )
