"""The package's face: every public name is there, and importing it is light."""

import subprocess
import sys

import pytest

import safebridge
import safebridge.models


@pytest.mark.parametrize("face", [safebridge, safebridge.models])
def test_every_public_name_is_there(face: object) -> None:
    assert set(face.__all__) <= set(dir(face))
    for name in face.__all__:
        assert getattr(face, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, safebridge, safebridge.models, safebridge.testing;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'PIL', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
