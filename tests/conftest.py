"""Settings of all tests: repeatable draws, and threads that leave room for each other."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "decorr_fx",
    deadline=None,  # the first call of an op compiles, whatever was drawn
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("decorr_fx")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
