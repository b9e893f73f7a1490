"""The C++ headers: the one that includes all others leaves none out."""

import re
from pathlib import Path

INCLUDE = Path(__file__).parents[3] / "include"


def test_umbrella_header_includes_every_header() -> None:
    umbrella = INCLUDE / "bitcore" / "bitcore.h"
    headers = {str(header.relative_to(INCLUDE)) for header in umbrella.parent.rglob("*.h") if header != umbrella}
    assert headers
    assert re.findall(r'#include "(.+)"', umbrella.read_text()) == sorted(headers)
