import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_nbd_is_a_folder_and_no_package() -> None:
    """A package of that name would hide libnbd's module from every program on the host."""
    assert (ROOT / "nbd" / "nbdwire" / "__init__.py").exists()
    assert not (ROOT / "nbd" / "__init__.py").exists()


def test_our_code_may_not_import_libnbd(project: dict[str, Any]) -> None:
    assert "nbd" in project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]


def test_every_package_of_fleece_has_its_place_in_the_layers(project: dict[str, Any]) -> None:
    """A package that no layer names could import anything."""
    layers = next(c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    named = {name.strip() for layer in layers["layers"] for name in layer.split("|")}
    modules = {
        f"fleece.{path.stem}"
        for path in (ROOT / "fleece").iterdir()
        if (path / "__init__.py").exists() or path.suffix == ".py"
    }
    assert modules - named <= {"fleece.__init__", "fleece.__main__"}


def test_imports_point_down_only() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    assert linter.exists(), "import-linter is one of the dev dependencies; ./run setup installs it"
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_wheel_holds_both_packages_and_the_command(project: dict[str, Any]) -> None:
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        "fleece",
        "nbd/nbdwire",
    ]
    assert project["project"]["scripts"] == {"fleece": "fleece.cli.main:main"}
    assert (ROOT / "fleece" / "py.typed").exists()
    assert (ROOT / "nbd" / "nbdwire" / "py.typed").exists()


def test_both_packages_can_be_imported_where_the_project_is_installed(tmp_path: Path) -> None:
    """From an empty directory: nothing of the source tree may be needed by accident."""
    code = "import fleece, nbdwire, fleece.block.file, nbdwire.constants"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)


def test_nbdwire_needs_the_standard_library_only(tmp_path: Path) -> None:
    modules = sorted(path.stem for path in (ROOT / "nbd" / "nbdwire").glob("*.py"))
    code = "\n".join(
        [
            f"import importlib, sys; sys.path.append({str(ROOT / 'nbd')!r})",
            *(f"importlib.import_module('nbdwire.{m}')" for m in modules if m != "__init__"),
            "top = {name.partition('.')[0] for name in sys.modules}",
            "extra = top - set(sys.stdlib_module_names) - {'nbdwire', '__main__'}",
            "print(*sorted(name for name in extra if not name.startswith('_')))",
        ]
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("package", ["fleece", "nbd/nbdwire"])
def test_every_source_file_names_its_licence(package: str) -> None:
    line = "# SPDX-License-Identifier: Apache-2.0\n"
    files = list((ROOT / package).rglob("*.py"))
    assert files
    assert [path for path in files if line not in path.read_text()[:200]] == []
