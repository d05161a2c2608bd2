"""The selective scan: the recurrence of Mamba's state."""

from .api import (
    ScanOutput as ScanOutput,
    selective_scan as selective_scan,
    selective_step as selective_step,
)
