"""Recordings as ``mixft bench --json`` writes them, made up, for the tests of what is done with them."""

ENVIRONMENT = {
    "python": "3.11.7",
    "mixft": "0.1.0",
    "torch": "2.13.0+cpu",
    "triton": "3.7.1",
    "platform": "Linux",
    "device": "cpu",
    "device_name": "Example CPU",
    "cpu_capability": "AVX512",
    "threads": 2,
    "date": "2026-11-22T01:49:44+00:00",
    "commit": "0123456789abcdef0123456789abcdef01234567",
}
MACHINE = {
    "copy_bytes_per_second": 4e10,
    "read_bytes_per_second": 5e10,
    "update_bytes_per_second": 6e10,
    "matmul_operations_per_second": {"fp32": 2e11, "fp16": 4e10, "bf16": 5e11, "int8": 9e11},
}


def row(case: str, provider: str = "mixft", seconds: float | None = 1e-3, **fields) -> dict:
    """One provider of one case; timed, and a fifth of the floor's speed, unless said otherwise."""
    made = {
        "case": case,
        "family": case.split("/")[0],
        "provider": provider,
        "status": "timed",
        "reason": None,
        "seconds": seconds,
        "seconds_low": seconds and 0.98 * seconds,
        "seconds_high": seconds and 1.03 * seconds,
        "host_seconds": seconds,
        "speedup": 1.0 if provider == "mixft" else None,
        "speedup_low": None,
        "speedup_high": None,
        "floor_seconds": seconds and 0.2 * seconds,
        "floor_fraction": 0.2,
        "bytes": 4_000_000,
        "operations": 0,
        "rate": None,
        "tokens": None,
        "memory": None,
        "sweep": None,
        "note": None,
    }
    return made | fields


def pair(case: str, peers: dict[str, float], seconds: float = 1e-3, **fields) -> list[dict]:
    """mixft's row of ``case`` and, by name, those of peers that take so many times as long."""
    rows = [row(case, seconds=seconds, **fields)]
    for provider, ratio in peers.items():
        spread = {"speedup": ratio, "speedup_low": 0.96 * ratio, "speedup_high": 1.05 * ratio}
        rows.append(row(case, provider, seconds * ratio, floor_fraction=0.2 / ratio, **spread, **fields))
    return rows


def without_time(case: str, provider: str, status: str, reason: str) -> dict:
    """The row of a provider that is ``"wrong"``, ``"refused"`` or ``"missing"``."""
    return row(case, provider, None, status=status, reason=reason, floor_fraction=None)


def recording(rows: list[dict], **environment) -> dict:
    return {
        "format": 1,
        "environment": ENVIRONMENT | environment,
        "machine": MACHINE,
        "load_average": 0.1,
        "rounds": 31,
        "quick": False,
        "rows": rows,
    }


def example() -> dict:
    """A recording with rows of every kind."""
    rows = []
    for size, ratio in (("1x384x1536", 0.95), ("16x384x1536", 2.4), ("128x768x3072", 3.9), ("512x4096x4096", 4.4)):
        m, k, n = map(int, size.split("x"))
        work = {"operations": 2 * m * k * n, "bytes": k * n + 4 * m * (k + n), "rate": "int8"}
        rows += pair(
            f"quant_linear/{size}", {"torch": ratio, "torch.compile": 0.97 * ratio}, m * k * n * 3e-12 + 3e-5, **work
        )
        rows.append(without_time(f"quant_linear/{size}", "torchao", "missing", "torchao is not installed"))
    rows.append(without_time("quant_linear/1x384x1536", "bitsandbytes", "refused", "CPU is not served"))
    for mode in ("fp32", "fp16, FP32 masters", "split, int8 states"):
        memory = {"parameters": 40e6, "masters": 80e6, "moments": 160e6, "peak": 300e6}
        rows += pair(f"adamw/{mode}", {"torch fused": 1.1, "torch foreach": 3.2}, 9e-3, bytes=3e8, memory=memory)
    rows.append(without_time("adamw/fp32", "flashoptim", "wrong", "error 1.0e-02, bound 1.0e-06"))
    for count in (10**4, 10**5, 10**6, 10**7, 10**8):
        sweep = {"name": "optimizer_step", "variable": "parameters", "value": count}
        rows += pair(f"adamw_size/{count}", {"torch fused": 1.2}, 2e-5 + 8e-10 * count, bytes=28 * count, sweep=sweep)
    for tokens in (1, 8, 64, 512):
        sweep = {"name": "int8_linear", "variable": "rows", "value": tokens}
        work = {"operations": 2 * tokens * 768 * 3072, "bytes": 768 * 3072 + 4 * tokens * 3840, "rate": "int8"}
        rows += pair(f"linear_rows/{tokens}", {"torch": 1 + tokens / 200}, 4e-5 + 4e-6 * tokens, sweep=sweep, **work)
    return recording(rows)
