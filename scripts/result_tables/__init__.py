"""The kinds of tables that ``scripts/render_results.py`` makes of rows: a function each, and its name in a document."""

from __future__ import annotations

from collections.abc import Callable

from result_tables.costs import integers, latency, peers, phases, published, solving, speed, steps, synthetic
from result_tables.runs import drops, gains, probes, recipes, students, variants, widths
from result_tables.searches import agreement, allocations, front, latencies, orders, scores

KINDS: dict[str | None, Callable[[list[dict[str, str]]], str]] = {
    None: students,
    "variants": variants,
    "recipes": recipes,
    "probes": probes,
    "drops": drops,
    "gains": gains,
    "widths": widths,
    "front": front,
    "allocations": allocations,
    "agreement": agreement,
    "latencies": latencies,
    "scores": scores,
    "orders": orders,
    "steps": steps,
    "peers": peers,
    "phases": phases,
    "synthetic": synthetic,
    "integers": integers,
    "speed": speed,
    "solving": solving,
    "published": published,
    "latency": latency,
}
"""Name of a kind -> rows to Markdown; ``None`` is a table without a kind."""
