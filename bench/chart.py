"""A bar chart of rates as an SVG: a group of bars for each workload, each on its own scale."""

from pathlib import Path
from xml.sax.saxutils import escape

BAR, GAP, LEFT, WIDTH = 18, 14, 130, 460
COLOURS = ("#2a6fbb", "#c98a2b", "#6b8f4e", "#8a5a83")


def write(path: Path, title: str, rates: dict[str, dict[str, float]]) -> None:
    """rates: of each engine, by workload."""
    parts, y = [f'<text x="8" y="20" font-size="15">{escape(title)}</text>'], 46
    for workload, by_engine in rates.items():
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(workload)}</text>')
        y += 8
        longest = max(by_engine.values())
        for colour, (engine, rate) in zip(COLOURS, by_engine.items(), strict=False):
            length, middle = max(1, round(rate / longest * WIDTH)), y + BAR - 5
            parts += [
                f'<text x="{LEFT - 6}" y="{middle}" text-anchor="end">{escape(engine)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{length}" height="{BAR - 3}" fill="{colour}"/>',
                f'<text x="{LEFT + length + 6}" y="{middle}">{rate:.0f}</text>',
            ]
            y += BAR
        y += GAP + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{y}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    path.write_text("\n".join([head, *parts, "</svg>"]) + "\n", encoding="utf-8")
