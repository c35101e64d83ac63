#!/usr/bin/env python3
"""Plots of tandem-bench spec's CSV, as SVG: plot_spec.py CSV FOLDER.

Three figures: speed of every mode at its best window against plain; speed over the window; acceptance by position
with and without calibration. No library: the files are small texts that any browser shows."""
import collections
import csv
import os
import sys

COLUMNS = ("pair what mode ranks window width delay temperature oracle rate ratio acceptance length per_round "
           "target_wait draft_wait control_us p0 p1 p2 p3 p4 p5 p6 p7").split()
COLOURS = {"plain": "#8a8f98", "plain, 1 rank": "#c9ccd1", "sd": "#4c78a8", "sd, 1+1 serial": "#9ecae9", "easyspec": "#54a24b",
           "pearl": "#e45756", "pearl+lp": "#b279a2"}
TEXT = 'font-family="sans-serif" font-size="12" fill="#222"'


def read(path):
    rows = []
    with open(path, newline="") as file:
        for values in csv.reader(file):
            row = dict(zip(COLUMNS, values))
            for name in COLUMNS:
                if name not in ("pair", "what", "mode", "ranks"):
                    row[name] = float(row[name])
            row["kind"] = {"1+1, serial": "sd, 1+1 serial",
                           "1+1, draft idle": "plain, 1 rank"}.get(row["ranks"], row["mode"])
            rows.append(row)
    return rows


def text(x, y, words, anchor="start", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {TEXT} {more}>{words}</text>'


def svg(path, width, height, parts):
    with open(path, "w") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                   f'viewBox="0 0 {width} {height}"><rect width="100%" height="100%" fill="white"/>\n')
        file.write("\n".join(parts) + "\n</svg>\n")


def axis(parts, left, top, width, height, most, step, label):
    tick = 0.0
    while tick <= most + 1e-9:
        y = top + height - height * tick / most
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(left - 6, y + 4, f"{tick:g}", "end"))
        tick = round(tick + step, 6)
    parts.append(text(left, top - 10, label))


def legend(parts, x, y, names, dashes=None):
    for i, name in enumerate(names):
        at = y + 18 * i
        dash = f' stroke-dasharray="{dashes[name]}"' if dashes and dashes.get(name) else ""
        parts.append(f'<line x1="{x}" y1="{at}" x2="{x + 18}" y2="{at}" stroke="{COLOURS.get(name, "#222")}" '
                     f'stroke-width="4"{dash}/>')
        parts.append(text(x + 24, at + 4, name))


def best(rows, pair, temperature):
    found = {}
    for row in rows:
        if row["what"] != "modes" or row["pair"] != pair or row["temperature"] != temperature:
            continue
        if row["kind"] not in found or row["rate"] > found[row["kind"]]["rate"]:
            found[row["kind"]] = row
    return found


def plot_modes(rows, path):
    """A group of bars per pair and temperature, each the best window of a mode, over the best plain."""
    groups = []
    for row in rows:
        key = (row["pair"], row["temperature"])
        if row["what"] == "modes" and key not in groups:
            groups.append(key)
    kinds = [k for k in COLOURS if any(k in best(rows, *g) for g in groups)]
    bar, gap, left, top, height = 16, 26, 46, 40, 240
    width = len(groups) * (len(kinds) * bar + gap)
    peak = max(row["ratio"] for g in groups for row in best(rows, *g).values())
    most = max(1.5, 0.5 * (int(peak / 0.5) + 1))
    parts = []
    axis(parts, left, top, width, height, most, 0.5, "tokens/s over the best plain decoding (best window of each mode)")
    for i, group in enumerate(groups):
        x = left + gap / 2 + i * (len(kinds) * bar + gap)
        for j, kind in enumerate(kinds):
            row = best(rows, *group).get(kind)
            if row is None:
                continue
            tall = height * row["ratio"] / most
            parts.append(f'<rect x="{x + j * bar:.1f}" y="{top + height - tall:.1f}" width="{bar - 3}" '
                         f'height="{tall:.1f}" fill="{COLOURS[kind]}"><title>{kind} on {row["ranks"]}, '
                         f'g={row["window"]:g}: {row["rate"]:.0f} tokens/s</title></rect>')
        middle = x + len(kinds) * bar / 2
        parts.append(text(middle, top + height + 18, group[0], "middle"))
        parts.append(text(middle, top + height + 34, f"T = {group[1]:g}", "middle"))
    legend(parts, left + width + 20, top + 10, kinds)
    svg(path, left + width + 160, top + height + 50, parts)


def lines(parts, series, left, top, width, height, most, low, high):
    for name, points, dash in series:
        spots = [(left + width * (x - low) / (high - low), top + height - height * y / most)
                 for x, y in sorted(points)]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        colour = COLOURS.get(name, "#222")
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2" '
                     f'stroke-dasharray="{dash}"/>')
        parts.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots)


def plot_windows(rows, path):
    """Speed over the window, a panel per pair at temperature 0, the best ranks and width of each mode."""
    pairs = list(dict.fromkeys(r["pair"] for r in rows if r["what"] == "modes"))
    width, height, left, top, parts = 230, 220, 50, 50, []
    kinds = []
    for i, pair in enumerate(pairs):
        points = collections.defaultdict(dict)
        for row in rows:
            if row["what"] == "modes" and row["pair"] == pair and row["temperature"] == 0 and row["mode"] != "plain":
                window = row["window"]
                points[row["kind"]][window] = max(points[row["kind"]].get(window, 0), row["ratio"])
        kinds = kinds or list(points)
        peak = max(y for of in points.values() for y in of.values())
        most = max(1.5, 0.5 * (int(peak / 0.5) + 1))
        x = left + i * (width + 100)
        axis(parts, x, top, width, height, most, 0.5, f"{pair}, T = 0: speed over best plain")
        windows = sorted({w for of in points.values() for w in of})
        lines(parts, [(k, of.items(), "0") for k, of in points.items()], x, top, width, height, most,
              windows[0], windows[-1])
        for w in windows:
            at = x + width * (w - windows[0]) / (windows[-1] - windows[0])
            parts.append(text(at, top + height + 18, f"{w:g}", "middle"))
        parts.append(text(x + width / 2, top + height + 36, "window g", "middle"))
    end = left + len(pairs) * (width + 100)
    legend(parts, end, top + 10, kinds)
    svg(path, end + 140, top + height + 50, parts)


def plot_calibration(rows, path):
    """How often the i-th drafted token holds, by layer width, with and without calibration: bundled pair."""
    shades = {1: "#222222", 2: "#4c78a8", 4: "#e45756"}
    pair = next(r["pair"] for r in rows if r["what"] == "calibrated")
    series, names, dashes = [], [], {}
    for row in rows:
        if row["pair"] != pair or row["what"] not in ("calibrated", "uncalibrated"):
            continue
        if row["width"] == 1 and row["what"] == "uncalibrated":
            continue
        name = f'N = {row["width"]:g}' + ("" if row["what"] == "calibrated" or row["width"] == 1 else ", not calibrated")
        name += f' ({row["acceptance"]:.3f})'
        COLOURS[name] = shades[int(row["width"])]
        dash = "0" if row["what"] == "calibrated" else "5 4"
        dashes[name] = "" if dash == "0" else dash
        names.append(name)
        series.append((name, [(i + 1, row[f"p{i}"]) for i in range(8)], dash))
    parts, left, top, width, height = [], 50, 50, 380, 240
    axis(parts, left, top, width, height, 1.0, 0.2,
         f"{pair}: share of rounds in which the i-th drafted token holds (EasySpec, g = 8, T = 0)")
    lines(parts, series, left, top, width, height, 1.0, 1, 8)
    for i in range(1, 9):
        parts.append(text(left + width * (i - 1) / 7, top + height + 18, str(i), "middle"))
    parts.append(text(left + width / 2, top + height + 36, "place in the block", "middle"))
    legend(parts, left + width + 20, top + 10, names, dashes)
    parts.append(text(left + width + 20, top + 20 + 18 * len(names), "(acceptance of a judged token)"))
    svg(path, left + width + 260, top + height + 50, parts)


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: plot_spec.py CSV FOLDER")
    rows = read(sys.argv[1])
    os.makedirs(sys.argv[2], exist_ok=True)
    plot_modes(rows, os.path.join(sys.argv[2], "spec-modes.svg"))
    plot_windows(rows, os.path.join(sys.argv[2], "spec-windows.svg"))
    plot_calibration(rows, os.path.join(sys.argv[2], "spec-calibration.svg"))


main()
