"""What every test starts from."""

import pytest
import torch

# Also fills torch.empty with NaN, so that output which no kernel wrote is seen.
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
