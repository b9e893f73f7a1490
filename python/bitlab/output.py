"""What commands print."""

PIPE_WIDTH = 120
"""Of tables that go into a file or a pipe."""
