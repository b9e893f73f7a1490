"""Two networks of one shape, one float and one ternary, trained by one recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitlab.demo.data import CLASSES, PIXELS, Digits, Images
from bitlayers import BitLinear
from bitmodels import BitMLPConfig, BitMLPModel

CONFIG = BitMLPConfig(n_layers=3, in_channels=PIXELS, hidden_dim=256, out_channels=CLASSES, dropout=0.1)

# Width, dropout, learning rate and smoothing: the best of 36 settings by the ternary network's mean accuracy on three
# validation splits of the training images. The test images had no part in it.
BATCH = 64
PEAK_LEARNING_RATE = 8e-3
WARM_UP = 0.1
WEIGHT_DECAY = 0.01
LABEL_SMOOTHING = 0.1


@dataclass
class History:
    """What a training looked like, one entry an epoch."""

    loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)


class FloatMLP(nn.Sequential):
    """The same shape as `BitMLPModel(config)`, of `nn.Linear`."""

    def __init__(self, config: BitMLPConfig) -> None:
        *hidden, last = pairwise(config.widths)
        blocks = [nn.Sequential(nn.Linear(*pair), nn.ReLU(), nn.Dropout(config.dropout)) for pair in hidden]
        super().__init__(*blocks, nn.Linear(*last))


def train(model: nn.Module, digits: Digits, epochs: int, on_epoch: Callable[[], None]) -> History:
    """AdamW with a one-cycle cosine schedule on cross-entropy. Leaves the model in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * ((len(digits.train) + BATCH - 1) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
    history = History()
    for _ in range(epochs):
        history.loss.append(_train_epoch(model, digits.train, optimizer, schedule))
        history.validation_accuracy.append(accuracy(logits(model, digits.validation), digits.validation))
        on_epoch()
    model.eval()
    return history


def _train_epoch(
    model: nn.Module,
    images: Images,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One pass in random order. Returns the mean loss."""
    model.train()
    total = 0.0
    for batch in torch.randperm(len(images)).split(BATCH):
        loss = functional.cross_entropy(model(images.x[batch]), images.y[batch], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item() * len(batch)
    return total / len(images)


@torch.no_grad()
def logits(model: nn.Module, images: Images) -> Tensor:
    """The outputs in evaluation mode, (n, 10)."""
    model.eval()
    output: Tensor = model(images.x)
    return output


@torch.no_grad()
def training_mode_logits(model: BitMLPModel, images: Images) -> Tensor:
    """The outputs of the layers' training forward, which quantizes the float weights anew; without dropout."""
    model.eval()
    with _layers_in_training_mode(model):
        output: Tensor = model(images.x)
    return output


@contextmanager
def _layers_in_training_mode(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


def accuracy(outputs: Tensor, images: Images) -> float:
    """Percent of the images whose largest output is their label's."""
    return 100 * (outputs.argmax(dim=1) == images.y).float().mean().item()


@dataclass(frozen=True)
class Pair:
    """A float and a ternary network trained from one seed."""

    float_model: FloatMLP
    ternary: BitMLPModel
    float_history: History
    ternary_history: History


def train_pair(digits: Digits, seed: int, epochs: int, on_epoch: Callable[[], None]) -> Pair:
    """Trains both networks."""
    with _one_thread():
        torch.manual_seed(seed)
        float_model = FloatMLP(CONFIG)
        float_history = train(float_model, digits, epochs, on_epoch)
        torch.manual_seed(seed)
        ternary = BitMLPModel(CONFIG)
        return Pair(float_model, ternary, float_history, train(ternary, digits, epochs, on_epoch))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
