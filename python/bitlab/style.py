"""What the pictures have in common."""

from typing import Any

GREY, BLUE, ORANGE, RED, INK = "#9aa3ad", "#5b8cc0", "#e07a2f", "#c8323c", "#20262e"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c5cbd2",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
