"""Operations: tensors in, tensors out, and a state that continues a sequence.

Nothing here knows of parameters or models.
"""

from .conv import (
    ConvOutput as ConvOutput,
    causal_conv1d as causal_conv1d,
    causal_conv1d_step as causal_conv1d_step,
)
from .scan import (
    ScanOutput as ScanOutput,
    selective_scan as selective_scan,
    selective_step as selective_step,
)
