"""A table of ncu's metrics for each kernel: `ncu --csv --print-units base --metrics ...`."""

import csv
from pathlib import Path

# Heading -> (metric, unit of the table in ncu's base units, format)
COLUMNS = {
    "us": ("gpu__time_duration.sum", 1e3, ".1f"),
    "MB read": ("dram__bytes_read.sum", 1e6, ".1f"),
    "MB written": ("dram__bytes_write.sum", 1e6, ".1f"),
    "warps %": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1, ".0f"),
    "registers": ("launch__registers_per_thread", 1, ".0f"),
    "M inst": ("smsp__inst_executed.sum", 1e6, ".2f"),
    "M atomics": ("smsp__inst_executed_op_shared_atom.sum", 1e6, ".2f"),
    "M conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 1e6, ".2f"),
}
WIDTH = 36  # characters of a kernel's name

METRICS = [metric for metric, _, _ in COLUMNS.values()]


def read_kernels(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Return each launch in order: the kernel's name and its metrics in ncu's base units."""
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(text for text in file if text.startswith('"')):
            value = (line["Metric Value"] or "").replace(",", "")
            _, metrics = launches.setdefault(line["ID"], (line["Kernel Name"], {}))
            try:
                metrics[line["Metric Name"]] = float(value)
            except ValueError:
                continue  # "n/a": this card has no such counter
    return list(launches.values())


def short_name(kernel: str) -> str:
    """Return the name without return type, namespace and parameters."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "").replace("pdp::", "")
    depth = 0
    for at in range(len(name) - 1, -1, -1) if name.endswith(")") else ():
        depth += (name[at] == ")") - (name[at] == "(")
        if depth == 0:
            return name[:at]
    return name


def format_kernels(path: Path) -> str:
    """Return a line for each launch, with the rate at which it read and wrote memory."""
    launches = read_kernels(path)
    lines = [f"{'kernel':{WIDTH}}{'GB/s':>7}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for kernel, metrics in launches:
        cells = [
            f"{metrics[metric] / unit:{style}}" if metric in metrics else "-"
            for metric, unit, style in COLUMNS.values()
        ]
        time, read, written = (metrics.get(metric) for metric in METRICS[:3])
        rate = f"{(read + written) / time:.0f}" if time and None not in (read, written) else "-"
        cells = "".join(f"{cell:>12}" for cell in cells)
        lines.append(f"{short_name(kernel)[:WIDTH]:{WIDTH}}{rate:>7}{cells}")
    return "\n".join(lines)
