"""Test that datasets of a Hub on loopback are read where they lie, in parts and without a copy."""

import json

import pytest

from tests.data.test_shards import write_parquet, write_shards
from tests.hub.clients import python
from tests.hub.hub_server import Hub, Repository

CODE = """
import json
import torch
from hf_accel.data import AUGMENTATIONS, TrainSampler, load_sources, train_loader

def describe(data):
    train, test = load_sources(data, streaming=True)
    sampler = TrainSampler(len(train), 4, seed=3, last_step=4, shards=train.shards)
    loader = train_loader(train, sampler, AUGMENTATIONS["moco"], lambda step: 16, num_workers=2, seed=3)
    index = torch.cat([batch["index"] for batch in loader]).tolist()
    images = [train.open(i).fp.getvalue().hex() for i in range(len(train))]
    return {"labels": train.labels.tolist(), "test": len(test), "index": index, "images": images, "bad": len(train.bad)}

def error_of(data):
    try:
        load_sources(data, streaming=True)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

if __name__ == "__main__":
    found = {name: describe(name) for name in ("ann/photos", "ann/tars")}
    found["file"] = describe("hf://datasets/ann/photos")
    found["here"], found["tables"], found["empty"] = describe("set"), error_of("ann/tables"), error_of("ann/empty")
    found["missing"] = error_of("ann/missing")
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_datasets_on_the_hub_are_read_in_parts_of_their_files(tmp_path):
    for split, count in (("train", 16), ("test", 3)):
        write_parquet(tmp_path / "set", count, split=split)
        write_shards(tmp_path / "tars", count, split=split)
    with Hub() as hub:
        for name, folder in {"ann/photos": "set", "ann/tars": "tars"}.items():
            files = {f"data/{file.name}": file.read_bytes() for file in (tmp_path / folder).iterdir()}
            hub.repositories[name] = Repository(name == "ann/photos", files, set(files))
        hub.repositories["ann/tables"] = Repository(False, {"train.csv": b"a,b\n1,2\n"})
        hub.repositories["ann/empty"] = Repository(False, {"README.md": b"# Nothing\n"})
        found = json.loads(python(hub.url, CODE, tmp_path, HF_DATASETS_OFFLINE="0").splitlines()[-1])
    here = found["here"]
    assert here["labels"] == [number % 3 for number in range(16)] and here["test"] == 3 and not here["bad"]
    assert found["ann/photos"] == here == found["file"]
    assert found["ann/tars"]["images"] == here["images"] and found["ann/tars"]["labels"] == here["labels"]
    assert {name.rpartition(".")[2] for name in hub.parts} == {"parquet", "tar"}
    copies = [path for path in (tmp_path / "elsewhere").rglob("*") if path.suffix in (".parquet", ".tar")]
    assert not copies
    nothing = "streaming reads Parquet files, or .tar files in the layout of webdataset, and there are none"
    assert found["tables"].startswith(f"ValueError: {nothing}") and "(ann/tables is of the kind csv)" in found["tables"]
    assert found["empty"].startswith("FileNotFoundError: no such folder, and as a Hub id it cannot be opened")
    assert found["missing"].startswith("FileNotFoundError: no such folder, and as a Hub id it cannot be opened")
