"""Timing several ways to do the same beside each other, in one process."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MATRIX_SIZE = 3072  # of the matrix products that tell the machine's peak
MATRIX_ROUNDS = 5
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to RESET, it sets the peak memory to what is in use
KILOBYTES_PER_GIGABYTE = 1e6


@dataclass(frozen=True)
class Measured:
    """One way to do the work.

    Attributes:
        name: of the way; the first of a list is the plain one.
        seconds: [rounds] for one unit of work.
        work: GFLOP in one unit, or None.
        peak_gigabytes: largest memory of the process while it ran, or None where the system does
            not tell (1e9 bytes).
    """

    name: str
    seconds: tuple
    work: float | None = None
    peak_gigabytes: float | None = None

    @property
    def median(self):
        """Seconds for one unit of work."""
        return float(np.median(self.seconds))

    @property
    def speed(self):
        """GFLOP/s, or None."""
        return None if self.work is None else self.work / self.median

    def faster_than(self, other):
        """Ratio of the medians."""
        return other.median / self.median


def interleaved(ways, *, rounds, units=1, work=None):
    """Time every way in turn, round after round, so that what disturbs one disturbs all.

    Args:
        ways: {name: function without arguments}; each is called once before, untimed.
        rounds: times each is measured.
        units: units of work in one call.
        work: {name: GFLOP in one unit}.

    Returns:
        [`Measured`], in the order of `ways`.
    """
    seconds, peaks = {name: [] for name in ways}, {name: [] for name in ways}
    for function in ways.values():
        function()
    for _ in range(rounds):
        for name, function in ways.items():
            reset_peak()
            started = time.perf_counter()
            function()
            seconds[name].append((time.perf_counter() - started) / units)
            peaks[name].append(peak_gigabytes())
    return [
        Measured(
            name,
            tuple(seconds[name]),
            (work or {}).get(name),
            None if None in peaks[name] else max(peaks[name]),
        )
        for name in ways
    ]


def reset_peak():
    """Forget the largest memory so far, where the system can (Linux)."""
    if RESET.exists():
        RESET.write_text(RESET_PEAK)


def peak_gigabytes():
    """Largest memory of the process since `reset_peak`, 1e9 bytes; None where it is not told."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) / KILOBYTES_PER_GIGABYTE


def matrix_peak(dtype):
    """GFLOP/s of a large matrix product in "float32" or "bfloat16": what the machine can do."""
    import tensorflow as tf

    matrix = tf.cast(tf.random.stateless_uniform([MATRIX_SIZE] * 2, [0, 1]), dtype)
    product = tf.function(lambda: tf.reduce_sum(tf.cast((matrix @ matrix)[0], tf.float32)))
    (measured,) = interleaved({"": lambda: product().numpy()}, rounds=MATRIX_ROUNDS)
    return 2e-9 * MATRIX_SIZE**3 / min(measured.seconds)


def graph_gflop(function):
    """GFLOP of one call of a `tf.function` without arguments, as TensorFlow counts its operations.

    Only the plain form is counted; a form with fewer products is credited with the work it saves.
    """
    import tensorflow as tf

    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    options = options.with_empty_output().build()
    graph = function.get_concrete_function().graph
    return profiler.profile(graph, options=options).total_float_ops / 1e9


def as_rows(measured, *, unit, peaks=None):
    """JSON-serialisable rows of a table, one per way.

    Args:
        measured: [`Measured`]; ratios are to the first.
        unit: of the work, for the column of seconds.
        peaks: {dtype in the name: GFLOP/s of a matrix product}.
    """
    rows = []
    for way in measured:
        row = {"way": way.name, f"seconds per {unit}": way.median}
        row["times faster"] = way.faster_than(measured[0])
        if way.speed is not None:
            row["GFLOP/s"] = way.speed
            dtype = "bfloat16" if "bfloat16" in way.name else "float32"
            row["of peak"] = way.speed / peaks[dtype]
        if way.peak_gigabytes is not None:
            row["peak GB"] = way.peak_gigabytes
        rows.append(row)
    return rows


def table(rows):
    """Rows as text with aligned columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    lines = []
    for line in cells:
        pairs = zip(line, widths, strict=True)
        first, *others = (
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(pairs)
        )
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


def _cell(value):
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"
