"""Tables and plots, made from result lines and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
README_MARKS = ("<!-- {name}: written by `python -m tilefuse bench --readme` -->", "<!-- end of {name} -->")
# tilefuse, then peers in the order in which a reader asks for them
COLOURS = {"tilefuse": "#1b6ca8", "eager": "#b8b8b8", "torch.compile": "#e08e45"}


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
    """Peer -> why it did not run, one reason each."""
    return {
        name: peer["missing"] for line in lines for name, peer in line.get("peers", {}).items() if "missing" in peer
    }


def _time(us: float) -> str:
    return f"{us:.2f} us" if us < 10 else f"{us:.0f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def _ratio(value: float) -> str:
    return f"{value:.2g}x" if value < 1 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _memory(line: Line) -> str:
    """Peak bytes of one call beyond its inputs, and what eager needs."""

    def megabytes(value: int | None) -> str:
        return "?" if value is None else f"{value / 1e6:.3g} MB"

    if "peak_bytes" not in line:
        return ""
    eager = line["peers"].get("eager", {}).get("peak_bytes")
    return f"{megabytes(line['peak_bytes'])} ({megabytes(eager)})"


def rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of cases."""
    peers = []
    for line in lines:
        for name in speedups(line):
            if name not in peers and name not in ("eager", "torch.compile"):
                peers.append(name)
    header = ["op", "case", "dtype", "mode", "time", "GB/s", "TFLOP/s", "% of roof", "vs eager", "vs torch.compile"]
    header += ["vs best library"] if peers else []
    bounds = list(dict.fromkeys(name for line in lines for name in speedups(line, yardsticks=True)))
    header += [f"vs {name}" for name in bounds]
    memory = any("peak_bytes" in line for line in lines)
    header += ["extra memory (eager's)"] if memory else []
    table = []
    for line in lines:
        if line["status"] != "ok":
            cells = [line["op"], line["name"], line["dtype"], line["mode"], f"{line['status']}: {line['reason']}"]
            table.append(cells + [""] * (len(header) - len(cells)))
            continue
        ratios = speedups(line)
        cost = line.get("call_cost")
        cells = [
            line["op"],
            line["name"],
            line["dtype"],
            line["mode"],
            _time(line["call_us"]) + " per call" if cost else _time(line["median_us"]),
            "" if cost else f"{line['gbps']:.1f}",
            f"{line['tflops']:.3g}" if line["flops"] and not cost else "",
            "" if cost else f"{line['roof_percent']:.0f}% {line['bound']}",
        ]
        cells += [_ratio(ratios[name]) if name in ratios else "-" for name in ("eager", "torch.compile")]
        if peers:
            others = {name: ratio for name, ratio in ratios.items() if name in peers}
            best = min(others, key=others.get, default=None)
            cells.append(f"{_ratio(others[best])} {best}" if best else "-")
        own = speedups(line, yardsticks=True)
        cells += [_ratio(own[name]) if name in own else "-" for name in bounds]
        cells += [_memory(line)] if memory else []
        table.append(cells)
    return header, table


def markdown(lines: Sequence[Line]) -> str:
    """The table of one device, with what it was measured on and which peers did not run."""
    if not lines:
        return "No results yet.\n"
    latest = max(lines, key=lambda line: line["date"])
    versions = ", ".join(f"{name} {value}" for name, value in latest["versions"].items() if value)
    commits = {
        (line.get("commit") or "unknown")[:12] + (" with local changes" if line.get("dirty") else "") for line in lines
    }
    days = sorted({line["date"][:10] for line in lines})
    period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    roof = latest["roof"]
    tflops = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in roof["tflops"].items())
    out = [
        f"**{latest['device']}**, {period}; {versions}; commit {', '.join(sorted(commits))}.",
        f"Measured roof: copy {roof['copy_gbps']:.4g} GB/s; matmul TFLOP/s: {tflops}.",
        "",
        _markdown_table(*rows(lines)),
    ]
    absent = missing(lines)
    if absent:
        out += ["", "Peers that did not run in some case:", ""]
        out += [f"- {name}: {reason}" for name, reason in sorted(absent.items())]
    return "\n".join(out) + "\n"


def _markdown_table(header: Sequence[str], table: Iterable[Sequence[str]]) -> str:
    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([row(header), row("---" for _ in header), *(row(cells) for cells in table)])


def _summarised(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line["status"] == "ok" and not line.get("call_cost")]


def plot(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Two pictures per device: percent of the measured roof, and speed-up over the best peer.

    Returns no path when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    paths = []
    for device in sorted({line["device"] for line in lines}):
        of_device = [line for line in lines if line["device"] == device]
        usable = _summarised(of_device)
        if not usable:
            continue
        stem = of_device[0]["device_key"]
        title = f"{device}, {max(line['date'] for line in usable)[:10]}"
        paths.append(_plot_roof(usable, title, folder / f"{stem}_roof.png"))
        with_peer = [line for line in usable if best_peer(line)]
        if with_peer:
            paths.append(_plot_speedup(with_peer, title, folder / f"{stem}_speedup.png"))
    return paths


def _label(line: Line) -> str:
    mode = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}[line["mode"]]
    return f"{line['op']} {mode} · {line['name']} · {line['dtype']}"


def _figure(count: int) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.28 * count), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    # no date in the file: the same lines give the same picture
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def _plot_roof(lines: Sequence[Line], title: str, path: Path) -> Path:
    figure, axes = _figure(len(lines))
    position = range(len(lines))
    axes.barh(position, [line["roof_percent"] for line in lines], color=COLOURS["tilefuse"], height=0.7)
    for i, line in enumerate(lines):
        for name in ("eager", "torch.compile"):
            peer = line["peers"].get(name, {})
            if "median_us" in peer:
                percent = line["roof_percent"] * line["median_us"] / peer["median_us"]
                axes.plot(percent, i, "|", color=COLOURS[name], markersize=9, markeredgewidth=2.5)
    for name in ("eager", "torch.compile"):
        axes.plot([], [], "|", color=COLOURS[name], markersize=9, markeredgewidth=2.5, label=name)
    axes.barh([0], [0], color=COLOURS["tilefuse"], label="tilefuse")
    axes.set_yticks(position, [_label(line) for line in lines])
    axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("% of this machine's measured roof (copy or matmul)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, path)


def _plot_speedup(lines: Sequence[Line], title: str, path: Path) -> Path:
    figure, axes = _figure(len(lines))
    position = range(len(lines))
    best = [best_peer(line) for line in lines]
    colours = [COLOURS["tilefuse"] if ratio >= 1 else "#b03a2e" for _, ratio in best]
    axes.barh(position, [ratio for _, ratio in best], color=colours, height=0.7)
    for i, (name, ratio) in enumerate(best):
        axes.text(ratio, i, f" {_ratio(ratio)} {name}", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(right=max(ratio for _, ratio in best) * 3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(position, [_label(line) for line in lines])
    axes.set_xlabel("speed-up over the fastest peer (median of paired rounds)")
    axes.set_title(title, fontsize=10)
    return _save(figure, path)


def op_table(ops: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The README's table of ops: what the registry says, and what the result lines hold."""
    table = []
    for name, op in sorted(ops.items(), key=lambda item: (item[1].module.split("/")[0], item[0])):
        gpus = {backend: archs for backend, archs in op.architectures.items() if archs}
        on = "; ".join(f"{backend}: {', '.join(archs)}" for backend, archs in gpus.items())
        dtypes = ", ".join(_short(dtype) for dtype in op.dtypes)
        table.append(
            [
                f"`{name}`",
                op.family,
                "forward + backward" if op.differentiable else "forward",
                dtypes,
                ", ".join(op.backends),
                on or "not run on any GPU yet",
                _best_of_op(name, lines),
            ]
        )
    header = ["op", "family", "gradients", "dtypes", "backends", "verified GPUs", "fastest peer, measured"]
    return _markdown_table(header, table) + "\n"


def _short(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "fp")


def _best_of_op(name: str, lines: Sequence[Line]) -> str:
    """Range of speed-ups over the best peer, by device."""
    parts = []
    usable = [line for line in lines if line["op"] == name and line["status"] == "ok" and best_peer(line)]
    for device in sorted({line["device"] for line in usable}):
        ratios = [best_peer(line)[1] for line in usable if line["device"] == device]
        low, high = min(ratios), max(ratios)
        span = _ratio(low) if math.isclose(low, high, rel_tol=0.05) else f"{_ratio(low)} to {_ratio(high)}"
        parts.append(f"{span} ({device}, {len(ratios)} case{'s' if len(ratios) > 1 else ''})")
    return "; ".join(parts) or "not measured"


def replace_between_marks(text: str, name: str, content: str) -> str:
    """README text with the part between the marks of ``name`` replaced.

    Raises:
        ValueError: the marks are not there, each once and in order.
    """
    start, end = (mark.format(name=name) for mark in README_MARKS)
    pattern = re.compile(re.escape(start) + r"\n.*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the text must hold {start!r} and {end!r} once, in this order")
    return pattern.sub(lambda _: f"{start}\n{content.rstrip()}\n{end}", text)


def readme(text: str, ops: Mapping[str, Any], lines: Sequence[Line], plots: Sequence[str]) -> str:
    """README text with its generated parts renewed: picture, op table, numbers."""
    if plots:
        picture = "\n".join(f"![speed]({path})" for path in plots)
    else:
        picture = "No results yet: `make bench` measures this machine and draws them."
    devices = sorted({line["device"] for line in lines})
    numbers = "\n".join(markdown([line for line in lines if line["device"] == device]) for device in devices)
    if not any("NVIDIA" in device for device in devices):
        numbers += "\nGPU: not run on any GPU yet.\n"
    text = replace_between_marks(text, "plot", picture)
    text = replace_between_marks(text, "ops", op_table(ops, lines))
    return replace_between_marks(text, "numbers", numbers)
