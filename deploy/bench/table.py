"""Puts the figures of several engines and rounds side by side.

usage: table.py FOLDER [OUT.json]

FOLDER holds ENGINE.ROUND.json, each as `conclave bench --json` writes it. The first engine by which all others are divided
is `in-process`; ratios are medians over the rounds in which both were measured, since a machine changes from one round
to the next."""

import collections
import json
import pathlib
import statistics
import sys

FIRST = "in-process"


def samples_by_round(folder):
    """{figure: {engine: {round: [samples], ...}}}, units and shares of limits likewise."""
    found, units, shares = collections.defaultdict(lambda: collections.defaultdict(dict)), {}, collections.defaultdict(list)
    for path in sorted(folder.glob("*.*.json")):
        engine, turn = path.name.removesuffix(".json").rsplit(".", 1)
        for figure in json.loads(path.read_text())["figures"]:
            name = named(engine, figure["name"])
            if not figure["samples"] or name is None:
                continue
            found[name][engine][int(turn)] = figure["samples"]
            units[name] = figure["unit"]
            rate = figure["unit"] == "tok/s"
            for sample, limit in zip(figure["samples"], figure.get("limits", [])):
                shares[name, engine].append(sample / limit if rate else limit / sample)
    return found, units, shares


def named(engine, figure):
    """As it stands in the table: of the tiny model that hops are measured with, nothing but its layer calls counts."""
    if not engine.startswith("hops"):
        return figure
    return f"{figure}, tiny model" if figure.startswith("layer call") else None


def against(rounds, first):
    """Median over the rounds that both have of median by median; None where there are none."""
    both = [statistics.median(rounds[turn]) / statistics.median(first[turn]) for turn in rounds if turn in first]
    return statistics.median(both) if both else None


def rows(folder):
    """One dictionary for each figure and engine."""
    found, units, shares = samples_by_round(folder)
    for figure, engines in found.items():
        order = sorted(engines, key=lambda engine: (engine != FIRST, engine))
        for engine in order:
            rounds = engines[engine]
            samples = [sample for turn in rounds.values() for sample in turn]
            share = shares.get((figure, engine))
            yield {
                "figure": figure,
                "unit": units[figure],
                "engine": engine,
                "samples": samples,
                "min": min(samples),
                "median": statistics.median(samples),
                "max": max(samples),
                "of_limit": statistics.median(share) if share else None,
                "of_in_process": against(rounds, engines.get(FIRST, {})) if engine != FIRST else None,
            }


def number(value):
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(rows):
    """Lines with aligned columns; a figure's name stands before its first engine."""
    cells = [["", "unit", "", "min", "median", "max", "of limit", "of in process", "n"]]
    before = None
    for row in rows:
        name, unit = (row["figure"], row["unit"]) if row["figure"] != before else ("", "")
        before = row["figure"]
        share = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
        ratio = "" if row["of_in_process"] is None else f"{row['of_in_process']:.2f}"
        spread = [number(row[key]) for key in ("min", "median", "max")]
        cells.append([name, unit, row["engine"], *spread, share, ratio, str(len(row["samples"]))])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:3], widths)]
        right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:])]
        yield "  ".join(left + right).rstrip()


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    found = list(rows(pathlib.Path(sys.argv[1])))
    if not found:
        sys.exit(f"{sys.argv[1]}: found no ENGINE.ROUND.json with figures")
    print("\n".join(table(found)))
    if len(sys.argv) == 3:
        pathlib.Path(sys.argv[2]).write_text(json.dumps({"figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
