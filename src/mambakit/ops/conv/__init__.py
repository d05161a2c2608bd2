"""The causal depthwise convolution: ``api.py`` says what it means."""

from .api import (
    ConvOutput as ConvOutput,
    causal_conv1d as causal_conv1d,
    causal_conv1d_step as causal_conv1d_step,
)
