"""What each plot of a report shows. A function returns what its picture shows in words, or nothing where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from factory_train.curves import PHASES, Array, Curves, bucket_means, smoothed, thinned
from factory_train.plots_svg import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, Curve, Pointing, places
from factory_train.run_dir import Attempt
from factory_train.tracking.facts import RunFacts
from factory_train.tracking.lineage import baseline_label
from factory_train.units import format_count, format_duration, format_wait

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Columns of the breakdown.
_MAX_BUCKETS = 120
# Beyond this many, marks hide the curve and are left to the table.
_MAX_MARKS = 40
PHASE_LABELS = {
    "data_s": "waiting for data",
    "compute_s": "forward and backward",
    "reduce_s": "gradient reduction",
    "optimizer_s": "optimizer",
    "other_s": "rest of the step",
    "ckpt_stall_s": "waiting for a checkpoint",
}
_PHASE_COLORS = {
    "data_s": ORANGE,
    "compute_s": BLUE,
    "reduce_s": GREEN,
    "optimizer_s": PURPLE,
    "other_s": GREY,
    "ckpt_stall_s": RED,
}


def draw_loss(figure: Figure, facts: RunFacts, curves: Curves, pointing: Pointing) -> str:
    axes = figure.add_subplot()
    steps, loss = curves.finite("loss")
    smooth = np.array(smoothed(loss))
    values = [*smooth]
    said = f"Training loss against {'tokens' if curves.has('tokens_seen') else 'steps'}"
    if len(steps):
        _line(axes, curves, steps, loss, color=BLUE, alpha=0.45, linewidth=1, label="training, each step")
        _line(axes, curves, steps, smooth, color=BLUE, linewidth=2, label="training, smoothed")
        # All but the wildest steps of the raw curve are in the picture too.
        values += np.percentile(loss, (1, 99)).tolist()
        said += f": from {smooth[0]:.3f} to {smooth[-1]:.3f} nats a token, smoothed"
    points = _validation(curves, "loss")
    if len(points[0]):
        kept, heights = thinned(*points, max_points=200)
        axes.plot(_x(curves, kept), heights, color=ORANGE, marker="o", markersize=5, linewidth=1.5, label="validation")
        values += [*points[1]]
        said += f"; validation last {points[1][-1]:.3f}"
    for (name, baseline), color in zip(sorted(facts.baselines.items()), (RED, GREEN, PURPLE, GREY), strict=False):
        label = baseline_label(name)
        axes.axhline(baseline, color=color, linestyle="--", linewidth=1.3, label=f"{label} baseline ({baseline:.2f})")
        values.append(baseline)
        said += f"; {label} baseline {baseline:.3f}"
    if (evaluation := facts.evaluation) and math.isfinite(evaluation["loss"]):
        place, label = _x(curves, [evaluation["step"]]), f"evaluation ({evaluation['loss']:.3f})"
        axes.plot(place, [evaluation["loss"]], color=RED, marker="*", markersize=13, linestyle="none", label=label)
        values.append(evaluation["loss"])
    if not values:
        return ""
    axes.set_ylabel("loss (nats/token)")
    _frame_values(axes, values)
    _finish(axes, curves)
    _legend(figure)
    _point_at(pointing, [axes], curves, [Curve("training {} nats/token", steps, loss), Curve("smoothed {}", steps, smooth)])
    if len(points[0]):
        pointing.curves.append(Curve("last validation {}", *points))
    return said + "." + _restarts_said(curves)


def draw_throughput(figure: Figure, facts: RunFacts, curves: Curves, pointing: Pointing) -> str:
    steps, speed = curves.finite("tokens_per_s")
    if not len(steps):
        return ""
    axes = figure.add_subplot()
    smooth, median = np.array(smoothed(speed)), float(np.median(speed))
    _line(axes, curves, steps, speed, color=GREEN, alpha=0.5, linewidth=1, label="as logged (mean of up to 20 steps)")
    _line(axes, curves, steps, smooth, color=GREEN, linewidth=2, label="smoothed")
    axes.axhline(median, color=GREY, linestyle=":", linewidth=1.3, label=f"median ({format_count(median)})")
    axes.set_ylim(0, float(np.max(speed)) * 1.08)
    axes.yaxis.set_major_formatter(_engineering())
    axes.set_ylabel("tokens/s, all ranks")
    mfu = curves.median("mfu")
    if mfu:
        factor = 100 * mfu / median
        axes.secondary_yaxis("right", functions=_scale(factor)).set_ylabel("MFU (%)")
    _finish(axes, curves)
    _legend(figure)
    _point_at(pointing, [axes], curves, [Curve("{} tokens/s", steps, speed)])
    said = f"Tokens a second over all ranks: median {format_count(median)}, lowest {format_count(speed.min())}"
    return f"{said}, highest {format_count(speed.max())}." + _restarts_said(curves)


def draw_breakdown(figure: Figure, facts: RunFacts, curves: Curves, pointing: Pointing) -> str:
    if not any(curves.has(name) for name in PHASES):
        return ""
    axes = figure.add_subplot()
    last, first = curves.last_step, max(float(curves.steps[0]) - 1, 0)
    edges = np.linspace(first, last, min(_MAX_BUCKETS, max(1, len(curves))) + 1)
    # A step ends where its number is, so it belongs to the stretch before.
    means = {name: bucket_means(curves.steps - 0.5, values, edges) for name, values in seconds_of_steps(curves).items() if values.any()}
    total = np.sum(list(means.values()), axis=0)
    unit, factor = ("ms", 1e3) if float(np.median(total[total > 0])) < 1 else ("s", 1.0)
    x = _x(curves, edges)
    heights = [np.append(values, values[-1]) * factor for values in means.values()]
    labels, colors = [PHASE_LABELS[name] for name in means], [_PHASE_COLORS[name] for name in means]
    axes.stackplot(x, heights, labels=labels, colors=colors, alpha=0.85, step="post", linewidth=0)
    # One slow step, the first as a rule, must not make all others flat.
    usual = float(np.percentile(total[total > 0], 95)) * factor
    beyond = float(total.max()) * factor > 3 * usual
    axes.set_ylim(0, 1.5 * usual if beyond else 1.08 * float(total.max()) * factor)
    axes.set_ylabel(f"mean time of a step ({unit})")
    _finish(axes, curves)
    _legend(figure)
    middles = (edges[:-1] + edges[1:]) / 2
    told = [Curve(f"{PHASE_LABELS[name]} {{}} {unit}", middles, values * factor) for name, values in means.items()]
    _point_at(pointing, [axes], curves, told)
    whole = sum(float(np.nansum(values)) for values in seconds_of_steps(curves).values()) or 1.0
    shares = (
        f"{PHASE_LABELS[name]} {100 * float(np.nansum(values)) / whole:.1f}\u00a0%" for name, values in seconds_of_steps(curves).items()
    )
    note = f" The longest stretch, {format_wait(float(total.max()))} a step, leaves the picture." if beyond else ""
    return f"Time of a step by what it was spent on: {', '.join(shares)}.{note}"


def seconds_of_steps(curves: Curves) -> dict[str, Array]:
    """Returns the seconds each step spent in each phase, "other_s" being what no phase accounts for."""
    parts = {name: np.nan_to_num(curves.figures[name]) for name in PHASES}
    parts["other_s"] = np.maximum(np.nan_to_num(curves.figures["step_time_s"]) - np.sum(list(parts.values()), axis=0), 0.0)
    # Of rows without phases nothing is known, which is not the same as time spent on something else.
    parts["other_s"][~np.isfinite(curves.figures["compute_s"])] = 0.0
    return parts | {"ckpt_stall_s": np.nan_to_num(curves.figures["ckpt_stall_s"])}


def draw_lr(figure: Figure, facts: RunFacts, curves: Curves, pointing: Pointing) -> str:
    from matplotlib.ticker import LogLocator, NullFormatter

    steps, rate = curves.finite("lr")
    norm_steps, norm = curves.finite("grad_norm")
    if not len(steps) and not len(norm_steps):
        return ""
    figure.set_size_inches(9, 5.8)
    top, bottom = figure.subplots(2, 1, sharex=True)
    if len(steps):
        _line(top, curves, steps, rate, color=PURPLE, linewidth=2, label=f"learning rate ({facts.config.optim.schedule})")
        top.set_ylim(0, float(rate.max()) * 1.08 or 1)
    top.yaxis.set_major_formatter(_plain)
    top.set_ylabel("learning rate")
    said = f"Learning rate, at most {rate.max():.3g}, last {rate[-1]:.3g}" if len(steps) else "No learning rate"
    if len(norm_steps):
        _line(bottom, curves, norm_steps, norm, color=BLUE, linewidth=1, alpha=0.85, label="gradient norm before clipping")
        said += f"; gradient norm before clipping, median {np.median(norm):.3g}, highest {norm.max():.3g}"
    if (limit := facts.config.optim.max_grad_norm) and len(norm_steps):
        bottom.axhline(limit, color=ORANGE, linestyle="--", linewidth=1.3, label=f"clipped to {limit:g}")
    if len(norm_steps) and norm.min() > 0:
        bottom.set_yscale("log")
        bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bottom.yaxis.set_major_formatter(_plain)
        bottom.yaxis.set_minor_formatter(NullFormatter())
    skipped = curves.steps[np.nan_to_num(curves.figures["skipped"]) > 0]
    if len(skipped):
        shown, _ = thinned(skipped, np.zeros(len(skipped)), 200)
        heights = np.full(len(shown), 0.06)
        where = bottom.get_xaxis_transform()
        label = f"skipped, not finite ({len(skipped)})"
        bottom.plot(_x(curves, shown), heights, color=RED, marker="x", markersize=7, linestyle="none", transform=where, label=label)
        said += f"; {len(skipped)} steps were skipped because they were not finite"
    bottom.set_ylabel("gradient norm")
    _finish(bottom, curves, of_top=top)
    _finish_marks(top, curves)
    _legend(figure)
    _point_at(pointing, [top, bottom], curves, [Curve("learning rate {}", steps, rate), Curve("gradient norm {}", norm_steps, norm)])
    return said + "."


def draw_validation(figure: Figure, facts: RunFacts, curves: Curves, pointing: Pointing) -> str:
    steps, loss = _validation(curves, "loss")
    if not len(steps):
        return ""
    axes = figure.add_subplot()
    kept, heights = thinned(steps, loss, max_points=200)
    axes.plot(_x(curves, kept), heights, color=ORANGE, marker="o", markersize=6, linewidth=1.8, label="validation loss")
    lowest = int(loss.argmin())
    best = (_x(curves, steps[lowest : lowest + 1]), loss[lowest : lowest + 1])
    label = f"lowest: {loss[lowest]:.3f} at step {steps[lowest]:,.0f}"
    axes.plot(*best, color=RED, marker="o", markersize=11, fillstyle="none", markeredgewidth=1.8, linestyle="none", label=label)
    axes.set_ylabel("validation loss (nats/token)")
    _frame_values(axes, [*loss])
    bit_steps, bits = _validation(curves, "bits_per_byte")
    said = f"Validation loss at {len(steps)} steps: first {loss[0]:.4f}, last {loss[-1]:.4f}, lowest {loss[lowest]:.4f} nats a token"
    if len(bits) == len(loss) and loss[-1]:
        # On the same text bits per byte is a fixed multiple of nats per token.
        axes.secondary_yaxis("right", functions=_scale(float(bits[-1] / loss[-1]))).set_ylabel("bits per byte")
        said += f"; last {bits[-1]:.4f} bits per byte"
    _finish(axes, curves)
    _legend(figure)
    _point_at(pointing, [axes], curves, [Curve("validation {} nats/token", steps, loss), Curve("{} bits per byte", bit_steps, bits)], steps)
    return said + "."


def draw_stalls(figure: Figure, facts: RunFacts, curves: Curves, pointing: Pointing) -> str:
    steps, stall = curves.finite("ckpt_stall_s")
    if not len(steps):
        return ""
    axes = figure.add_subplot()
    unit, factor = ("ms", 1e3) if stall.max() < 1 else ("s", 1.0)
    kept, high = thinned(steps, stall, 400)
    axes.vlines(_x(curves, kept), 0, high * factor, color=RED, linewidth=2)
    axes.plot(_x(curves, kept), high * factor, color=RED, marker="o", markersize=4, linestyle="none", label="training waited")
    axes.set_ylim(0, float(stall.max()) * factor * 1.08 or 1)
    axes.set_ylabel(f"wait at a step ({unit})")
    _finish(axes, curves)
    _legend(figure)
    _point_at(pointing, [axes], curves, [Curve(f"waited {{}} {unit}", steps, stall * factor)], steps)
    return f"Training waited for checkpoints at {len(steps)} steps, {format_wait(stall.sum())} in all, {format_wait(stall.max())} at most."


def draw_timeline(figure: Figure, facts: RunFacts, curves: Curves, pointing: Pointing) -> str:
    began, spans = facts.info["created"], attempt_spans(facts, curves)
    shown = spans[-_MAX_MARKS:]
    if not shown:
        return ""
    longest = max(end for _, _, end, _ in shown) - began
    unit, factor = next((item for item in (("days", 86400), ("hours", 3600), ("minutes", 60)) if longest > 2 * item[1]), ("seconds", 1))
    figure.set_size_inches(9, min(2.0 + 0.45 * len(shown), 9))
    axes = figure.add_subplot()
    seen: set[str] = set()
    for number, start, end, outcome in shown:
        label = outcome if outcome not in seen else None
        seen.add(outcome)
        width = max(end - start, longest / 400) / factor
        axes.barh(number, width, left=(start - began) / factor, height=0.5, color=_outcome_color(outcome), alpha=0.8, label=label)
        saved = [event["time"] for event in Attempt(facts.run, number).events() if event["event"] == "checkpoint"]
        if saved:
            times, _ = thinned(np.array(saved), np.zeros(len(saved)), 200)
            label = None if "saved" in seen else "checkpoint saved"
            heights = np.full(len(times), number)
            axes.plot((times - began) / factor, heights, color=INK, marker="|", markersize=13, linestyle="none", label=label)
            seen.add("saved")
    axes.set_yticks([number for number, *_ in shown], [f"attempt {number}" for number, *_ in shown])
    axes.set_ylim(shown[-1][0] + 0.6, shown[0][0] - 0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0 if shown[0][0] == 1 else None, None)
    axes.set_xlabel(f"{unit} since the run was created")
    _legend(figure)
    left_out = f" (the last {len(shown)} of {len(spans)})" if len(spans) > len(shown) else ""
    each = (f"attempt {number} {outcome} after {format_duration(end - start)}" for number, start, end, outcome in shown[-8:])
    return f"When each attempt ran{left_out}: {', '.join(each)}."


def attempt_spans(facts: RunFacts, curves: Curves) -> list[tuple[int, float, float, str]]:
    """Returns number, begin, end (seconds since the epoch) and outcome of every attempt that left a sign of life."""
    spans = []
    for attempt in facts.run.attempts():
        verdict = attempt.verdict()
        times = [event["time"] for event in attempt.events()] + list(curves.spans.get(attempt.number, ()))
        times += [verdict.time] if verdict else []
        outcome = verdict.outcome if verdict else facts.outcome if attempt.number == facts.attempt.number else "lost"
        if times:
            spans.append((attempt.number, min(times), max(times), outcome))
    return spans


def _outcome_color(outcome: str) -> str:
    if outcome in ("running", "pending"):
        return BLUE
    colors = {"done": GREEN, "preempted": ORANGE, "interrupted": ORANGE, "lost": GREY, "killed": GREY}
    return colors.get(outcome, RED)


def _validation(curves: Curves, key: str) -> tuple[Array, Array]:
    rows = [row for row in curves.validations if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
    return np.array([row["step"] for row in rows], dtype=float), np.array([row[key] for row in rows], dtype=float)


def _x(curves: Curves, steps: Any) -> Array:
    """Returns where steps lie on the x axis: tokens where the rows tell them, else the steps themselves."""
    return curves.tokens_at(steps) if curves.has("tokens_seen") else np.asarray(steps, dtype=float)


def _line(axes: Axes, curves: Curves, steps: Array, values: Array, **style: Any) -> None:
    kept, heights = thinned(steps, values)
    axes.plot(_x(curves, kept), heights, **style)


def _frame_values(axes: Axes, values: list[float]) -> None:
    """Leaves room around what matters: single wild steps of the raw curve may leave the picture."""
    if values:
        margin = 0.07 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _finish(axes: Axes, curves: Curves, of_top: Axes | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    end = float(_x(curves, [curves.last_step])[0])
    axes.set_xlim(0, end * 1.01 or 1)
    if curves.has("tokens_seen"):
        axes.set_xlabel("tokens seen")
        axes.xaxis.set_major_formatter(_engineering())
        steps = (of_top or axes).secondary_xaxis("top", functions=_scale(curves.last_step / end if end else 1.0))
        steps.set_xlabel("optimizer step")
        steps.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
        steps.xaxis.set_major_formatter(_engineering())
    else:
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(_engineering())
    _finish_marks(axes, curves)


def _legend(figure: Figure) -> None:
    """Explains all lines below the picture, where they cover none of it; what several axes share is explained once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=len(found) if len(found) <= 4 else 3)


def _finish_marks(axes: Axes, curves: Curves) -> None:
    """Draws a line where each restart continued."""
    for index, (_, step) in enumerate(curves.restarts[-_MAX_MARKS:]):
        label = "restart" if index == 0 else None
        axes.axvline(float(_x(curves, [step])[0]), color=GREY, linestyle="-.", linewidth=1.2, alpha=0.8, label=label)


def _restarts_said(curves: Curves) -> str:
    steps = [f"{step:,}" for _, step in curves.restarts]
    shown = ", ".join(steps[-8:])
    return f" Restarts continued from step {shown}." if steps else ""


def _point_at(pointing: Pointing, axes: list[Axes], curves: Curves, told: list[Curve], at: Array | None = None) -> None:
    where = curves.steps if at is None else at
    pointing.axes, pointing.curves = axes, told
    pointing.steps = where[places(len(where))]
    pointing.x_of_step = _x(curves, pointing.steps)
    counts = curves.tokens_at(pointing.steps) if curves.has("tokens_seen") else None
    pointing.prefix = [
        f"step {step:,.0f}" + (f", {format_count(counts[index])} tokens" if counts is not None else "")
        for index, step in enumerate(pointing.steps)
    ]


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter, FuncFormatter

    numbers = EngFormatter(sep="")
    # People say 1.5B tokens, not 1.5G.
    return FuncFormatter(lambda value, _position: numbers(value).replace("G", "B"))


def _scale(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Returns the conversion from one axis to the other and back, for numbers and arrays."""
    return (lambda values: values * factor), (lambda values: values / factor)
