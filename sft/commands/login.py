"""`sft login [hub|wandb|trackio]`: stores tokens where the libraries look for them, and never shows them."""

from __future__ import annotations

import argparse

SERVICES = ("hub", "wandb", "trackio")
_PAGES = {"hub": "https://huggingface.co/settings/tokens", "wandb": "https://wandb.ai/authorize"}
_STORES = {"trackio": "hub"}  # Trackio uses the Hub's token


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "service",
        nargs="?",
        choices=SERVICES,
        metavar="hub|wandb|trackio",
        help="default: the Hub, and W&B where it is installed",
    )


def run(arguments: argparse.Namespace) -> int:
    """Read a token from the terminal without echo, or from standard input if that is not a terminal."""
    import importlib.util
    import sys

    from rich.console import Console

    from sft.resolve.health import token_of

    console = Console(highlight=False, markup=False, soft_wrap=True)
    services = [arguments.service] if arguments.service else ["hub"]
    if not arguments.service and sys.stdin.isatty() and importlib.util.find_spec("wandb"):
        services.append("wandb")
    for service in services:
        store = _STORES.get(service, service)
        _check_installed(store)
        console.print(f"{service}: {token_of(store).text}")
        token = _asked(store)
        if not token:
            console.print(f"{service}: nothing changed")
            continue
        _store(store, token)
        console.print(f"{service}: token stored")
        if (name := _variable(store)) is not None:
            console.print(f"{service}: {name} is set in the environment, and wins over the stored token")
    return 0


def _variable(service: str) -> str | None:
    import os

    from sft.resolve.health import TOKEN_VARIABLES

    return next((name for name in TOKEN_VARIABLES[service] if os.environ.get(name)), None)


def _check_installed(service: str) -> None:
    import importlib.util

    from tokenize_data.errors import UserError

    if service == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install 'megasft[wandb]'")


def _asked(service: str) -> str:
    import getpass
    import sys

    from tokenize_data.errors import UserError

    if sys.stdin.isatty():
        try:
            return getpass.getpass(f"Token from {_PAGES[service]} (hidden; empty keeps what is there): ").strip()
        except EOFError:
            return ""
    token = sys.stdin.readline().strip()
    if not token:
        raise UserError("standard input holds no token: pipe it in, or run `sft login` in a terminal")
    if len(token.split()) > 1:
        raise UserError("standard input does not begin with a token: its first line has several words")
    return token


def _store(service: str, token: str) -> None:
    if service == "hub":
        _store_for_hub(token)
    else:
        _store_for_wandb(token)


def _store_for_hub(token: str) -> None:
    """Report errors in our own words: a library's message may contain the token."""
    import logging

    from huggingface_hub import login
    from huggingface_hub.errors import HfHubHTTPError

    from tokenize_data.errors import FailedError, UserError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        login(token=token, add_to_git_credential=False)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(f"the Hub rejects this token ({status}): copy it again from {_PAGES['hub']}") from None
        raise FailedError(f"the Hub answered {status}: try again later; nothing was stored") from None
    except ValueError:
        raise UserError(f"the Hub rejects this token: copy it again from {_PAGES['hub']}") from None
    except Exception as error:
        raise FailedError(f"the Hub cannot be reached ({type(error).__name__}): nothing was stored") from None


def _store_for_wandb(token: str) -> None:
    import importlib

    from tokenize_data.errors import UserError

    wandb = importlib.import_module("wandb")
    try:
        wandb.login(key=token, relogin=True)
    except Exception as error:
        raise UserError(
            f"W&B rejects this key ({type(error).__name__}): copy it again from {_PAGES['wandb']}"
        ) from None
