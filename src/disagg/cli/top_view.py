"""``disagg top`` on the screen: from figures to renderables. Stages and block states differ in glyph, not hue alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from disagg.base.units import format_bytes
from disagg.bench.report.words import number, objective, percent, seconds
from disagg.cli.top_figures import Figures, LatencyFigures, keeps
from disagg.measure.timeline import Stage
from disagg.serve.api.views import InstanceView, PredictionTotals, RequestView

NUM_FIXED_LINES: Final = 18
"""Lines of a frame but for its instances, what is said of them, and its requests, at most."""
_NUM_REQUEST_LINES: Final = 4
"""Of these, those that go when no request is shown: heading, legend, and a blank line."""
_MOST_NOTES: Final = 3
WIDE: Final = 116
"""From so many columns on there is room for everything."""

_SPARK_WIDTH: Final = 14
_GAP: Final = 2
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_BAD: Final = "bold #d55e00"
_GOOD: Final = "bold #009e73"
_ROLE_COLOURS: Final = {"prefill": "#e69f00", "decode": "#56b4e9", "colocated": "#009e73"}


class Look(NamedTuple):
    """How a part of a bar is drawn and called."""

    glyph: str
    colour: str
    label: str


STAGE_LOOKS: Final = {
    Stage.QUEUE_PREFILL.value: Look("░", "#b4bec8", "queue for prefill"),
    Stage.PREFILL.value: Look("█", "#e69f00", "prefill"),
    Stage.HAND_OVER_CONTROL.value: Look("│", "#b4bec8", "offer on its way"),
    Stage.HAND_OVER_WAIT.value: Look("╲", "#b4bec8", "wait for hand-over"),
    Stage.HAND_OVER.value: Look("▞", "#009e73", "hand-over"),
    Stage.QUEUE_DECODE.value: Look("╱", "#b4bec8", "queue for decode"),
    Stage.FIRST_DECODE.value: Look("▓", "#56b4e9", "second token"),
    Stage.DECODE.value: Look("▒", "#0072b2", "further tokens"),
    Stage.DELIVERY.value: Look("▪", "#cc79a7", "delivery"),
    Stage.PAUSE.value: Look("×", "#d55e00", "pause"),
}
BLOCK_LOOKS: Final = {
    "active": Look("█", "#0072b2", "active"),
    "filling": Look("▓", "#56b4e9", "filling"),
    "leased": Look("▞", "#e69f00", "leased"),
    "quarantined": Look("╳", "#d55e00", "quarantined"),
    "cached": Look("▒", "#8794a1", "cached"),
    "free": Look("·", "#8794a1", "free"),
}


def room_for(height: int, instances: Sequence[InstanceView]) -> tuple[int, int]:
    """Return how many requests and how many instances a frame of so many lines shows, instances first."""
    num_notes = len(_notes(instances))
    num_requests = height - NUM_FIXED_LINES - num_notes - len(instances)
    if num_requests > 0:
        return num_requests, len(instances)
    num_lines = height - NUM_FIXED_LINES - num_notes + _NUM_REQUEST_LINES
    return 0, len(instances) if num_lines >= len(instances) else max(1, num_lines - 1)


def render(
    figures: Figures, url: str, width: int, trouble: str = "", num_instances: int | None = None
) -> RenderableType:
    """Return a frame for so many columns, with all instances or those that need most attention.

    ``trouble`` says why it is old, where it is. What is not shown for want of columns is told in lines of its own or
    left out; nothing is cut but the words of a failure, and names that are too long.
    """
    is_wide = width >= WIDE
    parts: list[RenderableType] = [_heading(figures, url, width)]
    if trouble:
        parts.append(Text(f"▲ {trouble}", _BAD))
    elif not figures.status.ready:
        parts.append(Text(f"▲ no request can be served now: {figures.status.detail}", _BAD))
    parts += [*_totals(figures, width), Text(), _instances(figures, num_instances, is_wide)]
    num_hidden = len(figures.status.instances) - (num_instances or len(figures.status.instances))
    if num_hidden > 0:
        parts.append(Text(f"and {num_hidden} more", "dim"))
    notes = _notes(figures.status.instances)
    for note in notes:
        note.truncate(width, overflow="ellipsis")
    parts += [*notes, _legend("KV blocks", BLOCK_LOOKS, width), Text(), _latencies(figures)]
    if figures.requests:
        requests = _requests(figures, width) if is_wide else _requests_in_short(figures, width)
        parts += [Text(), requests, _legend("stages", STAGE_LOOKS, width)]
    return Group(*parts)


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """Return the newest ``width`` values as blocks, from zero to the largest of them; nothing for a single one."""
    shown = values[-width:] if len(values) > 1 else ()
    top = max(shown, default=0.0)
    if top <= 0:
        return _SPARKS[0] * len(shown)
    return "".join(_SPARKS[min(len(_SPARKS) - 1, int(value / top * len(_SPARKS)))] for value in shown)


def stacked_bar(parts: Mapping[str, float], looks: Mapping[str, Look], scale: float, width: int) -> Text:
    """Return ``parts`` as a bar on which ``scale`` fills ``width`` cells.

    Ends of parts are rounded, not their lengths, so that the whole is right to a cell; a part may vanish.
    """
    bar = Text()
    end, cells = 0.0, 0
    for name, look in looks.items():
        end += parts.get(name, 0.0)
        until = min(width, round(end / scale * width)) if scale > 0 else 0
        bar.append(look.glyph * (until - cells), look.colour)
        cells = max(cells, until)
    return bar


def _heading(figures: Figures, url: str, width: int) -> Text:
    status = figures.status
    down = sum(one.state != "ready" for one in status.instances)
    heading = Text("disagg top  ", "bold")
    if not status.ready:
        heading.append("▲ not ready", _BAD)
    elif down:
        heading.append(f"◐ ready, {down} of {len(status.instances)} instances are not", _BAD)
    else:
        heading.append("● ready", _GOOD)
    separator = "  "
    for words in (status.model, f"version {status.version}", url):
        if len(heading) + len(separator) + len(words) <= width:
            heading.append(f"{separator}{words}", "dim")
            separator = " · "
    return heading


def _totals(figures: Figures, width: int) -> list[Text]:
    """Return what concerns the whole server, in as many lines as it takes; no figure is broken."""
    status = figures.status
    waiting = sum(one.num_waiting for one in status.instances)
    running = sum(one.num_running for one in status.instances)
    told = [
        _figure(number(figures.request_rate), "requests/s"),
        _figure(number(figures.prefill_token_rate), "prompt tokens/s"),
        _figure(number(figures.decode_token_rate), "output tokens/s", sparkline(figures.course_of_tokens)),
        _figure(str(status.num_under_way), f"under way ({running} in a batch)"),
        _figure(str(waiting), "queued at instances"),
        _hand_overs(figures),
        *_predictions(status.predictions),
    ]
    lines = [told[0]]
    for figure in told[1:]:
        if len(lines[-1]) + _GAP + len(figure) <= width:
            lines[-1].append(" " * _GAP).append_text(figure)
        else:
            lines.append(figure)
    return lines


def _figure(value: str, words: str, course: str = "") -> Text:
    return Text(f"{value:>5} ", "bold").append(f"{words} ", "not bold").append(course, "not bold #56b4e9")


def _hand_overs(figures: Figures) -> Text:
    totals = figures.status.hand_overs
    told = _figure(number(figures.hand_over_rate), "hand-overs/s,")
    told.append(f"{format_bytes(round(figures.hand_over_byte_rate))}/s", "not bold")
    if figures.hand_over_s is not None:
        told.append(f", {seconds(figures.hand_over_s)} each", "not bold")
    if totals.num_failures_total:
        told.append(f", {totals.num_failures_total} failed", _BAD)
    return told


def _predictions(totals: PredictionTotals) -> list[Text]:
    """Return what came of predictions, where there were any."""
    told = []
    if totals.num_total:
        share = totals.leaning_prompt_tokens_total / max(1, totals.prompt_tokens_total)
        told.append(_figure(percent(share), "of prompt tokens against roles"))
        told.append(
            _figure(percent(totals.ttft_error_seconds_total / max(1e-9, totals.ttft_seconds_total)), "TTFT error")
        )
        told.append(_figure(seconds(totals.ttft_regret_seconds_total / totals.num_total), "regret"))
    if totals.num_refused_total:
        told.append(_figure(str(totals.num_refused_total), f"refused ({totals.num_shed_total} shed)"))
    if totals.num_degraded_total:
        told.append(_figure(str(totals.num_degraded_total), "best effort"))
    return told


def _instances(figures: Figures, num_shown: int | None, is_wide: bool) -> Table:
    wide = ("instance", "state", ">running", ">waiting", ">leases", ">tokens/s", "KV blocks", ">held")
    narrow = ("instance", "state", ">run", ">wait", ">lease", ">tok/s", "KV blocks", ">held")
    table = _table(*(wide if is_wide else narrow))
    instances = figures.status.instances
    if num_shown is not None and num_shown < len(instances):
        instances = sorted(instances, key=_needs_attention, reverse=True)[:num_shown]
    for one in instances:
        total = sum(one.blocks.values())
        table.add_row(
            Text(one.instance, _ROLE_COLOURS.get(one.role, "")),
            Text("● ready", _GOOD) if one.state == "ready" else Text(f"▲ {one.state}", _BAD),
            str(one.num_running),
            str(one.num_waiting),
            str(one.num_leases),
            number(figures.instance_token_rates[one.instance]),
            stacked_bar(one.blocks, BLOCK_LOOKS, float(total), 24 if is_wide else 16),
            percent(one.kv_usage),
        )
    return table


def _needs_attention(one: InstanceView) -> tuple[bool, float, int]:
    return one.state != "ready", one.kv_usage, one.num_waiting


def _notes(instances: Sequence[InstanceView]) -> list[Text]:
    """Return a line for each instance of which there is more to say than a word, the first few that are down first."""
    notes = []
    for one in sorted(instances, key=lambda one: one.state == "ready"):
        died = f", died {'once' if one.num_restarts == 1 else f'{one.num_restarts} times'}" if one.num_restarts else ""
        if one.state == "ready" and died:
            notes.append(Text(f"{one.instance} ").append("● ready", _GOOD).append(died))
        elif one.state != "ready":
            words = f" ({one.detail})" if one.detail else ""
            notes.append(Text(f"{one.instance} ").append(f"▲ {one.state}", _BAD).append(words + died))
    return notes[:_MOST_NOTES]


def _latencies(figures: Figures) -> Table:
    objectives = any(map(math.isfinite, (figures.slo.ttft_s, figures.slo.tpot_s)))
    table = _table(f"last {figures.window_s:g} s", ">P50", ">P90", ">P99", ">objective", ">within")
    table.add_row("TTFT", *_latency_cells(figures.ttft, figures.slo.ttft_s))
    table.add_row("TPOT", *_latency_cells(figures.tpot, figures.slo.tpot_s))
    attainment = figures.attainment
    if objectives and attainment.total:
        share = Text(percent(attainment.share), _GOOD if attainment.share >= 0.9 else _BAD)
        table.add_row("both", "", "", "", f"{attainment.count} of {attainment.total}", share)
    else:
        table.add_row("both", "", "", "", "--slo sets them" if not objectives else "no requests", "–")
    return table


def _latency_cells(latency: LatencyFigures, limit_s: float) -> list[Text]:
    values = latency.percentiles
    cells = [Text(seconds(value), _BAD if value > limit_s else "") for value in (values.p50, values.p90, values.p99)]
    if not math.isfinite(limit_s):
        return [*cells, Text("–"), Text("–")]
    return [*cells, Text(objective(limit_s)), Text(percent(latency.within.share) if latency.within.total else "–")]


def _requests(figures: Figures, width: int) -> Table:
    table = _table("request", "instances", ">prompt", ">output", "stages", ">TTFT", ">TPOT", ">end to end", "")
    scale, bar_width = _longest(figures), width - 92
    for one in figures.requests:
        table.add_row(
            Text(one.request_id[:12], "dim"),
            _route(one),
            str(one.num_prompt_tokens),
            str(one.num_output_tokens),
            stacked_bar(one.stages, STAGE_LOOKS, scale, bar_width),
            _over(one.ttft_s, figures.slo.ttft_s),
            _over(one.tpot_s, figures.slo.tpot_s),
            Text("–" if one.e2e_s is None else seconds(one.e2e_s)),
            _mark(one, figures),
        )
    return table


def _requests_in_short(figures: Figures, width: int) -> Table:
    table = _table("instances", ">tokens", "stages", ">TTFT", ">TPOT", "")
    scale, bar_width = _longest(figures), max(8, width - 60)
    for one in figures.requests:
        table.add_row(
            one.decode_instance or one.prefill_instance or "none",
            f"{one.num_prompt_tokens}+{one.num_output_tokens}",
            stacked_bar(one.stages, STAGE_LOOKS, scale, bar_width),
            _over(one.ttft_s, figures.slo.ttft_s),
            _over(one.tpot_s, figures.slo.tpot_s),
            _mark(one, figures),
        )
    return table


def _longest(figures: Figures) -> float:
    return max((sum(one.stages.values()) for one in figures.requests), default=0.0)


def _route(one: RequestView) -> str:
    source, target = one.prefill_instance, one.decode_instance
    if source and target and source != target:
        return f"{source} → {target}"
    return source or target or "none"


def _mark(one: RequestView, figures: Figures) -> Text:
    """Return whether the objectives were kept, and what ended a request before its end."""
    if keeps(one, figures.slo):
        return Text("✓", _GOOD)
    return Text(f"✗ {one.finish_reason}" if one.e2e_s is None else "✗", _BAD)


def _over(value_s: float | None, limit_s: float) -> Text:
    return Text("–") if value_s is None else Text(seconds(value_s), _BAD if value_s > limit_s else "")


def _legend(title: str, looks: Mapping[str, Look], width: int) -> Text:
    """Return what each glyph means, in as many lines as it takes; no meaning is broken."""
    legend, used = Text().append(f"{title}:", "dim"), len(title) + 1
    for look in looks.values():
        meaning = Text("  ").append(look.glyph * 2, look.colour).append(f" {look.label}", "dim")
        if used + len(meaning) > width:
            legend.append("\n")
            used = 0
        legend.append_text(meaning)
        used += len(meaning)
    return legend


def _table(*headings: str) -> Table:
    """Return a table with these columns; those that begin with ``>`` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if right else "left", no_wrap=True)
    return table
