"""What a network costs at any widths: seconds on a device, or FLOPs. Arithmetic on the traced operations alone."""

from cup.cost.devices import DEVICES, KERNELS, DataSheet, Device, Rate, named_device
from cup.cost.flops import FlopsCost
from cup.cost.model import Cost, CostByWidths, Walk
from cup.cost.seconds import DeviceCost, StepSeconds, device_cost

__all__ = [
    "DEVICES",
    "KERNELS",
    "Cost",
    "CostByWidths",
    "DataSheet",
    "Device",
    "DeviceCost",
    "FlopsCost",
    "Rate",
    "StepSeconds",
    "Walk",
    "device_cost",
    "named_device",
]
