"""The public surface: what `import reprobe` gives, and what it does not do."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import reprobe as rp
from reprobe import methods

HEAVY = ("torch", "transformers", "sklearn", "polars", "zarr", "matplotlib", "datasets")


def test_the_public_names_of_every_module_are_sorted_and_all_there():
    every = ["reprobe", *(module.name for module in pkgutil.walk_packages(rp.__path__, "reprobe."))]
    lists = {name: module.__all__ for name in every if hasattr(module := importlib.import_module(name), "__all__")}
    assert {"reprobe", "reprobe.cli", "reprobe.probing", "reprobe.report"} <= set(lists)
    for name, public in lists.items():
        assert public == sorted(set(public)), name
        assert [n for n in public if not hasattr(importlib.import_module(name), n)] == [], name


def test_the_public_names_of_the_library_are_those_of_its_stations():
    assert rp.__all__ == sorted(rp._HOME)
    for name in rp.__all__:
        assert getattr(rp, name).__doc__, name
        assert getattr(rp, name) is getattr(importlib.import_module(f"reprobe.{rp._HOME[name]}"), name)
    assert set(rp.__all__) <= set(dir(rp))


def test_every_name_of_a_station_is_documented():
    """The reference (`.ci/reference`) is made of these."""
    stations = ("errors", "model", "prompts", "store", "extraction", "probing", "control", "evaluation", "report")
    files = [f"methods.{file.name}" for file in pkgutil.iter_modules(methods.__path__)]
    for name in (*stations, *files):
        module = importlib.import_module(f"reprobe.{name}")
        assert module.__doc__, name
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"]
        for public in getattr(module, "__all__", own):
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{public}"
                assert not value.__doc__.startswith(f"{public}("), f"{name}.{public} has a dataclass's own docstring"


def test_every_public_method_of_a_public_class_is_documented_there_or_where_it_comes_from():
    absent = []
    for name in rp.__all__:
        value = getattr(rp, name)
        for member in dir(value) if inspect.isclass(value) else ():
            own = inspect.getattr_static(value, member)
            function = getattr(own, "fget", None) or getattr(own, "func", None) or getattr(own, "__func__", own)
            ours = inspect.isfunction(function) and function.__module__.startswith("reprobe.")
            if (
                ours
                and not member.startswith("_")
                and not (inspect.getdoc(own) or inspect.getdoc(getattr(value, member)))
            ):
                absent.append(f"{name}.{member}")
    assert absent == []


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
