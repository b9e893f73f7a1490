"""`bitlab demo`: a ternary network from training on real images to a C++ program, with every claim checked."""

from bitlab.demo.main import DemoOptions, run

__all__ = ["DemoOptions", "run"]
