"""A folder of a model is there whole, or not at all and with a reason."""

import errno

import pytest

from reprobe.control.model_folder import whole_folder
from reprobe.errors import ArtifactExists, DiskFull, UsageError


def test_a_full_disk_leaves_nothing_and_is_called_so(tmp_path):
    def write_half():
        with whole_folder(tmp_path / "model") as folder:
            (folder / "half.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="nothing was left behind"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_full_disk_is_not_called_one(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(UsageError, match="could not be written"), whole_folder(tmp_path / "file" / "model"):
        pytest.fail("there is nowhere to write")
    with pytest.raises(ArtifactExists), whole_folder(tmp_path / "file"):
        pytest.fail("something is there")
