"""Utilization and power of a GPU."""

from __future__ import annotations

import logging

import pynvml
import torch

logger = logging.getLogger(__name__)


class Sensors:
    """Utilization and power of a GPU, where NVML is there to ask."""

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except pynvml.NVMLError as error:
            logger.info("no utilization and power of the GPU: %s", error)

    def read(self) -> tuple[float, float] | None:
        """(share of the time in which a kernel ran, watts); None where NVML does not tell."""
        if self._handle is None:
            return None
        try:
            used = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
            return used, pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
        except pynvml.NVMLError:  # some virtual machines answer one question and not the other
            self._handle = None
            return None
