"""Where and how torch computes: the device, the precision, and the processes that share the work."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from utils import UsageError
from utils.runtime import Place

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt, as its malloc.h numbers them."""


@dataclass(frozen=True)
class Compute:
    """The device and precision of this process, and its place among the others."""

    place: Place
    device: torch.device
    precision: str

    @classmethod
    def pick(cls, device: str, precision: str) -> Compute:
        """Resolve "auto": a GPU where there is one, bf16 where the hardware is faster at it."""
        place = Place.from_environment()
        picked = _pick_device(device, place)
        return cls(place, picked, _pick_precision(precision, picked))

    def facts(self) -> dict[str, str | int]:
        """What of it shapes the result, as parameters of the run."""
        return {
            "device_used": self.device.type,
            "precision_used": self.precision,
            "torch": torch.__version__,
            "processes": self.place.world_size,
            "threads": torch.get_num_threads(),
        }

    @contextmanager
    def processes(self) -> Iterator[None]:
        """Join the other processes, if there are any; MASTER_ADDR and MASTER_PORT say where they meet."""
        if self.place.world_size == 1:
            yield
            return
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UsageError(
                f"WORLD_SIZE is {self.place.world_size}, but {', '.join(missing)} is not set; "
                "set all four, or start with torchrun"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def shared(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network with gradients averaged over all processes."""
        if self.place.world_size == 1:
            return network
        # Our batch normalisation keeps the same statistics everywhere: there is nothing to broadcast.
        return torch.nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in at least one process; all of them get the same answer."""
        if self.place.world_size == 1:
            return flag
        count = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(count)
        return bool(count)

    def agree(self, name: str, value: str) -> None:
        """UsageError where the processes, each perhaps with a disk of its own, do not all have the same `value`."""
        if self.place.world_size == 1:
            return
        values: list[str] = [""] * self.place.world_size
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UsageError(
                    f"{name} is {values[0]} in process 0 but {other} in process {rank}; "
                    "give every process the same data"
                )

    def mean(self, values: Tensor) -> Tensor:
        """The mean of the processes' values."""
        if self.place.world_size > 1:
            dist.all_reduce(values)
        return values / self.place.world_size

    def interleave(self, share: Tensor) -> Tensor:
        """All processes' rows in order, where each holds every world_size-th row from its rank on."""
        if self.place.world_size == 1:
            return share
        shares: list[Tensor] = [torch.empty(0)] * self.place.world_size
        dist.all_gather_object(shares, share)
        rows = torch.empty((sum(map(len, shares)), *share.shape[1:]), dtype=share.dtype)
        for rank, part in enumerate(shares):
            rows[rank :: self.place.world_size] = part
        return rows


def make_deterministic() -> None:
    """The same seed gives the same bits on the same machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS since CUDA 10.2
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms(True) would import torch's compiler
    # Nothing here reads memory that it has not written; to fill it all beforehand is a twentieth of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Have glibc keep up to a GiB of what is freed: each step allocates again what the last one gave back.

    By default the system takes it back, and clearing its pages anew is a fifth of a small network's step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        c_library = ctypes.CDLL(None)
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            c_library.mallopt(option, 2**30)


def _pick_device(name: str, place: Place) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, ok in available.items() if ok)
        raise UsageError(f"device '{name}' is not available on this machine; allowed here: auto, {there}")
    return torch.device("cuda", place.local_rank) if name == "cuda" else torch.device(name)


def _pick_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8  # Ampere and later
    else:
        able = torch.cpu.get_capabilities()
        # With AMX hidden by a hypervisor, a step takes a third more in bf16: Intel's AVX-512 multiplies it no faster.
        not_intel = "Intel" not in able.get("cpu_name", "")
        fast = able.get("amx_bf16", False) or (not_intel and able.get("avx512_bf16", False))
        native = device.type == "cpu" and fast
    return "bf16" if native else "fp32"
