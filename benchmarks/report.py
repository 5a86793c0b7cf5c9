"""Tables and plots, made from result lines and nothing else."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import records

Line = Mapping[str, Any]
MARKS = ("<!-- {name}: written by `python -m tilefuse bench --readme` -->", "<!-- end of {name} -->")
COLOURS = {"tilefuse": "#1b6ca8", "eager": "#9a9a9a", "torch.compile": "#e08e45", "library": "#3d9970"}
SLOWER = "#b03a2e"
MODES = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}
MODELS = "models"
TITLES = {
    "rope": "Rotary embedding",
    "fp8": "FP8",
    "moe": "Mixture of experts",
    "loss": "Losses",
    "norm": "Norms and activations",
    "lowbit": "Low bit",
    "mla": "Latent attention",
    "attention": "Sparse attention",
}
# the ops of the first picture, two of each family
HEADLINE = (
    "rope_qk",
    "qk_norm_rope",
    "fp8_quantize",
    "fp8_matmul",
    "moe_route",
    "moe_experts",
    "mla_attention",
    "mla_decode",
    "window_attention",
    "block_sparse_attention",
)
MODEL_HEADER = ["model", "case", "dtype", "mode", "tokens/s", "spread", "speed", "peak memory of the call"]
HEADER = ["op", "case", "dtype", "mode", "time", "spread", "% of roof", "compared with"]
MEMORY = "extra memory (eager's)"
# a reason longer than this is cut: a table is no log
REASON_LENGTH = 110


def speedups(line: Line, yardsticks: bool = False) -> dict[str, float]:
    """Peer -> how many times longer it took, peers that ran only, tilefuse's own other backends left out.

    Yardsticks (a plain copy) are no peers: they come alone, when asked for.
    """
    return {
        name: peer["speedup"]
        for name, peer in line.get("peers", {}).items()
        if "speedup" in peer and not name.startswith("tilefuse ") and peer.get("yardstick", False) == yardsticks
    }


def best_peer(line: Line) -> tuple[str, float] | None:
    """The fastest peer and the speed-up over it."""
    found = speedups(line)
    name = min(found, key=found.get, default=None)
    return None if name is None else (name, found[name])


def missing(lines: Iterable[Line]) -> dict[str, str]:
    """Peer -> why it did not run, in a few words and one reason each; a peer that ran elsewhere says in how many."""
    reasons: dict[str, list[str]] = {}
    asked: dict[str, int] = {}
    for line in lines:
        for name, peer in line.get("peers", {}).items():
            asked[name] = asked.get(name, 0) + 1
            if "missing" in peer:
                reasons.setdefault(name, []).append(_short_reason(peer["missing"]))
    return {
        name: found[-1] + (f" (in {len(found)} of {asked[name]} cases)" if len(found) < asked[name] else "")
        for name, found in reasons.items()
    }


def _short_reason(reason: str) -> str:
    absent = re.search(r"No module named '([^'.]+)", reason)
    if absent:
        return f"{absent[1]} is not installed"
    words = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return words if len(words) <= REASON_LENGTH else words[: REASON_LENGTH - 1].rstrip() + "…"


def _time(us: float) -> str:
    return f"{us:.2f} us" if us < 10 else f"{us:.0f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def _spread(line: Line) -> str:
    found = records.spread(line)
    return "" if found is None else f"{found:.0%}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 0.995 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _memory(line: Line) -> str:
    """Peak bytes of one call beyond its inputs, and what eager needs."""

    def megabytes(value: int | None) -> str:
        return "?" if value is None else f"{value / 1e6:.3g} MB"

    if "peak_bytes" not in line:
        return ""
    eager = line["peers"].get("eager", {}).get("peak_bytes")
    return f"{megabytes(line['peak_bytes'])} ({megabytes(eager)})"


def compared(line: Line, bold: str = "") -> str:
    """Peers with how many times longer they took, the fastest first (and ``bold``), then the yardsticks."""
    ranked = sorted(speedups(line).items(), key=lambda item: item[1])
    words = [f"{_ratio(ratio)} {name}" for name, ratio in ranked]
    if words:
        words[0] = f"{bold}{words[0]}{bold}"
    others = [f"{_ratio(ratio)} {name}" for name, ratio in speedups(line, yardsticks=True).items()]
    return " · ".join(words) + (f" (yardstick: {' · '.join(others)})" if others else "") or "-"


def rows(lines: Sequence[Line], bold: str = "") -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of cases; a column for memory where a case measured it."""
    memory = any("peak_bytes" in line for line in lines)
    header = HEADER + ([MEMORY] if memory else [])
    table = []
    for line in lines:
        cells = [line["op"], line["name"], line["dtype"], line["mode"]]
        if line["status"] != "ok":
            cells += [f"{line['status']}: {_short_reason(line['reason'])}", "", "", ""]
        elif line.get("call_cost"):
            cells += [_time(line["call_us"]) + " per call", _spread(line), "", compared(line, bold)]
        else:
            roof = f"{line['roof_percent']:.0f}% {line['bound']}"
            cells += [_time(line["median_us"]), _spread(line), roof, compared(line, bold)]
        table.append(cells + ([_memory(line)] if memory else []))
    return header, table


def apart(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """Lines of ops, and lines of whole models."""
    kinds: tuple[list[Line], list[Line]] = [], []
    for line in lines:
        kinds[line["family"] == MODELS].append(line)
    return kinds


def model_rows(lines: Sequence[Line], bold: str = "") -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of whole models: each number of the stock model, then of the patched one."""
    table = []
    for line in lines:
        cells = [line["op"], line["name"], line["dtype"], line["mode"]]
        if line["status"] != "ok":
            table.append([*cells, f"{line['status']}: {_short_reason(line['reason'])}", "", "", ""])
            continue
        stock = line["peers"]["stock"]
        rates = f"{_rate(stock['tokens_per_second'])} -> {_rate(line['tokens_per_second'])}"
        memory = f"{_mebibytes(stock['peak_bytes'])} -> {_mebibytes(line['peak_bytes'])} MiB"
        table.append([*cells, rates, _spread(line), f"{bold}{_ratio(stock['speedup'])}{bold}", memory])
    return list(MODEL_HEADER), table


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.0f}" if value >= 100 * 2**20 else f"{value / 2**20:.2g}"


def by_family(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The lines of each family, families in their own order."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["family"], []).append(line)
    return found


def measured_on(lines: Sequence[Line]) -> str:
    """Device, period, versions and commit."""
    latest = max(lines, key=lambda line: line["date"])
    versions = ", ".join(f"{name} {value}" for name, value in latest["versions"].items() if value)
    commits = {
        (line.get("commit") or "unknown")[:12] + (" with local changes" if line.get("dirty") else "") for line in lines
    }
    days = sorted({line["date"][:10] for line in lines})
    period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"**{latest['device']}**, {period}; {versions}; commit {', '.join(sorted(commits))}."


def measured_roof(lines: Sequence[Line]) -> str:
    """What the machine can do, as the latest run found it."""
    roof = max(lines, key=lambda line: line["date"])["roof"]
    tflops = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in roof["tflops"].items())
    copy, read = roof["copy_gbps"], roof["read_gbps"]
    return f"Measured roof: copy {copy:.4g} GB/s, read {read:.4g} GB/s; matmul TFLOP/s: {tflops}."


def markdown(lines: Sequence[Line]) -> str:
    """What one device measured: whole models, a table per family of ops, and which peers did not run."""
    if not lines:
        return "No results yet.\n"
    device = lines[0]["device"]
    out = [measured_on(lines), measured_roof(lines)]
    if load := records.under_load(lines):
        out.append(f"Measured under load ({load}): times are too long.")
    ops, models = apart(lines)
    if models:
        out += [f"### Whole models, {device}", "Stock Hugging Face -> patched."]
        out.append(markdown_table(*model_rows(models, bold="**")))
    for family, of_family in by_family(ops).items():
        out += [f"### {TITLES.get(family, family)}, {device}"]
        if _drawn(of_family):
            # drawn when the site is built
            out.append(f"<!-- table: benchmark_picture {lines[0]['device_key']} {family} -->")
        out.append(markdown_table(*rows(of_family, bold="**")))
    if series_of(ops):
        out += [f"### Growth with the length, {device}"]
        out += [f"<!-- table: benchmark_picture {lines[0]['device_key']} growth -->"]
    absent = missing(lines)
    if absent:
        reasons: dict[str, list[str]] = {}
        for name, reason in sorted(absent.items()):
            # a bare reason is shared, one that counts cases belongs to its peer
            shared, _, counted = reason.partition(" (in ")
            reasons.setdefault(shared, []).append(name + (f" (in {counted}" if counted else ""))
        out += [
            f"### Peers that did not run, {device}",
            "\n".join(f"- {reason}: {', '.join(names)}" for reason, names in sorted(reasons.items())),
        ]
    return "\n\n".join(out) + "\n"


def markdown_table(header: Sequence[str], table: Iterable[Sequence[str]]) -> str:
    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([row(header), row("---" for _ in header), *(row(cells) for cells in table)])


def _drawn(lines: Iterable[Line]) -> list[Line]:
    return [line for line in apart(lines)[0] if line["status"] == "ok" and not line.get("call_cost")]


def headline(lines: Sequence[Line]) -> list[Line]:
    """One line of each headline op, in their order, and all lines where none of these ops was measured."""
    found = {line["op"]: line for line in reversed(_drawn(lines)) if line["mode"] == "forward"}
    return [found[op] for op in HEADLINE if op in found] or _drawn(lines)


def plot(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Pictures per device: an overview of the headline ops, and how times grow where a series of cases was run.

    The overview has the percent of the measured roof of each op, and how it compares with its peers; `draw` makes
    pictures of other cases.
    Returns no path when matplotlib is not installed.
    """
    paths = []
    for device in sorted({line["device"] for line in lines}):
        of_device = [line for line in lines if line["device"] == device]
        quick = [line for line in of_device if line.get("suite", "quick") == "quick"]
        key = of_device[0]["device_key"]
        drawn = {"overview": partial(draw, headline(quick), apart=False), "growth": partial(draw_growth, of_device)}
        paths += [path for name, at in drawn.items() if at(path := folder / f"{key}_{name}.png")]
    return paths


def draw(lines: Sequence[Line], path: Path, *, cases: bool = False, apart: bool = True) -> bool:
    """A panel per family with one bar per line, or one panel for all unless they are ``apart``.

    ``cases`` writes the whole case beside the op.

    Returns False, and writes nothing, without matplotlib or without a line to draw.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    usable = _drawn(lines)
    if not usable:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = by_family(usable) if apart else {"": usable}
    # a bar longer than the roof is drawn in full
    right = max(100, *(line["roof_percent"] for line in usable)) + 12
    columns = _columns({name: len(found) for name, found in families.items()}, 1 if len(families) == 1 else 2)
    # rows of text: bars, and two for the title of each panel
    height = max(sum(len(families[name]) + 2 for name in column) for column in columns)
    size = (6.4 * len(columns) + (2.6 if cases or not apart else 0), 0.9 + 0.235 * height)
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(1, len(columns))
    for i, column in enumerate(columns):
        counts = [len(families[name]) + 1 for name in column]
        # a column that is shorter than the other keeps the same bar height
        rest = height - sum(count + 1 for count in counts)
        ratios = counts + ([rest] if rest > 0 else [])
        cells = grid[i].subgridspec(len(ratios), 1, height_ratios=ratios)
        for j, name in enumerate(column):
            _panel(figure.add_subplot(cells[j]), name, families[name], cases, right, last=j == len(column) - 1)
    device, date = usable[0]["device"], max(line["date"] for line in usable)[:10]
    figure.suptitle(f"% of what this machine can do: {device}, {date}", fontsize=12, fontweight="bold")
    marks = {"tilefuse": "s", "eager": "o", "torch.compile": "D", "library": "^"}
    words = {"tilefuse": "tilefuse (bar)", "eager": "PyTorch eager", "library": "best library"}
    handles = [
        plt.Line2D([], [], linestyle="", marker=mark, color=COLOURS[name], label=words.get(name, name))
        for name, mark in marks.items()
    ]
    note = "On the right: speed against the fastest of these peers; red where tilefuse is slower."
    options = {"ncols": len(handles), "frameon": False, "fontsize": 9, "title": note, "title_fontsize": 9}
    figure.legend(handles=handles, loc="outside lower center", **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date in the file: the same lines give the same picture
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
    plt.close(figure)
    return True


def series_of(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """(op, series) -> its lines by length, where there are at least three."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(_drawn(lines), key=lambda line: line.get("length", 0)):
        if "series" in line:
            found.setdefault((line["op"], line["series"]), []).append(line)
    return {key: of_series for key, of_series in found.items() if len(of_series) >= 3}


def draw_growth(lines: Sequence[Line], path: Path) -> bool:
    """A panel per series: time over length on logarithmic axes, with a line of proportional growth through the first.

    Returns False, and writes nothing, without matplotlib or without a series of at least three lengths.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    series = series_of(lines)
    if not series:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(series), figsize=(6.4 * len(series), 4.4), layout="constrained", squeeze=False)
    for axes, ((op, name), found) in zip(grid[0], series.items()):
        lengths = [line["length"] for line in found]
        ours = [line["median_us"] / 1e3 for line in found]
        axes.plot(lengths, ours, "s-", color=COLOURS["tilefuse"], label="tilefuse", zorder=3)
        linear = [ours[0] * length / lengths[0] for length in lengths]
        axes.plot(lengths, linear, ":", color="#555555", label="proportional to the length", zorder=2)
        colours = itertools.cycle((COLOURS["library"], "#8e5ea2", "#c0a000"))
        for peer in dict.fromkeys(peer for line in found for peer in line["peers"]):
            points = [
                (line["length"], line["peers"][peer]["median_us"] / 1e3)
                for line in found
                if "median_us" in line["peers"].get(peer, {})
            ]
            if points:
                colour = COLOURS.get(peer) or next(colours)
                axes.plot(*zip(*points), "o-", color=colour, markersize=4, linewidth=1, label=peer)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("ms")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        axes.set_title(f"{op}: {name}", fontsize=10, fontweight="bold", loc="left")
    figure.suptitle(found[0]["device"], fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
    plt.close(figure)
    return True


def _columns(counts: Mapping[str, int], number: int) -> list[list[str]]:
    """Families over columns of nearly the same height: each family whole, in the given order."""
    names = list(counts)

    def tallest(places: Sequence[int]) -> int:
        return max(sum(counts[n] + 2 for n, at in zip(names, places) if at == column) for column in range(number))

    best = min(itertools.product(range(number), repeat=len(names)), key=tallest)
    columns = [[n for n, at in zip(names, best) if at == column] for column in range(number)]
    return [column for column in columns if column]


def _panel(axes: Any, family: str, lines: Sequence[Line], cases: bool, right: float, last: bool) -> None:
    for i, line in enumerate(lines):
        percent = line["roof_percent"]
        axes.barh(i, percent, color=COLOURS["tilefuse"], height=0.62, zorder=2)
        best = best_peer(line)
        others = {n: r for n, r in speedups(line).items() if n not in ("eager", "torch.compile")}
        library = min(others, key=others.get, default=None)
        for name, colour, mark in (
            ("eager", "eager", "o"),
            ("torch.compile", "torch.compile", "D"),
            (library, "library", "^"),
        ):
            peer = line["peers"].get(name, {}) if name else {}
            if "speedup" in peer:
                at = min(percent / peer["speedup"], right)
                axes.plot(at, i, mark, color=COLOURS[colour], markersize=5, zorder=3, markeredgecolor="white")
        if best:
            text = f"{_ratio(best[1])} {best[0]}"
            colour = "#222222" if best[1] >= 0.995 else SLOWER
            axes.text(right + 3, i, text, va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(lines)), labels(lines, cases), fontsize=8.5)
    axes.set_xlim(0, right + 55)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"] if last else [""] * 5, fontsize=8)
    axes.vlines([25, 50, 75, 100], -0.6, len(lines) - 0.4, color="#dddddd", linewidth=0.7, zorder=0)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(family, fontsize=10, fontweight="bold", loc="left", pad=3)


def labels(lines: Sequence[Line], cases: bool = False) -> list[str]:
    """The op, and of the case only what tells it from the op's other cases (or all of it)."""
    found = []
    for line in lines:
        others = [o for o in lines if o["op"] == line["op"] and o is not line]
        label = line["op"]
        if line["mode"] != "forward" or any(o["mode"] != line["mode"] for o in others):
            label += f" {MODES[line['mode']]}"
        parts = line["name"].split(", ")
        alike = [o for o in others if o["mode"] == line["mode"]]
        own = [part for part in parts if any(part not in o["name"].split(", ") for o in alike)]
        dtype = [line["dtype"]] if any(o["dtype"] != line["dtype"] for o in alike) else []
        shown = parts if cases else own
        found.append(": ".join([label, ", ".join([*shown, *dtype])]) if [*shown, *dtype] else label)
    return found


def op_table(ops: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The README's table of ops: what the result lines hold, and the exceptions that the registry knows."""
    by_name = sorted(ops.items(), key=lambda item: (item[1].module.split("/")[0], item[0]))
    devices = by_device(lines) or [[]]
    titles = ["speed against the fastest peer"] if len(devices) == 1 else [of[0]["device"] for of in devices]
    table = [[f"`{name}`", *(_best_of_op(name, of) for of in devices), _exceptions(op)] for name, op in by_name]
    return markdown_table(["op", *titles, "exceptions"], table) + "\n"


def _exceptions(op: Any) -> str:
    """What an op lacks of C++, Triton and a backward, what it has of CUDA C++, and where a GPU verified it."""
    from tilefuse import library

    words = [] if op.differentiable else ["no backward"]
    if not op.kernels:
        return ", ".join(["PyTorch only", *words])
    for backend, language in (("cpu", "C++"), ("triton", "Triton"), ("cuda", "CUDA")):
        there = [backend in library.kernels()[kernel].backends for kernel in op.kernels]
        have = "all" if all(there) else "in part" if any(there) else "no"
        usual = "no" if backend == "cuda" else "all"
        if have != usual:
            words.append({"all": f"{language} too", "in part": f"{language} in part", "no": f"no {language}"}[have])
    words += [f"verified on {', '.join(archs)} ({backend})" for backend, archs in op.architectures.items() if archs]
    return ", ".join(words)


def _best_of_op(name: str, lines: Sequence[Line]) -> str:
    """Range of speed-ups over the best peer on one device, and which peers these are."""
    usable = [line for line in lines if line["op"] == name and line["status"] == "ok"]
    best = [found for found in map(best_peer, usable) if found]
    if not best:
        return "not measured"
    return f"{_span([ratio for _, ratio in best])} {' and '.join(dict.fromkeys(peer for peer, _ in best))}"


def _span(ratios: Sequence[float]) -> str:
    low, high = min(ratios), max(ratios)
    return _ratio(low) if math.isclose(low, high, rel_tol=0.05) else f"{_ratio(low)} to {_ratio(high)}"


def model_table(lines: Sequence[Line]) -> str:
    """The README's table of whole models: how many times faster the patched model is, by what it does."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        if line["status"] == "ok":
            ratios.setdefault(line["op"], {}).setdefault(line["mode"], []).append(line["peers"]["stock"]["speedup"])
    modes = ("prefill", "decode", "train", "prefill packed", "decode packed")
    table = [[model, *(_span(found[m]) if m in found else "" for m in modes)] for model, found in ratios.items()]
    return markdown_table(["model", *modes], table)


def replace_between_marks(text: str, name: str, content: str) -> str:
    """README text with the part between the marks of ``name`` replaced.

    Raises:
        ValueError: the marks are not there, each once and in order.
    """
    start, end = (mark.format(name=name) for mark in MARKS)
    pattern = re.compile(re.escape(start) + r"\n.*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the text must hold {start!r} and {end!r} once, in this order")
    return pattern.sub(lambda _: f"{start}\n{content.rstrip()}\n{end}", text)


def readme(text: str, ops: Mapping[str, Any], lines: Sequence[Line], plots: Sequence[str]) -> str:
    """README text with its generated parts renewed: picture, op table, whole models."""
    if plots:
        picture = "\n".join(
            f"![Bars: how close each op comes to the speed of the machine; marks: its peers]({path})" for path in plots
        )
    else:
        picture = "No results yet: `make bench` measures this machine and draws them."
    found = [
        f"{measured_on(models)}\n\n{model_table(models)}"
        for of_device in by_device(lines)
        if (models := apart(of_device)[1])
    ]
    text = replace_between_marks(text, "plot", picture)
    text = replace_between_marks(text, "ops", op_table(ops, lines))
    return replace_between_marks(text, "models", "\n\n".join([*found, *_no_gpu(lines)]))


def page(text: str, lines: Sequence[Line]) -> str:
    """The documentation's page of benchmarks with its generated part renewed: every case on every device."""
    found = [f"## {of_device[0]['device']}\n\n{markdown(of_device)}" for of_device in by_device(lines)]
    return replace_between_marks(text, "numbers", "\n".join([*found, *_no_gpu(lines)]))


def by_device(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines of each device, a GPU before a CPU."""
    devices = sorted({line["device"] for line in lines}, key=lambda device: ("NVIDIA" not in device, device))
    return [[line for line in lines if line["device"] == device] for device in devices]


def _no_gpu(lines: Sequence[Line]) -> list[str]:
    return [] if any("NVIDIA" in line["device"] for line in lines) else ["GPU: not run on any GPU yet.\n"]
