"""The screen of ``mixft inspect``: one table of kernels that memory bounds, one of matrix products, and the faults."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixft.kernels.architecture import Architecture
from mixft.kernels.compilation import CompiledVariant, faults
from mixft.kernels.parallel_compilation import Outcome
from mixft.kernels.traffic import ELEMENTS
from mixft.kernels.variant import MatrixProduct, kernel_of

WIDTH = 120
RESOURCES = ("regs", "smem", "warps", "occupancy")
MEMORY = (*RESOURCES, "load\nbits", "store\nbits", "bytes/\nelement", "floor", f"us for\n{ELEMENTS // 10**6}M")
PRODUCT = (*RESOURCES, "stages", "instruction", "op/B", "busy", "M x N x K", "us")
LEGEND = """\
regs: a thread, + bytes spilled; smem: bytes of shared memory; occupancy: warps at a time, of the most, and its limit;
bits: of the widest access; bytes/element: counted in the code, caches too; floor: each operand once; op/B: arithmetic
per byte that a tile reads; busy: multiprocessors with a tile; us: least time at published figures, not measured yet"""
SHORT = {"registers": "regs", "shared memory": "smem", "tensor memory": "tmem"}
LEFT = ("occupancy", "instruction")


def print_report(
    console: Console, arch: Architecture, outcomes: Sequence[Outcome], missing: Sequence[str], *, overview: bool
) -> None:
    """Print what became of the variants of one architecture.

    Args:
        console: where to.
        arch: the architecture.
        outcomes: of all its variants.
        missing: kernels that the architecture has no variant of.
        overview: show one variant for each kernel and stated problem, and name the others at fault alone.
    """
    gpu = arch.gpu
    units = "compute units" if arch.backend == "hip" else "multiprocessors"
    console.print(
        f"[bold]{arch.name}[/], as {gpu.name} with its published figures: {gpu.multiprocessors} {units}, "
        f"{gpu.bandwidth / 1e12:.3g} TB/s, {gpu.float16_rate / 1e12:,.0f} TFLOP/s FP16, "
        f"{gpu.int8_rate / 1e12:,.0f} TOP/s int8",
        highlight=False,
    )
    compiled = [outcome.compiled for outcome in outcomes if outcome.compiled is not None]
    shown = _examples(compiled) if overview else compiled
    _print_table(console, arch, MEMORY, [it for it in shown if not isinstance(it.work, MatrixProduct)], overview)
    _print_table(console, arch, PRODUCT, [it for it in shown if isinstance(it.work, MatrixProduct)], overview)
    for kernel in missing:
        console.print(f"{kernel}: none for {arch.name}", highlight=False)
    console.print(LEGEND, style="dim", highlight=False)
    broken = 0
    for outcome in outcomes:
        found = [outcome.failure.strip()] if outcome.failure else faults(outcome.compiled, arch)
        broken += bool(found)
        for complaint in found:
            console.print(f"{outcome.job.variant}: {complaint}", style="red", markup=False, highlight=False)
    console.print(
        f"{len(outcomes)} configurations: {len(compiled)} compile, "
        f"{sum(it.spilled_bytes > 0 for it in compiled)} spill registers, {broken} at fault"
        + (f"; {len(shown)} shown, mixft inspect KERNEL shows all of a kernel's\n" if overview else "\n"),
        highlight=False,
    )


def _examples(compiled: Sequence[CompiledVariant]) -> list[CompiledVariant]:
    """The first variant of each kernel and stated problem, one of aligned tensors where there is one."""
    chosen = {}
    for row in sorted(compiled, key=lambda row: not row.wide_loads):
        chosen.setdefault((kernel_of(row.name), row.estimate and row.estimate.problem), row)
    return [row for row in compiled if row in chosen.values()]


def _print_table(
    console: Console, arch: Architecture, columns: Sequence[str], rows: list[CompiledVariant], overview: bool
) -> None:
    if not rows:
        return
    order = list(dict.fromkeys(kernel_of(row.name) for row in rows))
    rows = sorted(rows, key=lambda row: order.index(kernel_of(row.name)))
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, highlight=False)
    # Where there is no room, a name goes on below itself: no figure is cut.
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    kernel = None
    for row in rows:
        label = row.name
        if not overview:
            if kernel_of(row.name) != kernel:
                kernel = kernel_of(row.name)
                table.add_row(kernel, style="bold")
            label = f" {row.name[len(kernel) + 1 : -1] or 'every call'}"
        cells = _resources(row) + (_traffic(row) if columns is MEMORY else _product(row))
        table.add_row(escape(label), *cells, style="red" if faults(row, arch) else None)
    console.print(table)


def _resources(row: CompiledVariant) -> list[str]:
    spill = f"+{row.spilled_bytes}" if row.spilled_bytes else ""
    limits = "+".join(SHORT.get(limit, limit) for limit in row.occupancy.limits)
    share = f"{row.occupancy.fraction:4.0%}"
    return [
        f"{row.registers}{spill}",
        _size(row.shared_memory),
        str(row.num_warps),
        share if row.occupancy.fraction == 1 else f"{share} {limits}",
    ]


def _traffic(row: CompiledVariant) -> list[str]:
    # Variants of unaligned tensors have wide accesses to tables alone.
    width = max if row.wide_loads else min
    cells = [str(8 * width(accesses)) if accesses else "-" for accesses in (row.loads, row.stores)]
    if row.work is not None:
        cells += [f"{row.bytes_per_element:.2f}", f"{row.work.floor_bytes:.2f}", _microseconds(row.estimate.seconds)]
    return cells


def _product(row: CompiledVariant) -> list[str]:
    return [
        str(row.num_stages),
        ", ".join(row.matrix_instructions) or "none",
        f"{row.tiling.intensity:.0f}",
        f"{row.tiling.busy:.0%}",
        _shape(*row.estimate.problem),
        _microseconds(row.estimate.seconds),
    ]


def _shape(M: int, N: int, K: int) -> str:
    return f"{M}^3" if M == N == K else f"{M}x{N}^2" if N == K else f"{M}x{N}x{K}"


def _size(number: int) -> str:
    return f"{number / 1024:.0f}K" if number >= 1024 else str(number or "-")


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"
