"""What a person sees in the terminal: a progress line while the night runs, and tables when it is over."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.doctor import Finding
from trainer.workers import Event

# What a day's table shows of a prediction, by the first of these metrics that it has.
_HEADINGS = {"auc": "AUC  cal.", "ndcg@10": "NDCG@10", "mse": "MSE"}


class Show:
    """Progress on a terminal as a bar, elsewhere as one plain line a day. Use in a with block and hand its `event`
    to the night.
    """

    def __init__(self, console: Console):
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def event(self, event: Event) -> None:
        if event["event"] == "progress":
            description = f"{event['day']} {event['phase']}"
            if self._task is None:
                self._task = self._progress.add_task(description)
            self._progress.update(self._task, description=description, completed=event["rows"], total=event["of"])
        elif event["event"] == "committed":
            self._console.print(day_line(event["report"]), highlight=False)
        elif event["event"] in ("lost", "waiting"):
            self._console.print(event["text"], highlight=False, markup=False)

    def __enter__(self) -> "Show":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def day_line(report: Mapping[str, Any]) -> str:
    """A day in one line: what the model of the day before reached on it, and how fast it was trained on."""
    aucs = [f"{address} {number(m['auc'])}" for address, m in report["metrics"].items() if m.get("auc") is not None]
    found = "AUC " + ", ".join(aucs) if aucs else "no model to score it with"
    return f"{report['day']}  {report['rows']:>9,} rows  {report['samples_per_s']:>8,.0f} rows/s  {found}"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def days_table(days: Sequence[Mapping[str, Any]], law: Mapping[str, Mapping[str, float]] | None = None) -> Table:
    """One line a day: AUC and calibration of each probability, NDCG of each ranking, MSE of each value. law: by day,
    the AUC of the true law.
    """
    table = Table(title="each day scored by the model of the day before", title_justify="left", header_style="bold")
    for heading in ("day", "state", "rows", "rows/s"):
        table.add_column(heading, justify="left" if heading in ("day", "state") else "right")
    kinds = {address: next(k for k in _HEADINGS if k in m) for day in days for address, m in day["metrics"].items()}
    for address, kind in kinds.items():
        table.add_column(f"{address}\n{_HEADINGS[kind]}", justify="right")
    for day in days:
        cells = [_cell(day["metrics"].get(address, {}), kind) for address, kind in kinds.items()]
        table.add_row(day["day"], day["state"], f"{day['rows']:,}", f"{day['samples_per_s']:,.0f}", *cells)
        if law and (truth := law.get(day["day"])):
            reached = [number(truth.get(address)) + "      " if address in truth else "" for address in kinds]
            table.add_row("", "the true law", "", "", *reached, style="dim")
    return table


def states_table(entries: Iterable[Mapping[str, Any]]) -> Table:
    """Where each interval stands, since when and why; or all that happened to one."""
    table = Table("day", "state", "since", "why", header_style="bold")
    for entry in entries:
        table.add_row(entry["day"], entry["state"] or "-", entry["since"] or "-", Text(entry["reason"] or "-"))
    return table


def _cell(metrics: Mapping[str, Any], kind: str) -> str:
    if kind != "auc":
        return number(metrics.get(kind), 3)
    return f"{number(metrics.get('auc'))}  {number(metrics.get('calibration'), 2)}" if metrics else "-"


def metrics_table(metrics: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """One line an address, one column a metric."""
    table = Table(title=title, title_justify="left", header_style="bold")
    names = list(dict.fromkeys(name for of in metrics.values() for name in of))
    for heading in ("prediction", *names):
        table.add_column(heading, justify="left" if heading == "prediction" else "right")
    for address, of in metrics.items():
        values = [of.get(name) for name in names]
        table.add_row(address, *(f"{v:,}" if isinstance(v, int) else number(v) for v in values))
    return table


def findings_table(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, show_header=False)
    mark = {True: "[green]ok[/]", False: "[red]no[/]", None: ""}
    for finding in findings:
        table.add_row(
            mark[finding.good], finding.name, finding.found, "" if finding.good is not False else f"-> {finding.do}"
        )
    return table
