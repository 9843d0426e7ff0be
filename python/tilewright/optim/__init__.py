"""Optimizers whose states take one byte an element, and the blockwise quantization under them."""

from .adam import Adam, Adam8bit, AdamW, AdamW8bit
from .blockwise import QuantState, dequantize_blockwise, quantize_blockwise
from .lion import Lion, Lion8bit
from .manager import GlobalOptimManager
from .maps import create_dynamic_map
from .sgd import SGD8bit

__all__ = [
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "GlobalOptimManager",
    "Lion",
    "Lion8bit",
    "QuantState",
    "SGD8bit",
    "create_dynamic_map",
    "dequantize_blockwise",
    "quantize_blockwise",
]
