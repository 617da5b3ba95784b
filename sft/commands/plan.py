"""`sft plan`: what a run would do, need and cost, before anything is started."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # slow imports
    from sft.config.settings import Settings


def add_flags(parser: argparse.ArgumentParser) -> None:
    from sft.config.flags import add_flags as add_config_flags

    group = parser.add_argument_group("plan")
    group.add_argument("--explain", action="store_true", help="each formula with its numbers")
    group.add_argument("--json", action="store_true", help="one object, for programs")
    group.add_argument("--what_if", metavar="gpus=N,N,...", help="a table for other numbers of GPUs, and a plot")
    group.add_argument("--plot", metavar="FILE", default="plan.png", help="where --what_if draws (default: plan.png)")
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from sft.resolve.settings import settings_of

    settings = settings_of(arguments, "plan", run_name="plan")
    return show(
        settings, explains=arguments.explain, as_json=arguments.json, what_if=arguments.what_if, plot=arguments.plot
    )


def show(
    settings: object,
    *,
    explains: bool = False,
    as_json: bool = False,
    what_if: str | None = None,
    plot: str = "plan.png",
) -> int:
    """Print the plan of a run with these settings."""
    import json
    import sys
    from pathlib import Path

    from rich.console import Console

    from sft.config.settings import Settings
    from sft.observe.plan_page import show_plan, show_scaling, write_scaling_chart
    from sft.plan.answer import as_data
    from sft.plan.explain import explain
    from sft.resolve.planning import make_plan, scaling

    assert isinstance(settings, Settings)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if what_if is not None:
        rows = scaling(settings, _counts(what_if))
        if as_json:
            print(
                json.dumps(
                    [
                        {"gpus": count, **(as_data(plan) if not isinstance(plan, str) else {"refused": plan})}
                        for count, plan in rows
                    ]
                )
            )
            return 0
        show_scaling(console, rows)
        if write_scaling_chart(rows, Path(plot)):
            console.print(f"plot  {plot}")
        return 0
    if as_json:
        print(json.dumps(answer(settings, explains=explains)))
        return 0
    plan = make_plan(settings)
    show_plan(console, plan)
    if explains:
        console.print("\n".join(["", *explain(plan)]), markup=False)
    return 0


def answer(settings: Settings, *, explains: bool = False) -> dict[str, Any]:
    """The plan as one JSON object, for programs."""
    from sft.plan.answer import as_data
    from sft.plan.explain import explain
    from sft.resolve.planning import make_plan

    plan = make_plan(settings)
    return as_data(plan) | ({"explanation": explain(plan)} if explains else {})


def _counts(text: str) -> list[int]:
    from tokenize_data.errors import UserError

    name, _, values = text.partition("=")
    numbers = values.split(",") if values else []
    if name != "gpus" or not numbers or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--what_if {text}: write it as gpus=16,32,64")
    return [int(number) for number in numbers]
