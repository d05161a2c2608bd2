"""Laws of FalconMamba's norms of the low-rank step, B and C."""

import pytest
import torch
from torch.testing import assert_close

from mambakit.modules import Mamba


@pytest.fixture(params=["reference", "auto"])
def mixer(request):
    return Mamba(16, d_state=4, selection_norm_eps=1e-12, backend=request.param)


def test_the_scale_of_each_part_of_x_proj_does_not_matter(mixer):
    x = torch.randn(2, 9, 16)
    before, _ = mixer(x)
    n, r = mixer.d_state, mixer.dt_rank
    with torch.no_grad():
        for part, scale in zip(mixer.x_proj.weight.split((r, n, n)), (7, 0.1, 30), strict=True):
            part.mul_(scale)
    assert_close(mixer(x)[0], before)


def test_cutting_the_sequence_changes_nothing(mixer):
    x = torch.randn(2, 9, 16)
    whole, end = mixer(x)
    left, state = mixer(x[:, :4])
    right, state = mixer(x[:, 4:], state)
    assert_close(torch.cat([left, right], dim=1), whole)
    assert_close(state.ssm, end.ssm)


def test_vectors_of_zeros_stay_zeros_and_have_gradients():
    mixer = Mamba(16, selection_norm_eps=1e-6)
    with torch.no_grad():
        mixer.x_proj.weight.zero_()
    y, state = mixer(torch.randn(1, 5, 16))
    assert not state.ssm.any()
    y.square().sum().backward()
    assert mixer.x_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_normalised_in_float32(dtype):
    mixer = Mamba(16, selection_norm_eps=1e-6, dtype=dtype)
    wide = Mamba(16, selection_norm_eps=1e-6)
    wide.load_state_dict({name: p.float() for name, p in mixer.state_dict().items()})
    x = torch.randn(2, 9, 16, dtype=dtype)
    assert mixer(x)[0].dtype == dtype
    assert_close(mixer(x)[0].float(), wide(x.float())[0], rtol=3e-2, atol=3e-2)


@pytest.mark.refuses
@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match="selection_norm_eps must be a positive"):
        Mamba(16, selection_norm_eps=eps)
