"""The learning rate as a function of the step: a line up, then half a cosine down."""

import math


def learning_rate(step: int, *, steps: int, peak: float, final: float, warmup: float) -> float:
    """Give the rate of update ``step``, counted from 0.

    With ``w = round(warmup * steps)``, ``s`` the step and ``p = (s + 1 - w) / (steps - w)``:

        s < w:   peak (s + 1) / w
        else:    final + (peak - final) (1 + cos(pi p)) / 2

    The last update of the warm-up runs at ``peak``, the last of the run at ``final``.

    Args:
        step: From 0 to ``steps - 1``.
        steps: Updates in the run.
        peak: Highest rate.
        final: Last rate.
        warmup: Share of the run that warms up, 0 to 1.

    Example:
        >>> [round(learning_rate(s, steps=6, peak=1, final=0, warmup=1/3), 3) for s in range(6)]
        [0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step + 1 - rising) / (steps - rising)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
