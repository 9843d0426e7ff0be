"""The scan family's cases: whole Mamba models, then each op, beside the incumbents and plain torch."""

from __future__ import annotations

from . import (
    scan_blocks,
    scan_conv,
    scan_dense,
    scan_linear,
    scan_models,
    scan_norm,
    scan_selective,
    scan_ssd,
)
from .case import Case, Plan, grouped

GPU_PEERS = ("mamba-ssm", "causal-conv1d")
PEERS = ("torch", "transformers", "mambapy", *GPU_PEERS)


def cases(plan: Plan) -> list[Case]:
    """All cases of the family; none for a model without a scan."""
    return [
        *grouped("whole models", scan_models.cases(plan)),
        *grouped("blocks", scan_blocks.cases(plan)),
        *grouped("selective scan", scan_selective.cases(plan)),
        *grouped("SSD", scan_ssd.cases(plan)),
        *grouped("linear scan", scan_linear.cases(plan)),
        *grouped("convolution", scan_conv.convolutions(plan)),
        *grouped("gated norm", scan_norm.cases(plan)),
        *grouped("dense product", scan_dense.cases(plan)),
        *grouped("a token", scan_conv.updates(plan)),
    ]
