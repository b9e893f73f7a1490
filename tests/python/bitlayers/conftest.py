"""The fixture that the tests of BitLinear share."""

from __future__ import annotations

import pytest
from torch import Tensor

from layer_helpers import make_x


@pytest.fixture
def x() -> Tensor:
    return make_x()
