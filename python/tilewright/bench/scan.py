"""The scan family's cases: whole Mamba models, then each op, beside the incumbents and plain torch."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import scan_conv, scan_linear, scan_models, scan_selective, scan_ssd
from .case import Case

_ON_GPUS_ALONE = ("mamba-ssm", "causal-conv1d")
PEERS = ("torch", "transformers", "mambapy", *_ON_GPUS_ALONE)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases of the family for a device; `quick` shrinks the work."""
    found = [
        *scan_models.cases(device, quick),
        *scan_selective.cases(device, quick),
        *scan_ssd.cases(device, quick),
        *scan_linear.cases(device, quick),
        *scan_conv.convolutions(device, quick),
        *scan_conv.updates(device, quick),
    ]
    if device.type == "cuda":
        return found
    return [
        replace(case, contenders=[peer for peer in case.contenders if peer.name not in _ON_GPUS_ALONE])
        for case in found
    ]
