"""The table of the faults that a run tried, after its tests."""

import pytest
from rich.console import Console
from rich.table import Table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a fault that was recorded: the point, who was killed, the command's codes, seconds, rows repeated."""
    rows = [
        (*dict(report.user_properties)["fault"], outcome)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "fault" in dict(report.user_properties)
    ]
    if not rows:
        return
    table = Table("killed at", "who", "exit codes", "seconds", "rows repeated", "as undisturbed")
    for point, who, codes, seconds, repeated, result in rows:
        table.add_row(point, who, " ".join(map(str, codes)), str(seconds), f"{repeated:,}", result)
    Console(width=130).print(table)
