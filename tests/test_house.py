"""The floors of the house, read from the syntax trees: who may import whom, and where certain words may stand."""

import ast
import itertools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pixseq"
FILES = sorted(PACKAGE.rglob("*.py"))
# Highest last. A file imports from lower floors or its own room; rooms of one floor do not know each other.
FLOORS = [
    ("choices", "cores", "errors", "streams", "text"),
    ("numerics", "progress", "signals"),
    ("bounded", "native"),
    ("presets", "schema"),
    ("config",),
    ("models", "artifacts", "data", "interop", "runtime"),
    ("engine", "drawing"),
    ("stages",),
    ("studies", "bench"),
    ("cli",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_or_stay_in_the_room(path):
    ours = room(module_of(path))
    for name in imports(ast.parse(path.read_text())):
        if not name.startswith("pixseq."):
            continue
        theirs = room(name)
        if theirs == "__version__" or (theirs == ours != "stages"):  # a stage imports no stage
            continue
        assert FLOOR[theirs] < FLOOR[ours], f"{path.name} imports {name}"


def calls(tree: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name for n in ast.walk(tree))


def uses(tree: ast.AST, dotted: str) -> bool:
    return any(isinstance(n, ast.Attribute) and ast.unparse(n) == dotted for n in ast.walk(tree))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_words_stand_where_they_belong(path):
    tree, ours = ast.parse(path.read_text()), room(module_of(path))
    names = set(imports(tree))
    if ours not in ("cli", "progress"):
        assert not calls(tree, "print")
    if ours != "runtime":
        assert not any(n.startswith("torch.distributed") for n in names)
        assert not uses(tree, "torch.distributed") and not uses(tree, "torch.compile")
    if ours not in ("artifacts", "interop"):
        assert not any(n.split(".")[0] == "zarr" for n in names)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert ast.unparse(node.value) == "True"
    assert "yaml.load(" not in path.read_text()


@pytest.mark.parametrize("path", [p for p in FILES if room(module_of(p)) == "cli"], ids=lambda p: p.name)
def test_the_command_line_imports_nothing_heavy(path):
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = {"torch", "numpy", "zarr", "sklearn", "scipy", "PIL"}
    for name in imports(ast.Module(top, [])):
        assert name.split(".")[0] not in heavy
        if name.startswith("pixseq."):
            assert room(name) in ("cli", "choices", "errors", "progress", "signals", "text", "__version__")


# Where a stage may ask: what it makes or lays out is of one family by its nature.
ASKED = {
    "stages/exporting.py": {"shape.family != 'igpt'"},  # the form of transformers' Image GPT
    "studies/ladder.py": {"shapes.family == 'igpt'"},  # the ladder of shapes of a study
}


@pytest.mark.parametrize(
    "path", [p for p in FILES if room(module_of(p)) in ("engine", "stages", "studies")], ids=lambda p: p.name
)
def test_stages_do_not_ask_for_the_family(path):
    """They talk to a model through models/family.py, so that a new family needs no stage to know it."""
    tree = ast.parse(path.read_text())
    of_one = ("pixseq.models.igpt", "pixseq.models.aim")  # and their checks
    assert not [name for name in imports(tree) if name.startswith(of_one)]
    asked = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare | ast.Match)
        and any(isinstance(n, ast.Attribute) and n.attr in ("family", "objective") for n in ast.walk(node))
    }
    assert asked == ASKED.get(path.relative_to(PACKAGE).as_posix(), set())


PASTED = re.compile(r"(pixseq [a-z ]+|rm -r| -o| --from| --split) $")  # what a path follows in a command


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_paths_in_commands_to_paste_are_quoted(path):
    """A hint that is a command works as it stands, also for a path with blanks."""
    for text in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)):
        for before, value in itertools.pairwise(text.values):
            if isinstance(before, ast.Constant) and PASTED.search(before.value):
                assert calls(value, "word"), ast.unparse(text)


def own_nodes(function: ast.FunctionDef):
    """The nodes of a function, without those of functions inside it."""
    inside = list(function.body)
    while inside:
        node = inside.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            inside += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_generator_waits_for_its_threads(path):
    """One that is left ends where garbage is collected, perhaps in such a thread, which would wait for itself.

    What a `with` closes is no garbage: context managers, and what stands in contextlib.closing.
    """
    tree = ast.parse(path.read_text())
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        nodes = list(own_nodes(function))
        if function.decorator_list or not any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes):
            continue
        held = [each for node in nodes if isinstance(node, ast.With) for each in node.items]
        waits = any(calls(each, name) for each in held for name in ("threads", "ThreadPoolExecutor"))
        waits = waits or any("progress.track(" in ast.unparse(each) for each in held)
        assert not waits or (path.name, function.name) == ("encode.py", "_ahead"), function.name
