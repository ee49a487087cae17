"""Where an artifact comes from, as far as it is still there."""

import json

from pixseq.artifacts.lineage import lineage
from pixseq.stages import decode, encode, palette, show


def chain(folder):
    palette.run_fit("digits", folder / "p.json", colors=4, size=8)
    encode.run("digits", folder / "t.zarr", palette=folder / "p.json", size=8, limit=20)
    decode.run(folder / "t.zarr", folder / "g.png", count=4)


def test_a_lineage_goes_down_to_the_sources(tmp_path):
    chain(tmp_path)
    grid = lineage(tmp_path / "g.png")
    (tokens,) = grid.parents
    assert (grid.kind, tokens.kind, tokens.role) == ("picture", "tokens", "tokens")
    colours, source = tokens.parents
    assert (colours.kind, source.kind, source.path) == ("palette", "source", "digits")
    assert [parent.kind for parent in colours.parents] == ["source"]
    assert json.loads(json.dumps(grid.to_json()))["parents"][0]["id"] == tokens.id


def test_parents_are_known_by_id_wherever_they_are(tmp_path):
    chain(tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    (tokens,) = lineage(moved / "g.png").parents
    assert tokens.lacking is None and tokens.parents[0].kind == "palette"
    encode.run("digits", moved / "t.zarr", palette=moved / "p.json", size=8, limit=19, overwrite=True)
    (tokens,) = lineage(moved / "g.png").parents
    assert "another one is there now" in tokens.lacking and not tokens.parents
    (moved / "p.json").unlink()
    assert lineage(moved / "t.zarr").parents[0].lacking == "not found"


def test_a_manifest_that_names_itself_ends(tmp_path):
    chain(tmp_path)
    path = tmp_path / "p.json"
    record = json.loads(path.read_text())
    itself = {"path": str(path), "id": record["pixseq"]["id"]}
    record["pixseq"]["inputs"] = {f"role{i}": itself for i in range(30)}
    path.write_text(json.dumps(record))
    assert all(parent.again for parent in lineage(path).parents)


def test_a_parent_without_an_id_is_told(tmp_path):
    chain(tmp_path)
    record = json.loads((tmp_path / "p.json").read_text())
    record["pixseq"]["inputs"] = {"source": {"path": "digits"}}
    (tmp_path / "p.json").write_text(json.dumps(record))
    (source,) = lineage(tmp_path / "p.json").parents
    assert (source.path, source.lacking) == ("digits", "its id is not told")


def test_the_classes_of_a_store_are_counted(tmp_path):
    chain(tmp_path)
    assert show.classes(tmp_path / "t.zarr") == {str(digit): 2 for digit in range(10)}
