"""The lock on a run folder is rank 0's; its refusal reaches every rank."""

import pytest

from distributed.test_failures import Nursery, sentences, training
from dqrm.files import exclusive

pytestmark = pytest.mark.distributed


def test_a_folder_that_another_process_holds_is_refused_on_every_rank(generated, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "ranks").mkdir()
    ranks = Nursery(tmp_path / "ranks")
    try:
        with exclusive(run / ".lock", "never"):
            ranks.start(*[training(generated, run)] * 2)
            one, two = sentences(ranks.wait())
    finally:
        ranks.stop()
    assert one == two
    assert "another process is training into" in one
    assert [path.name for path in run.iterdir()] == [".lock"]
