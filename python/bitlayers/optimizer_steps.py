"""Makes every optimizer's step visible in the version of the parameters that it changed."""

from functools import cache
from typing import Any

from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


@cache
def count_as_changes() -> None:
    """From now on a step of any optimizer raises `_version` of its parameters with gradients; idempotent.

    Torch's fused kernels, unlike its other in-place functions, leave it as it was, and so may optimizers by others.
    """
    register_optimizer_step_post_hook(_note_step)


@_disable_dynamo  # Traced, it would be removed: a graph that was made functional has no versions to count.
def _note_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    increment_version([parameter for parameter in parameters if parameter.grad is not None])
