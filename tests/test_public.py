"""The public surface: what `import reprobe` gives, and what it does not do."""

import subprocess
import sys

import pytest

import reprobe as rp

HEAVY = ("torch", "transformers", "sklearn", "polars", "zarr", "matplotlib", "datasets")


def test_the_public_names_are_sorted_and_all_there():
    assert rp.__all__ == sorted(rp.__all__)
    for name in rp.__all__:
        assert getattr(rp, name).__doc__, name
    assert set(rp.__all__) <= set(dir(rp))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Probe'"):
        rp.Probe  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import reprobe",
        "import sys; sys.argv = ['reprobe', '--help']\nfrom reprobe.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass",
    ],
)
def test_importing_and_asking_for_help_load_no_heavy_library(code):
    script = f"{code}\nimport sys; print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "LOADED []" in out
