"""The pages that tests of the file and of the browser read."""

from pathlib import Path

import pytest

from pages import write_pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pages(tmp_path_factory.mktemp("pages with & <signs>"))
