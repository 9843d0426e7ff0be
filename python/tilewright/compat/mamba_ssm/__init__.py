"""mamba_ssm's public names.

Imports in this package are absolute, so that it works under the name ``mamba_ssm`` too.
"""

from tilewright.compat.mamba_ssm import modules, ops, utils
from tilewright.compat.mamba_ssm.modules.mamba2 import Mamba2
from tilewright.compat.mamba_ssm.modules.mamba_simple import Mamba
from tilewright.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__version__ = "2.3.2"  # the release whose names and signatures these are

__all__ = ["Mamba", "Mamba2", "mamba_inner_fn", "modules", "ops", "selective_scan_fn", "utils"]
