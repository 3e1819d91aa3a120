"""Python in README and docs: it compiles, and its imports, names and arguments exist. README's runs on a real server."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.prediction import Prediction
from tests.clients.conftest import slide_path  # noqa: F401  (a fixture)
from tests.docs.markdown_pages import PAGES, ROOT, Code, Page
from tests.serving.conftest import launching
from tests.serving.public_model import SPEC, make_public

# What a block takes for granted: the sentence before it says what it is.
GIVEN = {
    "KEY",
    "goes_on",
    "tiles",
    "image_id",
    "row",
    "options",
    "plan",
    "out",
    "data",
    "scores",
    "images_NHWC",
}


def python_blocks(page: Page) -> Iterator[Code]:
    for block in page.blocks:
        if block.language == "python" or (not block.language and block.text.startswith(("from ", "import "))):
            yield block


def problems_of(code: str) -> list[str]:
    """Imports that fail, names that nothing defines, arguments that an imported function does not take."""
    tree = ast.parse(code)
    known: dict[str, object] = {}
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                alias.asname or alias.name.split(".")[0]: importlib.import_module(alias.name)
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name) and not _is_submodule(node.module, alias.name):
                    problems.append(f"{node.module} has no {alias.name}")
                known[alias.asname or alias.name] = getattr(module, alias.name, None)
    stored = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Name)
            and node.id not in {*known, *stored, *GIVEN}
            and not hasattr(builtins, node.id)
        ):
            problems.append(f"nothing defines {node.id}")
        if isinstance(node, ast.Call):
            problems += _misfit(node, known)
    return problems


def _is_submodule(package: str | None, name: str) -> bool:
    try:
        importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def _misfit(call: ast.Call, known: dict[str, object]) -> list[str]:
    """Arguments of `function(...)` and `module.function(...)` that its signature has no place for."""
    path = ast.unparse(call.func).split(".")
    if path[0] not in known:
        return []
    function = known[path[0]]
    for name in path[1:]:
        if not hasattr(function, name):
            return [f"there is no {'.'.join(path)}"]
        function = getattr(function, name)
    try:
        signature = inspect.signature(function)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    try:
        signature.bind(*call.args, **keywords)
    except TypeError as error:
        return [f"{'.'.join(path)}: {error}"]
    return []


BLOCKS = [(path, block) for path in PAGES for block in python_blocks(Page(path))]


@pytest.mark.parametrize(
    ("path", "block"), BLOCKS, ids=[f"{path.name}:{block.line}" for path, block in BLOCKS]
)
def test_a_block_fits_the_code(path: Path, block: Code) -> None:
    assert problems_of(block.text) == [], f"{path.name}:{block.line}"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("from clients import SlideClients", "clients has no SlideClients"),
        ("from clients import SlideClient\nSlideClient('x', speed=1)", "unexpected keyword argument 'speed'"),
        ("from training.mil import checkpoint\ncheckpoint.loads('x')", "there is no checkpoint.loads"),
        ("print(result)", "nothing defines result"),
    ],
)
def test_a_block_that_does_not_fit_is_found(code: str, says: str) -> None:
    assert says in "".join(problems_of(code))


def make_classifier(repository: Path) -> Path:
    """`make_public` with the outputs that a client of ours asks for."""
    make_public(repository)
    probabilities = 'output { name: "probabilities" data_type: TYPE_FP32 dims: [ 2 ] }'
    more = (
        ' output { name: "confidence" data_type: TYPE_FP32 dims: [ 1 ] }'
        ' output { name: "label_index" data_type: TYPE_INT64 dims: [ 1 ] }'
    )
    mapped = "".join(
        f' output_map {{ key: "{name}" value: "{name}" }}' for name in ("confidence", "label_index")
    )
    answers = (
        'pb_utils.Tensor("probabilities", out), pb_utils.Tensor("confidence", out.max(1, keepdims=True)), '
        'pb_utils.Tensor("label_index", out.argmax(1, keepdims=True).astype(np.int64))'
    )
    for path, before, after in (
        (repository / "steady" / "config.pbtxt", probabilities, probabilities + more),
        (repository / "tile_classifier" / "config.pbtxt", probabilities, probabilities + more),
        (
            repository / "tile_classifier" / "config.pbtxt",
            'value: "probabilities" }',
            f'value: "probabilities" }}{mapped}',
        ),
        (repository / "steady" / "1" / "model.py", 'pb_utils.Tensor("probabilities", out)', answers),
    ):
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
    return repository


def test_readme_block_runs(slide_path: Path, tmp_path: Path) -> None:  # noqa: F811
    """README's first Python, as it stands, on a real server; only the address and the slide are others."""
    block = next(python_blocks(Page(ROOT / "README.md")))
    with launching() as launch:
        address = launch(make_classifier(tmp_path / "models")).ready()["http"]
        code = block.text.replace("localhost:8000", address).replace("slide.tif", str(slide_path))
        assert code.count(address) == code.count(str(slide_path)) == 1
        names: dict[str, object] = {}
        exec(code, names)  # noqa: S102
    prediction = names["prediction"]
    assert isinstance(prediction, Prediction)
    assert prediction.label in SPEC.class_names
