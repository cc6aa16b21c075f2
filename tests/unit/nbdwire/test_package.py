import ast
import sys
from pathlib import Path

import nbdwire

ROOT = Path(nbdwire.__file__).parent


def test_the_folder_nbd_is_no_package() -> None:
    """libnbd's Python module is called nbd: a package of that name breaks nbdsh."""
    assert ROOT.parent.name == "nbd"
    assert not (ROOT.parent / "__init__.py").exists()


def test_every_public_name_is_there_and_documented() -> None:
    for name in nbdwire.__all__:
        assert getattr(nbdwire, name).__doc__, name


def test_nothing_but_the_standard_library_is_imported() -> None:
    allowed = sys.stdlib_module_names | {"nbdwire"}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                modules = [node.module or ""]
            assert {module.partition(".")[0] for module in modules} <= allowed, path


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    errors = [
        cls
        for cls in vars(sys.modules["nbdwire.errors"]).values()
        if isinstance(cls, type) and issubclass(cls, nbdwire.NBDError)
    ]
    assert len({cls.code for cls in errors}) == len(errors)
    text = sys.modules["nbdwire.errors"].__doc__ or ""
    for cls in errors:
        assert cls.__name__ in text
