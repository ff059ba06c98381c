"""A study's file on small data."""

import pytest
import yaml

from conftest import tiny

VARIANTS = {
    "FP32": {"quantization.bits": 32},
    "INT4": {"quantization.bits": 4},
    "PTQ INT4": {"ptq": {"of": "FP32", "bits": 4}},
}


@pytest.fixture
def study_file(tmp_path):
    """Writes a study of a tiny model into a file; keyword arguments are its keys."""

    def write(**keys):
        content = {"base": tiny(epochs=1).to_dict(), "variants": VARIANTS, **keys}
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(file)

    return write
