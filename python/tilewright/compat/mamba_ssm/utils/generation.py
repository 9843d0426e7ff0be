"""mamba_ssm.utils.generation: the states of a model between calls."""

from tilewright.nn.inference import InferenceParams

__all__ = ["InferenceParams"]
