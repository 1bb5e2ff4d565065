"""Learning curves: loss and accuracy during training, and on held-out clips or videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..charts import Line, thin
from ..runs import Run
from .canvas import INK, Figure, colour, finish, line_style, new_canvas, short

# Curves in one panel; more cannot be distinguished.
CURVES = 8
# Share of each held-out curve that is always inside the axes.
SHOWN = 0.9


@dataclass(frozen=True)
class Curves:
    """The curves of a measure of one run.

    Attributes:
        training: Training curve, which may be empty.
        held_out: Held-out curve, which may be empty.
        exported: The step whose weights are exported, None if it is not recorded.
    """

    training: Line
    held_out: Line
    exported: int | None

    @classmethod
    def of(cls, run: Run, measure: str) -> Curves:
        """Return the curves of a measure, `loss` or `accuracy`."""
        held_out = run.curve(f"held_out/{measure}", "epoch")
        return cls(thin(run.curve(measure)), thin(held_out), run.exported_step)

    @property
    def empty(self) -> bool:
        """Whether nothing was logged."""
        return not len(self.training.x) and not len(self.held_out.x)

    @property
    def end(self) -> tuple[float, float] | None:
        """Point of the exported epoch on the held-out curve or, without one, the training curve."""
        line = self.held_out if len(self.held_out.x) else self.training
        if self.exported is None or not len(line.x):
            return None
        index = int(np.argmin(np.abs(line.x - self.exported)))
        return float(line.x[index]), float(line.y[index])


def learning_curves(runs: Sequence[Run], kind: str, title: str) -> Figure | None:
    """Draw the curves of the first CURVES runs of a kind that logged a loss."""
    losses = [(run, Curves.of(run, "loss")) for run in runs if run.kind == kind]
    losses = [(run, curves) for run, curves in losses if not curves.empty]
    if not losses:
        return None
    shown = losses[:CURVES]
    accuracies = [Curves.of(run, "accuracy") for run, _ in shown]
    panels = 1 if all(curves.empty for curves in accuracies) else 2
    canvas, axes = new_canvas(8 if panels == 1 else 12, 3.6 + 0.19 * len(shown) / panels, 1, panels)
    _panel(axes[0], [curves for _, curves in shown], "loss")
    if panels == 2:
        _panel(axes[1], accuracies, "accuracy, %", 100)
    validated = any(len(curves.held_out.x) for _, curves in shown)
    marked = any(curves.end for _, curves in shown)
    handles = [
        Line2D([], [], color=colour(i), ls=line_style(i // 2), lw=1.8, label=short(run.name, 60))
        for i, (run, _) in enumerate(shown)
    ]
    canvas.legend(
        handles=handles + _legend(validated, marked),
        loc="outside lower left",
        ncols=1 if panels == 1 and max(len(run.name) for run, _ in shown) > 40 else 2 * panels,
        fontsize=10,
    )
    caption = _caption(len(losses), validated, marked)
    _, high, highest = _limits([curves for _, curves in shown])
    if highest > high:
        caption += f" Held-out losses up to {highest:.3g} are above the frame."
    return finish(canvas, f"curves-{kind}", title, caption, [run.name for run, _ in shown])


def _panel(ax: Axes, measured: Sequence[Curves], label: str, scale: float = 1) -> None:
    validated = any(len(curves.held_out.x) for curves in measured)
    for i, curves in enumerate(measured):
        style = line_style(i // 2)
        line = curves.training
        ax.plot(
            line.x,
            scale * line.y,
            color=colour(i),
            ls=style,
            lw=1.0 if validated else 1.8,
            alpha=0.55 if validated else 1.0,
            marker="o" if len(line.x) == 1 else None,
        )
        held_out = curves.held_out
        ax.plot(
            held_out.x, scale * held_out.y, color=colour(i), ls=style, lw=1.8, marker="o", ms=3.5
        )
        if curves.end is not None:
            x, y = curves.end
            ax.plot(
                [x], [scale * y], marker="*", ms=13, color=colour(i), mec=INK, mew=0.8, zorder=5
            )
    ax.set_xlabel("step")
    ax.set_ylabel(label)
    low, high, _ = _limits(measured)
    pad = 0.05 * (high - low) or 0.05
    ax.set_ylim(scale * (low - pad), scale * (high + pad))


def _limits(measured: Sequence[Curves]) -> tuple[float, float, float]:
    """Return both ends of an axis, and the highest value, which may be above the axis.

    Held-out losses of the first epochs can be so high that they would flatten every curve.
    """
    training = np.concatenate([curves.training.y for curves in measured] + [np.zeros(0)])
    held_out = [curves.held_out.y for curves in measured if len(curves.held_out.y)]
    values = np.concatenate([training, *held_out])
    if not len(values):
        return 0.0, 1.0, 1.0
    usual = [float(np.quantile(each, SHOWN)) for each in held_out]
    shown = max([*usual, *training.max(keepdims=True, initial=-np.inf).tolist()])
    return float(values.min()), float(min(values.max(), shown)), float(values.max())


def _legend(validated: bool, marked: bool) -> list[Line2D]:
    """Return the legend of the kinds of lines."""
    handles = [
        Line2D([], [], color=INK, lw=1.0, alpha=0.55, label="thin: training"),
        Line2D([], [], color=INK, lw=1.8, marker="o", ms=3.5, label="dots: held out, each epoch"),
    ] * validated
    return (
        handles
        + [Line2D([], [], color="white", ls="", marker="*", ms=11, mec=INK, label="exported epoch")]
        * marked
    )


def _caption(count: int, validated: bool, marked: bool) -> str:
    words = ["By step as logged during training; each point is the mean since the previous one."]
    if validated:
        words.append(
            "With dots: the same measure on held-out clips or validation videos after each epoch; where it rises "
            "while the training loss falls, the network learns its training videos by heart."
        )
    if marked:
        words.append("The star is the epoch whose weights are exported.")
    if count > CURVES:
        words.append(f"The first {CURVES} of {count} runs.")
    words.append("A curve that still falls at its end belongs to a schedule that was too short.")
    return " ".join(words)
