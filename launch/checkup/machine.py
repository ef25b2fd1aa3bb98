"""What is installed, and what the hardware gives this process."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F

from data.dali import import_failure
from launch.benches.measure import machine as described
from launch.benches.measure import timed
from launch.checkup.check import Failed, Figure, Machine, Skipped
from train.world import available_cores

DALI_WHEELS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
PACKAGES = ("torchvision", *DALI_WHEELS, "numpy", "scipy", "Pillow", "timm")
GRADIENTS_MIB = {"cuda": 100, "cpu": 16}
"""Device -> of what an all-reduce is timed: about the gradients of a ResNet-50 in fp32."""
MAX_FP32_ERROR = 1e-5
"""Of a product of 1024 terms in fp32, relative to its largest value; TF32 is a hundred times worse."""


def versions(machine: Machine) -> Figure:
    """The same on all ranks, and one DALI: its wheels for two CUDA versions fill the same folder."""
    found = {name: version for name, version in described(*PACKAGES).items() if version is not None}
    installed = [name for name in DALI_WHEELS if name in found]
    here = {name: found[name] for name in ("python", "torch", *PACKAGES) if name in found}
    on_ranks = machine.world.all_gather(here)  # before a rank may leave
    if len(installed) > 1:
        raise Failed(f"{' and '.join(installed)} are both installed, in one folder: uninstall both, then install one")
    if installed and (failure := import_failure()) is not None:
        raise Failed(f"{installed[0]} is installed and does not import: {failure}")
    if any(other != here for other in on_ranks):
        raise Failed(f"the ranks run different versions; here: {here}")
    dali = f"DALI {found[installed[0]]}" if installed else "no DALI (images are read by torchvision, which is slower)"
    return Figure(f"Python {found['python']}, torch {found['torch']}, {dali}", found)


def gpu(machine: Machine) -> Figure:
    """Driver, memory, and whether this torch has code for the GPU."""
    machine.require_gpu("nothing to ask a driver")
    properties = torch.cuda.get_device_properties(machine.device)
    free, total = torch.cuda.mem_get_info(machine.device)
    capability = f"sm_{properties.major}{properties.minor}"
    product = torch.ones(256, 256, device=machine.device) @ torch.ones(256, 256, device=machine.device)
    if not bool((product == 256).all()):
        raise Failed(f"{properties.name} computes a wrong matrix product: check driver and hardware")
    numbers = {
        "gpu": properties.name,
        "capability": capability,
        "compiled_for": torch.cuda.get_arch_list(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "free_bytes": free,
        "total_bytes": total,
    }
    if free < total / 2:
        raise Failed(f"{properties.name}: {free >> 30} of {total >> 30} GiB are free: end what else runs on it")
    return Figure(
        f"{properties.name}, {capability}, CUDA {torch.version.cuda}, {free >> 30} of {total >> 30} GiB free", numbers
    )


def exchange(machine: Machine) -> Figure:
    """A sum over all ranks has to be right; its bus rate: 2 (n - 1) / n of the bytes a second, as nccl-tests counts."""
    world = machine.world
    if world.size == 1:
        raise Skipped("one rank: start it with torchrun to check the exchange of gradients")
    mib = GRADIENTS_MIB[machine.device.type]
    tensor = torch.full((mib << 18,), float(world.rank + 1), device=machine.device)
    world.all_reduce(tensor)
    world.on_every_rank(lambda: _require_sum(tensor, world.size * (world.size + 1) / 2))  # what follows needs them all
    seconds = min(timed(lambda: world.all_reduce(tensor), world) for _ in range(3))
    rate = 2 * (world.size - 1) / world.size * tensor.nbytes / seconds / 1e9
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if machine.device.type == "cuda" else None
    by = f"NCCL {nccl}" if nccl else "gloo"
    text = f"{by}, {world.size} ranks: {mib} MiB in {1e3 * seconds:.1f} ms, bus {rate:.2f} GB/s"
    return Figure(text, {"nccl": nccl, "seconds": seconds, "bus_bytes_per_s": 1e9 * rate})


def _require_sum(tensor: torch.Tensor, expected: float) -> None:
    if not bool((tensor == expected).all()):
        found = tensor.unique().tolist()[:3]
        raise Failed(f"an all-reduce of {tensor.nbytes >> 20} MiB gave {found}, expected {expected}")


def affinity(machine: Machine) -> Figure:
    """A core for each rank of this machine at least; with a GPU, cores of its own NUMA node."""
    cores, ranks = available_cores(), machine.world.local_size
    if cores < ranks:
        raise Failed(f"{cores} cores for {ranks} ranks: ask the batch system for more, or start fewer ranks")
    numbers = {"cores": cores, "local_ranks": ranks, "threads": torch.get_num_threads()}
    text = f"{cores} cores for {ranks} rank(s) here, {torch.get_num_threads()} torch threads each"
    if machine.device.type == "cuda" and (near := _cores_near(machine.device)):
        own = os.sched_getaffinity(0)
        numbers["near_gpu"] = len(own & near)
        if not own & near:
            raise Failed("this rank may use no core of its GPU's NUMA node: give torchrun --numa-binding=node")
        text += f", {len(own & near)} of them near the GPU"
    return Figure(text, numbers)


def fp32(machine: Machine) -> Figure:
    """Products in fp32 are what they are called: with TF32 they would have 10 bits of mantissa."""
    machine.require_gpu("fp32 is fp32 on a CPU")
    one, other = (torch.randn(1024, 1024, dtype=torch.float64, device=machine.device) for _ in range(2))
    exact = one @ other
    error = ((one.float() @ other.float()).double() - exact).abs().max().item() / exact.abs().max().item()
    image, kernel = one[None, None], other[None, None, :3, :3]
    folded = F.conv2d(image, kernel)
    conv_error = (F.conv2d(image.float(), kernel.float()).double() - folded).abs().max().item()
    conv_error /= folded.abs().max().item()
    numbers = {
        "matmul_error": error,
        "convolution_error": conv_error,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "convolution_tf32": torch.backends.cudnn.allow_tf32,
    }
    if error > MAX_FP32_ERROR and not torch.backends.cuda.matmul.allow_tf32:
        raise Failed(f"matrix products in fp32 are {error:.1e} off, allowed {MAX_FP32_ERROR:.0e}, and TF32 is off")
    kinds = ["TF32" if value > MAX_FP32_ERROR else "fp32" for value in (error, conv_error)]
    return Figure(
        f"matrix products are {kinds[0]} ({error:.1e} off), convolutions {kinds[1]} ({conv_error:.1e})", numbers
    )


def _cores_near(device: torch.device) -> set[int]:
    """Cores of the NUMA node that the GPU is attached to; empty where the kernel does not say."""
    properties = torch.cuda.get_device_properties(device)
    try:
        place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        text = Path(f"/sys/bus/pci/devices/{place}/local_cpulist").read_text()
    except (OSError, AttributeError):
        return set()
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}
