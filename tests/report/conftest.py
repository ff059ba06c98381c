"""Making a page needs the extra."""

import pytest


@pytest.fixture(autouse=True)
def _extra():
    for package in ("vl_convert", "jinja2"):
        pytest.importorskip(package, reason=f"{package} is not installed: dqrm[report]")
