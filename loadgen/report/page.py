"""Content to a page: one HTML file that asks for nothing else, neither script nor font nor host."""

from __future__ import annotations

from importlib.resources import files

import jinja2

from loadgen.report.content import Content
from loadgen.report.drawing import COLOURS, draw, draw_tiles


def render(content: Content) -> str:
    """The page's HTML. All words in it are escaped, whatever an endpoint calls itself."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("loadgen.report") / "page.html").read_text("utf-8"))
    return template.render(page=content, colours=COLOURS, draw=draw, draw_tiles=draw_tiles)
