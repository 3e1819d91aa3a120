from __future__ import annotations

import subprocess
import sys

import pytest

import slides


def test_decoding_loads_no_slide_reader() -> None:
    """The server's preprocessing has openslide and tifffile neither at hand nor in memory."""
    code = (
        "import sys; from slides.decode import decode_tile; import slides.spec, slides.errors, slides.aggregate;"
        "from slides import ModelSpec; heavy = {'openslide', 'tifffile', 'torch', 'tqdm'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(getattr(slides, name).__name__ == name for name in slides.__all__)
    assert set(slides.__all__) <= set(dir(slides))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = slides.nonsense
