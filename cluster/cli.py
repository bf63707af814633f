"""The command line: daybreak VERB CONFIG [options].

Exit codes: 0 done, 2 bad input or configuration (said in words), 1 anything else. --json: one JSON object as the last
line of stdout, and everything for people on stderr.
"""

import datetime
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trainer.errors import ClusterError, UserError
from trainer.intervals import Interval

_INTERRUPTED = 130  # what typer returns after Ctrl-C

app = typer.Typer(
    name="daybreak",
    help="Train one multi-task ranking model every night: score the new day, train on it, gate, promote.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(help="The model's YAML file.")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="Override a value of the configuration; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
NoRay = Annotated[bool, typer.Option("--no-ray", help="One worker in this process, without Ray.")]


@app.command()
def doctor(
    paths: Annotated[list[str] | None, typer.Argument(help="Folders that must be writable.")] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: versions that fit each other, cores, memory, GPUs, writable paths."""
    from dataclasses import asdict

    from cluster.doctor import examine
    from cluster.tables import findings_table

    findings = examine(paths or ["."])
    _console(as_json).print(findings_table(findings))
    _finish(as_json, {"ok": all(f.good is not False for f in findings), "findings": [asdict(f) for f in findings]})
    if any(f.good is False for f in findings):
        raise typer.Exit(2)


@app.command()
def simulate(
    out: Annotated[str, typer.Argument(help="The folder for OUT/logs and OUT/truth.")],
    days: Annotated[int, typer.Option(help="How many days.")] = 7,
    start: Annotated[str, typer.Option(help="The first day.")] = "2026-11-01",
    rows_per_day: Annotated[int, typer.Option(help="Impressions a day.")] = 60_000,
    users: Annotated[int, typer.Option(help="Users alive on a day.")] = 3_000,
    items: Annotated[int, typer.Option(help="Items alive on a day.")] = 1_500,
    seed: Annotated[int, typer.Option(help="The same seed gives the same logs.")] = 0,
    as_json: Json = False,
) -> None:
    """Write days of impressions with a known law, and the law's probabilities beside them."""
    from cluster.simulate import simulate as write

    write(out, days=days, start=_day(start, "--start"), users=users, items=items, rows_per_day=rows_per_day, seed=seed)
    _say(_console(as_json), f"{days} days of {rows_per_day:,} rows in {out}/logs, their law in {out}/truth")
    _finish(as_json, {"logs": f"{out}/logs", "truth": f"{out}/truth", "days": days, "rows": days * rows_per_day})


@app.command()
def train(
    config: Config,
    day: Annotated[str, typer.Option(help="The day, YYYY-MM-DD, or hour, YYYY-MM-DDTHH.")],
    sets: Set = [],  # noqa: B006 - typer's way
    no_ray: NoRay = False,
    as_json: Json = False,
) -> None:
    """Train on one day, from the newest checkpoint before it. Logs and promotes nothing: the next nightly does."""
    from cluster.nightly import train_one
    from cluster.tables import Show

    settings, interval, console = _load(config, sets), _interval(day, "--day"), _console(as_json)
    with Show(console) as show:
        entry = train_one(settings, interval, use_ray=not no_ray, on_event=show.event)
    if not entry["trained"]:
        _say(console, f"{interval.words} is trained already, in {_shown(settings.checkpoints.path)}")
    _finish(as_json, entry)


@app.command()
def nightly(
    config: Config,
    first: Annotated[str | None, typer.Option("--from", help="The first day, or hour.")] = None,
    through: Annotated[str | None, typer.Option(help="The last day, or hour.")] = None,
    again: Annotated[
        str | None, typer.Option(help="Throw away the models from this day on, and train them anew.")
    ] = None,
    truth: Annotated[
        str | None, typer.Option(help="A simulation's folder: also show the AUC that the true law reaches.")
    ] = None,
    sets: Set = [],  # noqa: B006
    no_ray: NoRay = False,
    as_json: Json = False,
) -> None:
    """Every day that is not done yet: score, train, commit, log, judge, promote or hold."""
    from cluster.nightly import nightly as run
    from cluster.tables import Show, days_table

    settings, console = _load(config, sets), _console(as_json)
    with Show(console) as show:
        report = run(
            settings,
            first=_maybe_interval(first, "--from"),
            through=_maybe_interval(through, "--through"),
            again=_maybe_interval(again, "--again"),
            use_ray=not no_ray,
            on_event=show.event,
        )
    law = None
    if truth:
        from cluster.simulate import law_auc

        days = [entry["day"] for entry in report["days"] if _interval(entry["day"], "--truth").hour is None]
        law = {day: law_auc(truth, _day(day, "--truth")) for day in days}
    console.print(days_table(report["days"], law))
    _print_states(console, report["days"])
    _print_data(console, report)
    _say(console, _how_to_open(settings.tracking.mlflow))
    _finish(as_json, report)


@app.command()
def predict(
    config: Config,
    day: Annotated[str, typer.Option(help="The day, or hour, whose rows are scored.")],
    out: Annotated[str, typer.Option(help="The folder for the Parquet files.")],
    sets: Set = [],  # noqa: B006
    no_ray: NoRay = False,
    as_json: Json = False,
) -> None:
    """Score a day's rows with the promoted model from before that day."""
    from cluster.predict import predict as run
    from cluster.tables import Show

    settings, console = _load(config, sets), _console(as_json)
    with Show(console) as show:
        report = run(settings, _interval(day, "--day"), out, use_ray=not no_ray, on_event=show.event)
    _say(console, f"{report['rows']:,} rows scored into {out} by the model of {report['trained_through']}")
    _finish(as_json, report)


@app.command()
def export(
    config: Config,
    out: Annotated[str, typer.Option(help="The folder for the programs and the rows.")],
    day: Annotated[
        str | None, typer.Option(help="The last day that the model was trained on; else the champion.")
    ] = None,
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Write a model for serving: a user part, called once a request, and an item part."""
    from cluster.export import export as run

    settings, console = _load(config, sets), _console(as_json)
    report = run(settings, out, _maybe_interval(day, "--day"))
    rows = sum(table["rows"] for table in report["tables"].values())
    _say(console, f"the model of {report['trained_through']} with {rows:,} rows in {out}")
    _finish(as_json, report)


@app.command()
def evaluate(
    config: Config,
    day: Annotated[str, typer.Option(help="The day, or hour, whose rows are scored.")],
    model_day: Annotated[str, typer.Option(help="The last day, or hour, that the model was trained on.")],
    sets: Set = [],  # noqa: B006
    no_ray: NoRay = False,
    as_json: Json = False,
) -> None:
    """Measure a day's rows with the model of another day. Trains and writes nothing."""
    from cluster.predict import evaluate as measure
    from cluster.tables import Show, metrics_table

    settings, console = _load(config, sets), _console(as_json)
    intervals = _interval(day, "--day"), _interval(model_day, "--model-day")
    with Show(console) as show:
        report = measure(settings, *intervals, use_ray=not no_ray, on_event=show.event)
    console.print(metrics_table(report["metrics"], f"{day} by the model of {model_day}"))
    _finish(as_json, report)


@app.command()
def status(
    config: Config,
    day: Annotated[str | None, typer.Option(help="All that happened to this day, or hour.")] = None,
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """What happened to each day and why, which one serves, and who runs a night now."""
    from cluster.status import history
    from cluster.status import status as look
    from cluster.tables import days_table, states_table

    settings, console = _load(config, sets), _console(as_json)
    if interval := _maybe_interval(day, "--day"):
        entries = history(settings, interval)
        console.print(states_table([e | {"day": interval.name, "since": e["at"]} for e in entries]))
        _finish(as_json, {"model": settings.name, "day": interval.name, "entries": entries})
        return
    found = look(settings)
    if found["days"]:
        console.print(days_table(found["days"]))
    else:
        _say(console, f"no day is done yet in {_shown(settings.checkpoints.path)}/{settings.name}")
    if found["ledger"]:
        console.print(states_table(found["ledger"]))
    champion, holder = found["serving"], found["lock"]
    since = f" since {champion['since']} by {champion['by']}: {champion['reason']}" if champion else ""
    _say(console, f"champion: {found['champion'] or 'none'}{since}")
    for each in found["late"]:
        _say(console, f"{each['day']} came late: {each['what']}")
    if holder:
        who = f"{holder['verb']}, process {holder['pid']} on {holder['host']}, since {holder['since']}"
        _say(console, f"running: {who}; {holder['sign_of_life']}")
    _finish(as_json, found)


@app.command()
def promote(
    config: Config,
    day: Annotated[str, typer.Option(help="The day, or hour, whose model serves from now on.")],
    force: Annotated[bool, typer.Option("--force", help="Also when the gate held it.")] = False,
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Let the model of a day serve, also one that the gate held (--force)."""
    from cluster.promotion import promote as run

    _moved(config, sets, as_json, "promote", partial(run, interval=_interval(day, "--day"), force=force))


@app.command()
def rollback(
    config: Config,
    to: Annotated[str, typer.Option(help="The day, or hour, whose model serves from now on.")],
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Let the model of an earlier day serve that was promoted."""
    from cluster.promotion import rollback as run

    _moved(config, sets, as_json, "rollback", partial(run, interval=_interval(to, "--to")))


def _moved(path: str, sets: list[str], as_json: bool, verb: str, move: Callable[..., Any]) -> None:
    """Move the champion under the lock, and say what serves now and what did."""
    from cluster.morning import lock, open_checkpoints, open_ledger

    settings, console = _load(path, sets), _console(as_json)
    with lock(settings, verb) as held:
        moved = move(settings, open_checkpoints(settings), open_ledger(settings, held.mine))
    now, before = moved.champion, moved.before
    if before and before.interval == now.interval:
        _say(console, f"{now.interval} serves already, since {before.since} by {before.by}")
    else:
        _say(console, f"{now.interval} serves since {now.since} by {now.by}: {now.reason}")
        _say(console, f"before: {before.interval} since {before.since} by {before.by}" if before else "before: none")
    if moved.alias:
        _say(console, f"MLflow's alias did not follow; the next night sets it: {moved.alias}")
    told = {"model": settings.name, "champion": now.interval.name, "since": now.since, "by": now.by}
    was = {"before": before.interval.name, "before_since": before.since} if before else {"before": None}
    _finish(as_json, told | was | {"alias": moved.alias is None})


@app.command()
def verify(
    config: Config,
    day: Annotated[str | None, typer.Option(help="Only the checkpoint of this day, or hour.")] = None,
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Read every file of the kept checkpoints again: is each as it was written?"""
    from cluster.status import verify as read

    settings, console = _load(config, sets), _console(as_json)
    found = read(settings, _maybe_interval(day, "--day"))
    for entry in found:
        _say(console, f"{entry['day']}: {'every file is as it was written' if entry['ok'] else entry['error']}")
    if not found:
        _say(console, f"there is no checkpoint in {_shown(settings.checkpoints.path)}/{settings.name}")
    good = all(entry["ok"] for entry in found)
    _finish(as_json, {"model": settings.name, "ok": good, "days": found})
    if not good:
        raise typer.Exit(2)


def main() -> None:
    """Run the command line; the only place where errors become exit codes."""
    _run(lambda: app(standalone_mode=False), as_json="--json" in sys.argv)


def _run(command: Callable[[], Any], as_json: bool) -> None:
    try:
        code = command()
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as error:
        print(f"daybreak: {error}", file=sys.stderr)
        _finish(as_json, {"error": str(error)})
        sys.exit(2)
    except ClusterError as error:
        print(f"daybreak: {error}", file=sys.stderr)
        _finish(as_json, {"error": str(error)})
        sys.exit(1)
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except KeyboardInterrupt:
        print("daybreak: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong option or argument
            error.show()
            sys.exit(error.exit_code)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _load(path: str, sets: list[str]) -> Any:
    from trainer.configfile import load

    return load(path, sets)


def _shown(address: str) -> str:
    """An address without key, password and secret."""
    from trainer.storage import without_credentials

    return without_credentials(address)


def _console(as_json: bool) -> Console:
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 160
    return Console(stderr=as_json, width=width)


def _say(console: Console, text: str) -> None:
    """Lines as they are: what may be copied is neither broken, nor coloured, nor read as markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _finish(as_json: bool, value: Any) -> None:
    if as_json:
        print(json.dumps(_plain(value)), flush=True)


def _plain(value: Any) -> Any:
    """As JSON has it: neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _day(text: str, option: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        do = "give a day of the calendar, such as 2026-11-20"
        raise UserError("not a day", option, got=repr(text), expected="YYYY-MM-DD", do=do) from None


def _interval(text: str, option: str) -> Interval:
    return Interval.parse(text, option)


def _maybe_interval(text: str | None, option: str) -> Interval | None:
    return None if text is None else _interval(text, option)


def _print_states(console: Console, days: list[dict[str, Any]]) -> None:
    for entry in days:
        if entry["state"] == "held":
            _say(console, f"{entry['day']} held: {entry['reason']}")


def _print_data(console: Console, report: dict[str, Any]) -> None:
    """What is to be known of the days that were delivered."""
    for entry in report["days"]:
        for note in entry["notes"]:
            _say(console, f"{entry['day']}: {note}")
        if (aside := entry["quarantine"]) and aside["rows"] + aside["files"]:
            _say(console, f"{entry['day']}: {aside['rows']:,} rows and {aside['files']} files were set aside")
    for each in report["late"]:
        _say(console, f"{each['day']} came late: {each['what']}")
    if report["waiting"]:
        _say(console, f"waiting for their labels: {', '.join(report['waiting'])}")


def _how_to_open(uri: str) -> str:
    if not uri.startswith("sqlite:"):
        return f"MLflow: {_shown(uri)}"
    mlflow = Path(sys.executable).with_name("mlflow")
    here = mlflow.relative_to(Path.cwd()) if mlflow.is_relative_to(Path.cwd()) else mlflow
    return (
        "every day is a run in MLflow; to see them:\n"
        "  MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \\\n"
        f"  {here} server --backend-store-uri {uri} --host 127.0.0.1 --port 5000 --workers 1\n"
        "and open http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
    )


if __name__ == "__main__":
    main()
