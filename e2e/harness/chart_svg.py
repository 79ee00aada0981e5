"""Draws a dashboard's panels as one SVG: lines, stacked areas, numbers. No more than the picture in docs/ needs."""

import html
import math

COLUMN, ROW, GAP = 50, 23, 4
# Grafana's classic palette, darkened a little where it is too pale on white.
COLOURS = ["#56A64B", "#E0A800", "#3274D9", "#E0752D", "#E24D42", "#7C5FBF", "#17A2A8", "#B877D9", "#8F6F3B", "#5A6B7B"]
TEXT, PALE, GRID, BORDER, RED = "#24292e", "#6a737d", "#e6e8eb", "#d0d7de", "#d1242f"
FONT = "font-family='Helvetica,Arial,sans-serif'"


def scaled(value: float, steps: list[tuple[float, str]]) -> str:
    for factor, unit in steps:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}".rstrip()
    factor, unit = steps[-1]
    return f"{value / factor:.3g} {unit}".rstrip()


BYTES = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")]


def unit_text(value: float, unit: str) -> str:
    """A value as Grafana writes it."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    match unit:
        case "percentunit":
            return f"{value * 100:.3g} %"
        case "decbytes":
            return scaled(value, BYTES)
        case "Bps":
            return scaled(value, [(factor, f"{name}/s") for factor, name in BYTES])
        case "s":
            return scaled(value, [(60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")])
        case "reqps":
            return scaled(value, [(1e3, "k/s"), (1, "/s"), (1e-3, "m/s")])
        case _:
            return scaled(value, [(1e6, "M"), (1e3, "k"), (1, "")]) if abs(value) >= 1 else f"{value:.2g}"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values that cover the range."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(it * magnitude for it in (1, 2, 2.5, 5, 10) if raw <= it * magnitude * 1.0001)
    first = math.floor(low / step) * step
    return [first + number * step for number in range(math.ceil((high - first) / step - 1e-9) + 1)]


class Svg:
    def __init__(self, width: int, height: int):
        self.parts = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>",
                      f"<rect width='{width}' height='{height}' fill='#f6f8fa'/>"]

    def add(self, text: str) -> None:
        self.parts.append(text)

    def text(self, x: float, y: float, text: str, *, size=11, colour=TEXT, anchor="start", weight="normal") -> None:
        self.add(f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' fill='{colour}' text-anchor='{anchor}' font-weight='{weight}'>{html.escape(text)}</text>")

    def box(self, x: float, y: float, width: float, height: float) -> None:
        self.add(f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='3' fill='#fff' stroke='{BORDER}'/>")

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, dash="") -> None:
        self.add(f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' {f'stroke-dasharray={chr(39)}{dash}{chr(39)}' if dash else ''}/>")

    def end(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def frame(panel: dict) -> tuple[float, float, float, float]:
    place = panel["gridPos"]
    return (place["x"] * COLUMN + GAP / 2, place["y"] * ROW + GAP / 2, place["w"] * COLUMN - GAP, place["h"] * ROW - GAP)


def draw_row(svg: Svg, panel: dict) -> None:
    x, y, _, height = frame(panel)
    svg.text(x + 4, y + height - 4, panel["title"], size=13, weight="bold")


def draw_stat(svg: Svg, panel: dict, value: float | None) -> None:
    x, y, width, height = frame(panel)
    defaults = panel["fieldConfig"]["defaults"]
    colour = TEXT
    for step in defaults["thresholds"]["steps"]:
        if value is not None and (step["value"] is None or step["value"] <= value):
            colour = {"text": TEXT, "green": "#2da44e", "red": RED}[step["color"]]
    svg.box(x, y, width, height)
    svg.text(x + 8, y + 17, panel["title"], size=12, weight="bold")
    shown = "no data" if value is None else unit_text(value, defaults["unit"])
    svg.text(x + width / 2, y + height / 2 + 22, shown, size=26 if value is not None else 14, colour=colour, anchor="middle")


def draw_lines(svg: Svg, panel: dict, series: list[tuple[str, list[tuple[float, float]]]], start: float, end: float) -> None:
    """`series` are names and points; a gap in the points is a gap in the line."""
    x, y, width, height = frame(panel)
    defaults = panel["fieldConfig"]["defaults"]
    unit, custom = defaults["unit"], defaults["custom"]
    stacked = custom["stacking"]["mode"] == "normal"
    svg.box(x, y, width, height)
    svg.text(x + 8, y + 17, panel["title"], size=12, weight="bold")
    series = [(name, [(t, v) for t, v in points if not math.isnan(v)]) for name, points in series]
    series = [it for it in series if it[1]]
    if not series:
        svg.text(x + width / 2, y + height / 2, "no data", size=13, colour=PALE, anchor="middle")
        return
    if stacked:
        base: dict[float, float] = {}
        layers = []
        for name, points in series:
            lower = [(t, base.get(t, 0.0)) for t, _ in points]
            upper = [(t, base.get(t, 0.0) + v) for t, v in points]
            base.update(upper)
            layers.append((name, lower, upper))
    else:
        layers = [(name, [], points) for name, points in series]

    limits = [step["value"] for step in defaults["thresholds"]["steps"] if step["value"] is not None] if custom["thresholdsStyle"]["mode"] == "line" else []
    values = [v for _, _, points in layers for _, v in points] + limits
    low = defaults.get("min", min(values))
    ticks = nice_ticks(low, defaults.get("max", max(values)))
    low, high = ticks[0], ticks[-1]
    left, right, top, bottom = x + 58, x + width - 10, y + 28, y + height - 44
    to_x = lambda t: left + (t - start) / (end - start) * (right - left)
    to_y = lambda v: bottom - (v - low) / (high - low) * (bottom - top)

    for tick in ticks:
        svg.line(left, to_y(tick), right, to_y(tick), GRID)
        svg.text(left - 5, to_y(tick) + 4, unit_text(tick, unit), size=10, colour=PALE, anchor="end")
    minutes = (end - start) / 60
    every = next(it for it in (1, 2, 5, 10, 15, 30, 60, 120, 360, 1440) if minutes / it <= 6 or it == 1440)
    for number in range(int(minutes / every) + 1):
        svg.text(to_x(start + number * every * 60), bottom + 14, f"{number * every} min", size=10, colour=PALE, anchor="middle")
    for limit in limits:
        svg.line(left, to_y(limit), right, to_y(limit), RED, dash="5 3")

    step_after = custom["lineInterpolation"] == "stepAfter"
    gap = (end - start) / 30
    for number, (_, lower, points) in enumerate(layers):
        colour = COLOURS[number % len(COLOURS)]
        for run in runs(points, gap):
            path = "M" + " ".join(f"{to_x(t):.0f},{to_y(v):.0f}" for t, v in (steps(run) if step_after else run))
            if stacked:
                floor = {t: v for t, v in lower}
                back = " ".join(f"{to_x(t):.0f},{to_y(floor[t]):.0f}" for t, _ in reversed(run))
                svg.add(f"<path d='{path} L{back}Z' fill='{colour}' fill-opacity='.6' stroke='none'/>")
            svg.add(f"<path d='{path}' fill='none' stroke='{colour}' stroke-width='1.5'/>")

    at, line = x + 12, y + height - 14
    for number, (name, _, _) in enumerate(layers):
        needed = 16 + 6.0 * len(name)
        if at + needed > x + width - 4:
            if line > y + height - 10:
                svg.text(at, line, "…", colour=PALE)
                break
            at, line = x + 12, line + 11
        svg.add(f"<rect x='{at:.0f}' y='{line - 5:.0f}' width='10' height='3' fill='{COLOURS[number % len(COLOURS)]}'/>")
        svg.text(at + 13, line, name, size=10, colour=TEXT)
        at += needed + 8


def steps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value held until the next."""
    out = points[:1]
    for (_, before), (t, v) in zip(points, points[1:]):
        out += [(t, before), (t, v)] if before != v else [(t, v)]
    return out


def runs(points: list[tuple[float, float]], gap: float) -> list[list[tuple[float, float]]]:
    """The points, parted where more than `gap` seconds lie between two."""
    out: list[list[tuple[float, float]]] = []
    for point in points:
        if out and point[0] - out[-1][-1][0] <= gap:
            out[-1].append(point)
        else:
            out.append([point])
    return out
