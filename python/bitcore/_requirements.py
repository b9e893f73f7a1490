"""What most of bitcore cannot do without. Imported before anything that needs it."""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ImportError('bitcore needs torch, which is not installed: run `pip install "bitlab[torch]"`', name="torch")
