"""Which device a process computes on, and what its errors mean; without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from appliance import devices
from federation.errors import Code, FednnunetError


@pytest.mark.parametrize(
    ("device", "given", "seen"),
    [
        ("cpu", "0", None),
        ("cuda", "3", None),
        ("cuda:1", None, "1"),
        ("cuda", "", None),
        ("cuda:0", "2", "2"),
        ("cuda:0", "GPU-8f5a", "GPU-8f5a"),
        ("cuda:1", "4, 5", "5"),
    ],
)
def test_a_numbered_gpu_is_one_of_those_that_the_process_was_given(
    device: str, given: str | None, seen: str | None
) -> None:
    assert devices.visible(device, {} if given is None else {"CUDA_VISIBLE_DEVICES": given}) == seen


@pytest.mark.parametrize(
    ("device", "given", "said"),
    [
        ("cuda:2", "4,5", "4,5 alone"),
        ("cuda:1", "0", "0 alone"),
        ("cuda:1", "GPU-8f5a", "GPU-8f5a alone"),
        ("cuda:0", "", "no GPU"),
        ("cuda:1", " ", "no GPU"),
    ],
)
def test_a_gpu_that_the_process_was_not_given_is_not_taken(device: str, given: str, said: str) -> None:
    with pytest.raises(FednnunetError, match=f"shows {said}") as caught:
        devices.visible(device, {"CUDA_VISIBLE_DEVICES": given})
    assert caught.value.code is Code.DEVICE_MISSING


def a_torch(gpus: int, mps: bool = False) -> Any:
    return SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


def test_a_device_that_is_not_there_is_said_before_anything_is_done() -> None:
    for device, gpus in (("cpu", 0), ("cuda", 1), ("cuda:1", 2)):
        devices.require(a_torch(gpus), device)
    devices.require(a_torch(0, mps=True), "mps")
    for device, gpus, said in (
        ("cuda", 0, "no GPU"),
        ("cuda:1", 1, "1 GPU here"),
        ("cuda:7", 2, "2 GPUs"),
        ("mps", 1, "mps"),
    ):
        with pytest.raises(FednnunetError, match=said) as caught:
            devices.require(a_torch(gpus), device)
        assert caught.value.code is Code.DEVICE_MISSING
        assert " -device" not in caught.value.advice  # the commands call it --device, site.toml device


@pytest.mark.parametrize(
    ("error", "out_of_memory", "lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (OSError("out of memory cards"), False, False),
    ],
)
def test_what_an_error_says_of_the_device(error: Exception, out_of_memory: bool, lost: bool) -> None:
    assert (devices.is_out_of_memory(error), devices.is_lost(error)) == (out_of_memory, lost)
