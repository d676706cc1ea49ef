"""The page of a report: one file without scripts that loads nothing, light or dark as its reader has chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peft_pretraining.reporting.markup import Markup, concatenated, element, escaped
from peft_pretraining.reporting.svg import LEVELS, Line

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing."""
_RAMPS = (((0xD6, 0xE6, 0xFF), (0x08, 0x2A, 0x66)), ((0x1B, 0x2B, 0x48), (0xB9, 0xD6, 0xFF)))
"""The colours of 0 and 1 in maps, light and dark."""


class Section(NamedTuple):
    """A part of the page."""

    key: str
    title: str
    content: Sequence[Markup]


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> Markup:
    """The whole file."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", f"{title}: report of a training run"),
        element("style", Markup(_css())),
    )
    links = [element("a", section.title, href=f"#{section.key}") for section in sections]
    parts = [
        element("section", element("h2", s.title, id=f"{s.key}-h"), *s.content, id=s.key, aria_labelledby=f"{s.key}-h")
        for s in sections
    ]
    body = element(
        "body",
        element("header", element("h1", title), element("p", subtitle, class_="quiet")),
        element("nav", *links, aria_label="Sections"),
        element("main", *parts),
        element("footer", footer, class_="quiet"),
    )
    return Markup("<!doctype html>\n" + element("html", head, body, lang="en") + "\n")


def figure(title: str, chart: Markup, caption: str, values: Markup | None = None, lines: Sequence[Line] = ()) -> Markup:
    """A chart with its title, a legend where it has several lines, a caption, and its values in a table below."""
    named = [line for line in lines if not line.raw]
    legend: list[Markup] = []
    if len(named) > 1:
        keys = [element("span", element("i", class_=f"key {line.color}"), line.label) for line in named]
        legend = [element("p", *keys, class_="legend")]
    table = [element("details", element("summary", "Values as a table"), values)] if values else []
    drawn = element("div", chart, class_="scroll", tabindex="0", role="region", aria_label=title)
    return element("figure", element("h3", title), *legend, drawn, element("figcaption", caption), *table)


def tiles(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Names and values side by side."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in pairs), class_="tiles"
    )


def paragraph(text: str) -> Markup:
    """A paragraph."""
    return element("p", text)


def preformatted(text: str) -> Markup:
    """Text in which spaces and line breaks count, such as a command; long lines are broken."""
    return element("pre", element("code", text))


def sample(prompt: str, text: str) -> Markup:
    """A prompt in bold and the text that a model has added to it."""
    return element("blockquote", element("b", prompt), escaped(text))


def details(title: str, *content: Markup) -> Markup:
    """What a reader has to open."""
    return element("details", element("summary", title), concatenated(content))


def _css() -> str:
    light, dark = (_ramp(*ramp) for ramp in _RAMPS)
    return _STYLE.replace("LIGHT_RAMP", light).replace("DARK_RAMP", dark).replace("CELLS", _cells())


def _ramp(first: tuple[int, ...], last: tuple[int, ...]) -> str:
    colors = []
    for level in range(LEVELS):
        mixed = (round(a + (b - a) * level / (LEVELS - 1)) for a, b in zip(first, last, strict=True))
        colors.append(f"--h{level}: #{''.join(f'{part:02x}' for part in mixed)};")
    return " ".join(colors)


def _cells() -> str:
    return "\n".join(
        f".h{level} {{ stroke: var(--h{level}); }} i.h{level} {{ background: var(--h{level}); }}"
        for level in range(LEVELS)
    )


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --panel: #ffffff; --edge: #dddcd8; --text: #1c1d20; --quiet: #5c6068; --grid: #e7e6e2;
  --a: #1f5fc4; --b: #b4490a; --c: #17713b; --empty: #f0efec; LIGHT_RAMP
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16171a; --panel: #1d1f23; --edge: #363a41; --text: #e8e9ec; --quiet: #a3a8b1; --grid: #2c2f35;
    --a: #82b0ff; --b: #ff9d5c; --c: #6fd394; --empty: #26282d; DARK_RAMP
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--edge); font-size: 1.35rem; }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
p { max-width: 46rem; }
.quiet, figcaption, dt { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1rem; }
a { color: var(--a); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tiles div { padding: .6rem .8rem; background: var(--panel); border: 1px solid var(--edge); border-radius: .5rem; }
dt { font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
figure { margin: 1rem 0; padding: 1rem; background: var(--panel); border: 1px solid var(--edge); border-radius: .5rem; }
figcaption { margin-top: .5rem; font-size: .875rem; }
details { margin: .5rem 0; font-size: .875rem; }
summary { cursor: pointer; color: var(--quiet); }
svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .label { fill: var(--text); }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
.grid { stroke: var(--grid); }
.axis { stroke: var(--quiet); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.raw { stroke-width: 1; opacity: .3; }
.mark { stroke: var(--panel); stroke-width: 1; }
.curve.a { stroke: var(--a); } .curve.b { stroke: var(--b); } .curve.c { stroke: var(--c); }
.mark.a, .bar.a { fill: var(--a); } .mark.b, .bar.b { fill: var(--b); } .mark.c, .bar.c { fill: var(--c); }
.none { fill: var(--empty); }
.cell { fill: none; shape-rendering: crispEdges; }
CELLS
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0 0 .5rem; font-size: .875rem; }
.key { display: inline-block; width: 1rem; height: .25rem; margin-right: .4rem; vertical-align: middle; }
i.a { background: var(--a); } i.b { background: var(--b); } i.c { background: var(--c); }
.ramp { gap: 0; align-items: center; } .ramp .key { width: 1.4rem; height: .8rem; margin: 0; }
.ramp span { margin: 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .875rem; }
caption { padding: .25rem 0; text-align: left; font-weight: 600; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
tbody th { font-weight: 400; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { overflow-x: auto; padding: .75rem; background: var(--panel); border: 1px solid var(--edge); border-radius: .5rem;
  font: .8125rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote { margin: .75rem 0; padding: .25rem 1rem; border-left: 3px solid var(--a); white-space: pre-wrap;
  overflow-wrap: anywhere; }
footer { margin-top: 3rem; font-size: .875rem; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""
