"""The charts of a report: one per metric, and charts by theme on the page about learning.

Runs have their rounds at different requests, with different numbers of rows. A curve over several runs therefore
interpolates each run between its rounds, and means are weighted by the rows of each round.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import fsum, isfinite, isnan, nan
from typing import Any, NamedTuple

from onlinespec.experiments.report.plots import Chart, Curve, Style, styles_of
from onlinespec.experiments.report.statistics import METRICS, Metric, rounds_of, spread_of
from onlinespec.experiments.report.summaries import FROZEN, Group, LearnerSummary, Points
from onlinespec.experiments.report_schema import Run
from onlinespec.learning.rounds import Round

SMOOTHING = 256  # rows of a moving mean, rounded up to whole rounds; 8 rounds if there is one per 16 steps of 2 tokens
MOST_POINTS = 240  # of a curve over rounds; a screen can show no more
LOW = 210  # height in pixels of charts that come in groups

Styles = Mapping[str, Style]
Values = Callable[[Sequence[Round]], list[float]]  # one value per round, NaN where it has none


class Theme(NamedTuple):
    """Charts with a common heading and legend."""

    title: str
    meaning: str
    charts: tuple[Chart, ...]

    @property
    def looks(self) -> dict[str, Style]:
        """The styles of the common legend, without charts that have their own."""
        shared = (chart.looks for chart in self.charts if not chart.has_own_legend)
        return {label: style for looks in shared for label, style in looks.items()}


class Track(NamedTuple):
    """A statistic over the rounds of one run."""

    requests: list[float]  # positions of the rounds on the request axis, ascending
    values: list[float]
    end: float  # position on the request axis where the run ended

    def at(self, request: float) -> float | None:
        """Returns the value at a position: interpolated, constant after the last round, None before the first or after
        `end`.

        >>> track = Track([1.0, 2.0], [10.0, 20.0], end=3.0)
        >>> [track.at(x) for x in (0.5, 1.0, 1.5, 3.0, 3.5)]
        [None, 10.0, 15.0, 20.0, None]
        """
        i = bisect_right(self.requests, request)
        if i == 0 or request > self.end:
            return None
        if i == len(self.requests):
            return self.values[-1]
        (x, next_x), (value, next_value) = self.requests[i - 1 : i + 1], self.values[i - 1 : i + 1]
        return value + (next_value - value) * (request - x) / (next_x - x)


def metric_chart(group: Group, metric: Metric, styles: Styles) -> Chart:
    """Returns the chart of a metric over windows, with a curve per learner."""
    curves = (
        Curve(learner.learner, styles[learner.learner], learner.points(group.places, metric))
        for learner in group.measured
    )
    return Chart(f"{metric.title} over the stream", metric.unit, tuple(curves))


def themes_of(group: Group, styles: Styles) -> list[Theme]:
    """Returns the charts about learning, without those that have no data."""
    themes = [_regret(group, styles), _guarantee(group, styles), _drift(group, styles)]
    themes += [_ensembles(group, styles), _gradients(group, styles)]
    return [drawn for theme in themes if (drawn := _drawn(theme)).charts]


def _regret(group: Group, styles: Styles) -> Theme:
    regret = Chart(
        "Regret against frozen, per row so far",
        "nats per row",
        _curves(group, styles, _regret_so_far, origin=0.0),
        level=0.0,
        note="Mean over all rows up to there, so that learners with many rounds and with few compare.",
    )
    losses = Chart(
        "KL divergence from the target to the drafter",
        "nats per row",
        (*_curves(group, styles, _smooth(lambda each: each.kl)), *_of_frozen(group, styles, lambda e: e.frozen_kl)),
        note=f"Means of the last {SMOOTHING} rows, the last round whole, before each update.",
    )
    return Theme(
        "Regret",
        "Below zero, a learner's weights have so far served better than those it started from. A line that falls gains "
        "more than before; one that rises gains less than before, or loses.",
        (regret, losses),
    )


def _guarantee(group: Group, styles: Styles) -> Theme:
    measured = (
        Curve(learner.learner, styles[learner.learner], learner.points(group.places, METRICS[0]))
        for learner in group.with_telemetry
    )
    bounds = (
        curve._replace(style=curve.style.faint, points=_without_band(curve.points))
        for curve in _curves(group, styles, _smooth(lambda each: each.acceptance_length_bound))
    )
    chart = Chart(
        "Acceptance length, and its lower bound",
        "tokens per step",
        (*measured, *bounds),
        note="Lines with markers: measured, a point per window. Dashed lines without, in the same colours: the bound, "
        f"mean of the last {SMOOTHING} rows.",
    )
    return Theme(
        "What the losses guarantee",
        "If a step's positions are alike, as OnlineSpec assumes, the losses alone give an acceptance length that a "
        "learner cannot stay below on average. It is loose, and at 1 says nothing; both should rise together.",
        (chart,),
    )


def _drift(group: Group, styles: Styles) -> Theme:
    charts = (
        Chart(
            "The stream: acceptance probability of the frozen drafter",
            "probability",
            _of_frozen(group, styles, lambda each: each.frozen_acceptance_prob),
            height=LOW,
            note=f"Mean of the last {SMOOTHING} rows. Where it changes, the traffic did.",
        ),
        Chart(
            "The weights: distance from the start",
            "distance",
            _curves(group, styles, lambda rounds: _each(lambda each: each.distance, rounds)),
            height=LOW,
        ),
        Chart(
            "The function: how much the drafts changed",
            "total variation",
            _curves(group, styles, lambda rounds: _each(lambda each: each.function_moved, rounds)),
            height=LOW,
            note="On the rows of the first round, from one point to the next; 0 is no change, 1 is all.",
        ),
    )
    return Theme("Drift", "What moved: the traffic, the weights in answer to it, and what the drafter says.", charts)


def _ensembles(group: Group, styles: Styles) -> Theme:
    gap = Chart(
        "Averaging gap",
        "loss",
        _curves(group, styles, lambda rounds: _each(lambda each: each.learner.get("averaging_gap"), rounds)),
        level=0.0,
        height=LOW,
        has_own_legend=True,
        note="Loss of the mean of the experts' weights, minus the mean of their losses: above zero, averaging hurts, "
        "and the best expert plays instead.",
    )
    charts = [_meta_weights(learner) for learner in group.with_telemetry]
    return Theme("Ensembles", "Which experts an ensemble trusts, and whether their mean is any good.", (*charts, gap))


def _meta_weights(learner: LearnerSummary) -> Chart:
    runs = learner.with_telemetry
    names = dict.fromkeys(name for run in runs for each in rounds_of(run) for name in _meta_weights_of(each))
    styles = styles_of(names)
    curves = (_curve(name, styles[name], runs, _smooth(partial(_meta_weight, name))) for name in names)
    return Chart(
        f"Meta weights of {learner.learner}",
        "meta weight",
        tuple(curves),
        limits=(-0.03, 1.03),
        height=LOW,
        has_own_legend=True,
        note=_said_of_best_played(learner),
    )


def _meta_weights_of(each: Round) -> dict[str, float | None]:
    return each.learner.get("meta_weights") or {}


def _meta_weight(expert: str, each: Round) -> float | None:
    return _meta_weights_of(each).get(expert)


def _said_of_best_played(learner: LearnerSummary) -> str:
    note = f"Means of the last {SMOOTHING} rows; experts go by their step sizes.{_said_of_bound(learner)}"
    flags = [each.learner.get("is_best_played") for run in learner.with_telemetry for each in rounds_of(run)]
    known = [is_best for is_best in flags if is_best is not None]
    if not known:
        return note
    return f"{note} The best expert played alone in {100 * sum(known) / len(known):.0f} % of the rounds."


def _said_of_bound(learner: LearnerSummary) -> str:
    """A sentence on the regret bound of Hedge over the run's rounds, if the learner reports it."""
    reports = [[each.learner for each in rounds_of(run) if each.is_update][-1:] for run in learner.with_telemetry]
    reported = [report for last in reports for report in last if "regret_bound_per_round" in report]
    bounds = [report["regret_bound_per_round"] for report in reported]
    if not bounds:
        return ""
    known = [bound for bound in bounds if bound is not None]
    if len(known) < len(bounds):
        return " At its settings no regret bound says anything."
    return f" By its regret bound, the experts' mean loss is at most {max(known):.2g} a round above the best expert's."


def _gradients(group: Group, styles: Styles) -> Theme:
    turned = (
        curve._replace(style=curve.style.faint, points=_without_band(curve.points))
        for curve in _curves(group, styles, lambda rounds: _hint_errors(rounds, "direction_"))
    )
    cosines = Chart(
        "Cosine of each round's gradient with the one before",
        "cosine",
        _curves(group, styles, _smooth(lambda each: each.gradient_cosine)),
        level=0.0,
        height=LOW,
        note=f"Mean of the last {SMOOTHING} rows; 1 is the same direction, 0 none in common. Above a half, the last "
        "gradient would be a useful hint. Large rounds are alike because they hold less noise.",
    )
    errors = Chart(
        "Error of the hints over the size of the gradients",
        "ratio",
        (*_curves(group, styles, lambda rounds: _hint_errors(rounds, "")), *turned),
        level=1.0,
        note=f"Over the last {SMOOTHING} rows. Lines with markers: raw gradients; dashed lines without: in the "
        "learner's geometry. Below 1, guessing the next gradient helped; above 1, no guess was better.",
    )
    return Theme("Gradients", "How much one round's gradient says of the next one's.", (cosines, errors))


def _hint_errors(rounds: Sequence[Round], prefix: str) -> list[float]:
    """Ratio of the moving means of hint errors and gradient norms, as the whole run's is a ratio of sums."""
    errors = _smooth(lambda each: each.learner.get(f"{prefix}hint_error"))(rounds)
    norms = _smooth(lambda each: each.learner.get(f"{prefix}gradient_norm"))(rounds)
    return [error / norm if norm else nan for error, norm in zip(errors, norms, strict=True)]


# --- from rounds to curves ---


def _curves(group: Group, styles: Styles, values: Values, origin: float = nan) -> tuple[Curve, ...]:
    """A curve for every learner with telemetry."""
    learners = group.with_telemetry
    return tuple(_curve(each.learner, styles[each.learner], each.with_telemetry, values, origin) for each in learners)


def _of_frozen(group: Group, styles: Styles, of: Callable[[Round], float | None]) -> tuple[Curve, ...]:
    """The curve of the unchanged initial drafter, which is measured in the run of every learner."""
    runs = [run for learner in group.with_telemetry for run in learner.with_telemetry]
    curve = _curve(FROZEN, styles[FROZEN], runs, _smooth(of))
    return (curve._replace(points=_without_band(curve.points)),)


def _curve(label: str, style: Style, runs: Iterable[Run], values: Values, origin: float = nan) -> Curve:
    return Curve(label, style, over_runs([_track(run, values, origin) for run in runs]))


def _drawn(theme: Theme) -> Theme:
    """The theme without curves that have no values, and without charts that have no curves left."""
    charts = (chart._replace(curves=tuple(filter(_is_known, chart.curves))) for chart in theme.charts)
    return theme._replace(charts=tuple(chart for chart in charts if chart.curves))


def _is_known(curve: Curve) -> bool:
    return not all(map(isnan, curve.points.medians))


def _track(run: Run, values: Values, origin: float) -> Track:
    """The finite values of a run. `origin` is the value before the first round; NaN for none."""
    rounds, end = rounds_of(run), run.totals.requests + 0.5
    points = [(0.5, origin), *zip(positions(rounds), values(rounds), strict=True)]
    known = [(min(x, end), value) for x, value in points if isfinite(value)]
    return Track([x for x, _ in known], [value for _, value in known], end)


def positions(rounds: Sequence[Round]) -> list[float]:
    """Returns the positions of rounds on the request axis. Request i covers i - 0.5 to i + 0.5, its rounds evenly."""
    num_within, seen = Counter(each.request for each in rounds), Counter[int]()
    places = []
    for each in rounds:
        places.append(each.request + 0.5 + seen[each.request] / num_within[each.request])
        seen[each.request] += 1
    return places


def over_runs(tracks: Sequence[Track]) -> Points:
    """Returns median, lowest and highest of the tracks at all their positions, thinned to about MOST_POINTS."""
    places = sorted({x for track in tracks for x in track.requests})
    step = max(1, -(-len(places) // MOST_POINTS))
    kept = [*places[::step], *(places[-1:] if (len(places) - 1) % step else [])]
    points = Points(kept, [], [], [])
    for x in kept:
        spread = spread_of(track.at(x) for track in tracks)
        for column, value in zip(points[1:], spread or (nan, nan, nan), strict=True):
            column.append(value)
    return points


def _without_band(points: Points) -> Points:
    return points._replace(lows=points.medians, highs=points.medians)


def smoothed(values: Sequence[float], weights: Sequence[float], size: float = SMOOTHING) -> list[float]:
    """Returns moving means: of each value and those before it, back to a total weight of `size`. NaN is missing.

    >>> smoothed([1.0, nan, 3.0, 5.0], [1, 1, 1, 3], size=2)
    [1.0, 1.0, 3.0, 5.0]
    """
    means = []
    for i in range(len(values)):
        first, covered = i, weights[i]
        while first and covered < size:
            first -= 1
            covered += weights[first]
        known = [(value, weights[j]) for j, value in enumerate(values[first : i + 1], first) if not isnan(value)]
        means.append(_weighted_mean(known))
    return means


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Weighted mean of (value, weight) pairs; NaN without weight."""
    whole = fsum(weight for _, weight in pairs)
    return fsum(value * weight for value, weight in pairs) / whole if whole else nan


def _smooth(of: Callable[[Round], float | None]) -> Values:
    return lambda rounds: smoothed(_each(of, rounds), [each.num_rows for each in rounds])


def _regret_so_far(rounds: Sequence[Round]) -> list[float]:
    """Regret per row over all rounds so far, after each round; rounds without a measurement are skipped."""
    gains = _each(_gain_lost, rounds)
    known = [
        (0.0, 0.0) if isnan(gain) else (gain, float(each.num_rows)) for gain, each in zip(gains, rounds, strict=True)
    ]
    sums, rows = accumulate(gain * weight for gain, weight in known), accumulate(weight for _, weight in known)
    return [so_far / weight if weight else nan for so_far, weight in zip(sums, rows, strict=True)]


def _each(of: Callable[[Round], Any], rounds: Sequence[Round]) -> list[float]:
    """A statistic of every round; NaN where it is missing or not finite."""
    values = (of(each) for each in rounds)
    return [float(value) if value is not None and isfinite(value) else nan for value in values]


def _gain_lost(each: Round) -> float:
    return each.kl - each.frozen_kl
