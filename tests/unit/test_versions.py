"""What is told of installed packages."""

from __future__ import annotations

from importlib import metadata

from sft.cli import entry
from sft.spec.versions import foreign_package_warning


def _install(monkeypatch, folder, entry_point):
    info = folder / "sft-0.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 1.0\nName: sft\nVersion: 0.1.1\n")
    (info / "entry_points.txt").write_text(f"[console_scripts]\nsft = {entry_point}\n")
    found = metadata.PathDistribution(info)
    monkeypatch.setattr(metadata, "distribution", lambda name: found)


def test_a_package_of_another_project_with_the_commands_name_is_warned_of(monkeypatch, tmp_path, capsys):
    _install(monkeypatch, tmp_path, "sft.scripts:main")
    assert entry(["--help"]) == 0
    assert capsys.readouterr().err == (
        "sft: warning: the installed package `sft` 0.1.1 is another project's and may have overwritten files of this "
        "one: pip uninstall sft, then pip install --force-reinstall --no-deps megasft\n"
    )


def test_an_earlier_release_of_this_project_is_no_stranger(monkeypatch, tmp_path):
    _install(monkeypatch, tmp_path, "sft.cli:entry")
    assert foreign_package_warning() is None


def test_nothing_is_said_where_it_is_not_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert foreign_package_warning() is None
