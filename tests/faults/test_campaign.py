"""The campaign with few tries, one item for each of its rows, two of them at a time. The whole: python -m
tests.faults.campaign.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import forkserver

import pytest

from tests.faults.campaign import NOT_SMALL, ROWS, one_row, table
from tests.faults.rows import Field, Row

pytestmark = pytest.mark.timeout(3600)  # a row waits for those before it
_SLOWEST_FIRST = ("boundaries", "ranks", "launchers", "layouts")
_NAMES = [*_SLOWEST_FIRST, *(name for name in ROWS if name not in (*_SLOWEST_FIRST, *NOT_SMALL))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Row]]]:
    field = Field(tmp_path_factory.mktemp("campaign").resolve(), small=True)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield {name: pool.submit(one_row, name, field) for name in _NAMES}
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # or it outlives the tests


@pytest.mark.parametrize("name", _NAMES)
def test_survived(rows: dict[str, Future[Row]], name: str) -> None:
    row = rows[name].result()
    if row.note.startswith("skipped"):
        pytest.skip(row.note)
    assert row.is_good, table([row])
