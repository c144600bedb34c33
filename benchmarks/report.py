"""What a benchmark found, as a table, as JSON and as a picture."""

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]

TITLES = {
    "small": "500x375",
    "large": "4000x3000",
    "mix": "mix",
}
_COLOURS = {"plain": "#b8b8b8", "ours": "#1f77b4", "limit": "#2f2f2f"}
_console = Console(stderr=True)


def say(text: str) -> None:
    """Tells on stderr what is measured now."""
    _console.print(text, style="dim", highlight=False)


def machine_line(found: Result) -> str:
    """Names the machine in one line."""
    machine = found["machine"]
    cpu = machine["cpu"].split(", ")[0]
    vector = "AVX-512" if "avx512f" in machine["cpu"] else ""
    memory = machine["memory_bytes"] / 2**30
    parts = [cpu, f"{machine['cores']} cores", vector, f"{memory:.0f} GiB", machine["system"]]
    return ", ".join(part for part in parts if part)


def show(found: Result) -> None:
    """Prints the tables."""
    console = Console(width=None if Console().is_terminal else 118)
    title = f"{machine_line(found)}; {found['date'][:10]}"
    console.print(title, highlight=False)
    if found["quick"]:
        console.print("Quick: too few images for figures to quote.", style="bold")
    if found["machine"]["load_before"] > 0.3:
        load = found["machine"]["load_before"]
        console.print(f"The machine was busy (load {load:.1f}): figures are too low.", style="bold")
    sections = found["sections"]
    shown = [name for name in TITLES if name in sections]
    if shown:
        console.print(_against_plain(found, shown))
        for name in shown:
            section = sections[name]
            console.print(
                f"{TITLES[name]}: decode alone {section['decoding']['images_per_second']:.0f}/s "
                f"{_setting(section['decoding']['setting'])}; module alone, "
                f"{section['engine']['family']}, {section['engine']['images_per_second']:.0f}/s "
                f"{_setting(section['engine']['setting'])}",
                highlight=False,
            )
    if "engines" in sections:
        console.print(_engines(sections["engines"]))
    if "five" in sections:
        for name, one in sections["five"]["sets"].items():
            console.print(
                f"{len(sections['five']['modules'])} modules, {one['images']} images of {name}: "
                f"one run takes {one['ratio_pipeline']:.2f} of the pipeline time of a run each "
                f"({one['rows']['one run']['pipeline_seconds']:.1f} s against "
                f"{one['rows']['a run each']['pipeline_seconds']:.1f} s; with start-up "
                f"{one['ratio_whole']:.2f})",
                highlight=False,
            )
    for name, title in (("scale", "Memory and size, 256x192"), ("processes", "Processes, 500x375")):
        if name in sections:
            console.print(_rows(title, sections[name]["rows"]))


def _setting(setting: Result) -> str:
    return "(" + ", ".join(f"{key} {value}" for key, value in setting.items()) + ")"


def _number(value: float | None, form: str = ".0f") -> str:
    return "" if value is None else f"{value:{form}}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _against_plain(found: Result, sections: list[str]) -> Table:
    table = _table(
        f"mobilenet_v2_050_224; medians of {found['sizes']['rounds']} rounds; "
        f"{found['price_per_vcpu_hour']} $ a vCPU-hour",
        "",
        "images/s pipeline",
        "with start-up",
        "of the limit",
        "of plain",
        "CPU-s / 1000",
        "peak MB",
        "first vector s",
        "$ / million",
    )
    for name in sections:
        for row, figures in found["sections"][name]["rows"].items():
            table.add_row(
                f"{TITLES[name]} {row}",
                _number(figures["images_per_second"]),
                _number(figures.get("images_per_second_whole")),
                _number(figures["ratio_to_limit"], ".2f"),
                _number(figures["ratio_to_plain"], ".2f"),
                _number(figures["cpu_seconds_per_1000"], ".1f"),
                _megabytes(figures.get("peak_bytes")),
                _number(figures.get("first_vector_seconds"), ".1f"),
                _number(figures["cost_per_million"], ".2f"),
                end_section=row == "limit",
            )
    return table


def _engines(section: Result) -> Table:
    names = list(dict.fromkeys(name for found in section.values() for name in found["engines"]))
    table = _table("Engines alone, images/s (worst cosine to TensorFlow)", "", *names, "auto")
    for module, found in section.items():
        cells = []
        for name in names:
            one = found["engines"].get(name)
            cells.append(
                f"{one['images_per_second']:.0f} ({one['cosine_min_photos']:.6f})" if one else ""
            )
        table.add_row(module + (" *" if found["untrained"] else ""), *cells, found["auto"])
    if any(found["untrained"] for found in section.values()):
        table.caption = "* untrained stand-in"
    return table


def _rows(title: str, rows: Result) -> Table:
    table = _table(title, "", "images/s pipeline", "with start-up", "CPU-s / 1000 whole", "peak MB")
    for name, figures in rows.items():
        table.add_row(
            name,
            _number(figures["images_per_second"]),
            _number(figures["images_per_second_whole"]),
            _number(figures["cpu_seconds_per_1000_whole"], ".1f"),
            _megabytes(figures["peak_bytes"]),
        )
    return table


def write(found: Result, folder: Path) -> list[Path]:
    """Writes JSON and, where Matplotlib is installed, a picture; named by the machine.

    Returns:
      The files.
    """
    cpu = found["machine"]["cpu"].split(", ")[0]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu} {found['machine']['cores']} cores".lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{slug}{'-quick' if found['quick'] else ''}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        say("no picture: pip install 'hubbeam[bench]'")
        return [file]
    matplotlib.use("Agg")
    picture = file.with_suffix(".png")
    draw(found, picture)
    return [file, picture]


def draw(found: Result, file: Path) -> None:
    """Draws what was found, one panel a question."""
    from matplotlib import pyplot

    sections = found["sections"]
    panels = [(name, _draw_rates) for name in TITLES if name in sections]
    panels += [("engines", _draw_engines)] if "engines" in sections else []
    panels += [("five", _draw_five)] if "five" in sections else []
    panels += [("scale", _draw_scale)] if "scale" in sections else []
    panels += [("processes", _draw_processes)] if "processes" in sections else []
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(5.2 * columns, 3.9 * rows + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, panel) in zip(axes.flat, panels, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        panel(axis, name, sections[name])
    quick = "   QUICK, not to be quoted" if found["quick"] else ""
    versions = found["machine"]["versions"]
    named = ", ".join(f"{k} {versions[k]}" for k in ("hubbeam", "apache-beam", "tensorflow",
                      "openvino") if k in versions)  # fmt: skip
    figure.suptitle(f"{machine_line(found)}   {found['date'][:10]}{quick}\n{named}", fontsize=10)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _draw_rates(axis: Any, name: str, section: Result) -> None:
    rows = section["rows"]
    rates = [rows[row]["images_per_second"] for row in rows]
    bars = axis.bar(list(rows), rates, color=[_COLOURS[row] for row in rows], width=0.6)
    labels = [
        f"{rate:.0f}\n{rows[row]['ratio_to_plain']:.1f}x, {rows[row]['ratio_to_limit']:.2f}"
        for row, rate in zip(rows, rates, strict=True)
    ]
    axis.bar_label(bars, labels, padding=2, fontsize=9)
    axis.set_ylim(0, max(rates) * 1.25)
    axis.set_title(
        f"{TITLES[name]}: pipeline, images/s\n(times plain, part of the limit)", fontsize=10
    )


def _draw_engines(axis: Any, name: str, section: Result) -> None:
    names = list(dict.fromkeys(engine for found in section.values() for engine in found["engines"]))
    height = 0.8 / len(names)
    palette = ["#b8b8b8", "#1f77b4", "#9ecae1", "#e6842a"]
    for number, engine in enumerate(names):
        rates = [
            found["engines"].get(engine, {}).get("images_per_second", 0)
            for found in section.values()
        ]
        places = [row + number * height for row in range(len(section))]
        bars = axis.barh(places, rates, height, label=engine, color=palette[number % 4])
        marks = [
            f"{rate:.0f}{' auto' if found['auto'] == engine else ''}"
            for rate, found in zip(rates, section.values(), strict=True)
        ]
        axis.bar_label(bars, marks, padding=2, fontsize=7)
    axis.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(section))],
        [m + (" *" if f["untrained"] else "") for m, f in section.items()],
        fontsize=7,
    )
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    axis.set_title("engines alone, images/s (* untrained)", fontsize=10)


def _draw_five(axis: Any, name: str, section: Result) -> None:
    bars = {
        f"{row},\n{one['images']} of {photographs}": figures["pipeline_seconds"]
        for photographs, one in section["sets"].items()
        for row, figures in one["rows"].items()
    }
    drawn = axis.bar(list(bars), list(bars.values()), color=["#1f77b4", "#b8b8b8"] * 2)
    axis.bar_label(drawn, fmt="%.1f", padding=2)
    axis.margins(y=0.15)
    axis.tick_params(axis="x", labelsize=7)
    ratios = ", ".join(f"{one['ratio_pipeline']:.2f}" for one in section["sets"].values())
    axis.set_title(f"{len(section['modules'])} modules: pipeline, s\nratios {ratios}", fontsize=10)


def _draw_scale(axis: Any, name: str, section: Result) -> None:
    counts = [int(count) for count in section["rows"]]
    memory = [row["peak_bytes"] / 1e6 for row in section["rows"].values()]
    axis.plot(counts, memory, "o-", color="#1f77b4")
    for count, megabytes, row in zip(counts, memory, section["rows"].values(), strict=True):
        axis.annotate(
            f"{megabytes:.0f} MB\n{row['images_per_second']:.0f}/s",
            (count, megabytes),
            textcoords="offset points",
            xytext=(0, -28),
            ha="center",
            fontsize=8,
        )
    axis.set_xscale("log")
    axis.set_ylim(0, max(memory) * 1.3)
    axis.margins(x=0.15)
    axis.set_title("peak memory (MB) against images, 256x192", fontsize=10)


def _draw_processes(axis: Any, name: str, section: Result) -> None:
    rows = section["rows"]
    bars = axis.bar(
        [row.replace(", ", ",\n") for row in rows],
        [figures["images_per_second"] for figures in rows.values()],
        color=[_COLOURS[row.split(",")[0]] for row in rows],
    )
    axis.bar_label(
        bars,
        [f"{f['images_per_second']:.0f}\n{f['peak_bytes'] / 1e6:.0f} MB" for f in rows.values()],
        padding=2,
        fontsize=9,
    )
    axis.margins(y=0.2)
    axis.set_title("one process against two, 500x375: images/s", fontsize=10)
