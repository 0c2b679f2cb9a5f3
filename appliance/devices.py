"""The device that a site computes on: which one, and what its errors mean. Imports no torch.

Source of the errors' texts: torch 2.13 (`c10::OutOfMemoryError`, "CUDA error: ...", "CUBLAS_STATUS_ALLOC_FAILED").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from federation.errors import Code, FednnunetError

PATTERN = r"^(cpu|mps|cuda(:[0-9]+)?)$"


def require(torch: Any, device: str) -> None:
    """Raise FNU-706 when a device is not there.

    Parameters
    ----------
    torch : module
        torch.
    device : str
        cpu, mps, cuda or cuda:N, the Nth that this process sees.
    """
    kind, _, index = device.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise FednnunetError(Code.DEVICE_MISSING, device)
    if kind == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= seen:
            raise FednnunetError(Code.DEVICE_MISSING, f"{device}: torch sees {seen or 'no'} GPU{'s' * (seen > 1)} here")


def visible(device: str, environ: Mapping[str, str]) -> str | None:
    """What CUDA_VISIBLE_DEVICES has to be for cuda:N to be the one device that is seen; None where that is not asked.

    N counts what this process sees already: a scheduler that gave it GPU 5 alone has cuda:0 mean that one. A variable
    that is set to nothing shows no GPU, as CUDA has it. Raises FNU-706 where fewer are seen.
    """
    index, shown = device.partition(":")[2], environ.get("CUDA_VISIBLE_DEVICES")
    if not index:
        return None
    if shown is None:
        return index
    given = [each.strip() for each in shown.split(",") if each.strip()]
    if int(index) >= len(given):
        what = f"{','.join(given)} alone" if given else "no GPU"
        raise FednnunetError(Code.DEVICE_MISSING, f"{device}: CUDA_VISIBLE_DEVICES shows {what}")
    return given[int(index)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error leaves a CUDA context that nothing can use any more (only a new process helps)."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)
