"""A terminal as a picture: `make demo | python docs/terminal.py > docs/images/terminal.svg`."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

_WIDTH = 100
_FONTS = re.compile(r"\s*@font-face \{.*?\}\n", re.DOTALL)  # they would be fetched from another host
_STYLES = (
    (r"^\$ ", "bold"),
    (r"^training ─|^─", "bold"),
    (r"^iteration .* validation loss", "cyan"),
    (r"^warning", "yellow"),
    (r"^after  |^exact match after", "green"),
)


def svg(lines: Iterable[str], title: str = "make demo") -> str:
    console = Console(record=True, width=_WIDTH, file=io.StringIO())
    for line in lines:
        style = next((style for pattern, style in _STYLES if re.match(pattern, line)), "")
        console.print(Text(line.rstrip("\n"), style), soft_wrap=False)
    return _FONTS.sub("\n", console.export_svg(title=title, unique_id="terminal"))


if __name__ == "__main__":
    sys.stdout.write(svg(sys.stdin))
