"""`sft sweep sweep.yaml`: a grid of recipes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", type=Path, metavar="sweep.yaml", help="base recipe, axes, constraints, exclusions")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the trials' recipes and the time they may take; start nothing"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the results so far, and write sweep.csv; start nothing"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="the sweep's folder (default: sweeps/NAME)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=None,
        metavar="N",
        help="trials at once, on disjoint GPUs (default: the file's, else 1)",
    )
    parser.add_argument(
        "--trial", type=int, default=None, metavar="N", help="run trial N alone, counted from 0: for SLURM arrays"
    )
    parser.add_argument(
        "--slurm", action="store_true", help="print the sbatch command that runs what is left as an array"
    )
    parser.add_argument("--retry_failed", action="store_true", help="retry trials that have failed too often")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from sft.sweep import trials
    from sft.sweep.grid import read_sweep
    from tokenize_data.errors import UserError

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    if arguments.parallel is not None and arguments.parallel < 1:
        raise UserError(f"--parallel {arguments.parallel} must be at least 1")
    sweep = read_sweep(arguments.sweep, out=arguments.out, parallel=arguments.parallel, warn=lambda line: _warn(line))
    if arguments.trial is not None and not 0 <= arguments.trial < len(sweep.trials):
        raise UserError(f"--trial {arguments.trial}: {arguments.sweep} has trials 0 to {len(sweep.trials) - 1}")
    if arguments.dry_run:
        return _dry_run(sweep, console)
    if arguments.slurm:
        return _print_sbatch(sweep, arguments)
    if not arguments.table:
        trials.prepare(sweep, only=arguments.trial, forget_failures=arguments.retry_failed)
        console.print(f"{sweep.name}: {len(sweep.trials)} trials, {sweep.parallel} at once, in {sweep.folder}")
        stopped = _run(sweep, console, arguments)
        if stopped is not None:
            sys.stderr.write(f"sft sweep: stopped by {stopped}; run the same command to resume\n")
            return 75
        if arguments.trial is not None:  # the other tasks of the array write their own
            return 0 if trials.state_of(sweep, sweep.trials[arguments.trial]) == "finished" else 3
    return _report(sweep, console)


def _run(sweep: Any, console: Any, arguments: argparse.Namespace) -> str | None:
    import contextlib

    from sft.launcher import lease
    from sft.sweep import results, trials

    def changed() -> None:
        if arguments.trial is None:
            results.write_csv(sweep, results.rows(sweep))

    with lease.held(sweep.folder) if arguments.trial is None else contextlib.nullcontext():
        stopped: str | None = trials.Runner(sweep, console.print, changed).run(arguments.trial)
    return stopped


def _report(sweep: Any, console: Any) -> int:
    from sft.sweep import charts, results

    rows = results.rows(sweep)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    console.print(results.table(sweep, rows))
    written = [results.write_csv(sweep, rows), *charts.write_charts(sweep, rows)]
    console.print(
        f"table     {written[0]}" + (f"; {', '.join(path.name for path in written[1:])}" if written[1:] else "")
    )
    failed = [row for row in rows if row["state"] in ("failed", "refused")]
    for row in failed:
        sys.stderr.write(f"sft sweep: {row['trial']} {row['state']}: {row['reason']}\n")
    return 3 if failed else 0


def _dry_run(sweep: Any, console: Any) -> int:
    from sft.observe.progress import duration
    from sft.resolve.devices import visible_gpus
    from sft.sweep import durations

    seconds = []
    for trial in sweep.trials:
        took = durations.expected(trial.values, max(visible_gpus() // sweep.parallel, 1))
        seconds.append(took)
        sys.stdout.write(
            f"--- {trial.number}: {trial.name}, {f'about {duration(took)}' if took is not None else 'time not known'}\n"
        )
        sys.stdout.write(trial.recipe)
    for reason, count in sweep.left_out.items():
        sys.stdout.write(f"left out: {count} by {reason}\n")
    known = [took for took in seconds if took is not None]
    total = f"about {duration(sum(known) / sweep.parallel)}" if known else "not known"
    unknown = (
        f", without {len(seconds) - len(known)} whose time is not known" if known and len(known) < len(seconds) else ""
    )
    sys.stdout.write(f"{len(seconds)} trials, {sweep.parallel} at once; total time {total}{unknown}\n")
    sys.stdout.flush()
    return 0


def _print_sbatch(sweep: Any, arguments: argparse.Namespace) -> int:
    from sft.sweep import trials

    left = [trial.number for trial in sweep.trials if trials.state_of(sweep, trial) != "finished"]
    if not left:
        sys.stdout.write("all trials are finished: sft sweep --table prints the results\n")
        return 0
    ranges: list[list[int]] = []
    for number in left:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    array = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
    at_once = f"%{sweep.parallel}" if sweep.parallel > 1 else ""
    out = f" --out {arguments.out}" if arguments.out else ""
    sys.stdout.write(f"sbatch --array={array}{at_once} launch/sweep.sbatch {arguments.sweep}{out}\n")
    return 0


def _warn(line: str) -> None:
    sys.stderr.write(f"sft sweep: warning: {line}\n")
