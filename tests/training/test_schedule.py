"""Laws of the learning rate."""

import math

import pytest
from hypothesis import given, settings, strategies as st

from mambakit.training.schedule import learning_rate


@settings(deadline=None)
@given(
    steps=st.integers(1, 200),
    warmup=st.floats(0, 1),
    peak=st.floats(1e-6, 1),
    share=st.floats(0, 1),
)
def test_it_rises_to_the_peak_then_falls_to_the_end(steps, warmup, peak, share):
    rates = [
        learning_rate(s, steps=steps, peak=peak, final=share * peak, warmup=warmup)
        for s in range(steps)
    ]
    rising = round(warmup * steps)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert min(rates) >= 0
    if rising:
        assert math.isclose(rates[rising - 1], peak)
    if rising < steps:
        assert math.isclose(rates[-1], share * peak, abs_tol=1e-15)


def test_the_cosine_is_half_way_in_the_middle():
    rate = learning_rate(54, steps=100, peak=3.0, final=1.0, warmup=0.1)
    assert rate == pytest.approx(2.0)
