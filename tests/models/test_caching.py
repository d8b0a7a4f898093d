"""Test cached tensors: their limit, their lifetime, copies of models, and real tensors after an export."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.export import Dim, export

from hf_accel.models import caching_accel_vit
from hf_accel.models.caching_accel_vit import TensorCache
from hf_accel.models.shortening_accel_vit import resize_patch_kernel, sincos_waves
from tests.models.tiny import tiny


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache, computed = TensorCache(max_bytes=3 * 40), []

    def get(number: int) -> torch.Tensor:
        def compute() -> torch.Tensor:
            computed.append(number)
            return torch.full((10,), float(number))

        return cache.get(number, compute)

    for number in (0, 1, 2, 0, 3, 0, 2):
        assert torch.equal(get(number), torch.full((10,), float(number)))
    assert computed == [0, 1, 2, 3] and cache.num_bytes == 3 * 40
    get(1)
    assert computed == [0, 1, 2, 3, 1] and [*cache.tensors] == [0, 2, 1]


def test_a_tensor_beyond_the_bytes_is_not_kept() -> None:
    cache = TensorCache(max_bytes=40)
    small = cache.get("small", lambda: torch.zeros(10))
    assert cache.get("large", lambda: torch.ones(11)).sum() == 11
    assert [*cache.tensors] == ["small"] and cache.get("small", lambda: torch.ones(10)) is small


def test_a_copy_of_a_cache_is_empty() -> None:
    cache = TensorCache(max_bytes=40)
    cache.get(0, lambda: torch.zeros(10))
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.max_bytes == 40 and not other.tensors and cache.num_bytes == 40


def test_positions_of_many_image_sizes_stay_within_their_bytes() -> None:
    model = tiny()
    cache = model.embeddings.position_tables
    cache.max_bytes = 3 * 64 * 16 * 4
    for height in range(1, 9):
        for width in range(1, 9):
            model.embeddings(torch.zeros(1, 3, 8 * height, 8 * width), 8)
    assert 0 < cache.num_bytes <= cache.max_bytes
    kept = cache.tensors[next(reversed(cache.tensors))]
    assert model.embeddings.patch_positions(8, 8, like=torch.zeros(1)) is kept


def test_positions_go_with_the_model() -> None:
    model = tiny()
    model(torch.zeros(1, 3, 32, 32))
    (table,) = (weakref.ref(tensor) for tensor in model.embeddings.position_tables.tensors.values())
    assert not copy.deepcopy(model).embeddings.position_tables.tensors
    del model
    gc.collect()
    assert table() is None


def test_tables_of_the_process_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    class Noted(TensorCache):
        def __init__(self, max_bytes: int):
            super().__init__(max_bytes)
            caches.append(self)

    monkeypatch.setattr(caching_accel_vit, "TensorCache", Noted)

    def noise_table(size: int) -> torch.Tensor:
        return torch.zeros(size, 1024, dtype=torch.float64)

    table = caching_accel_vit.cached_table(lambda size: (size, 1024))(noise_table)
    for size in range(1, 201):
        assert table(size, device=torch.device("cpu"), dtype=torch.float32).shape == (size, 1024)
    assert 0 < caches[0].num_bytes <= caching_accel_vit.TABLE_BYTES < 200 * 201 / 2 * 4096


@pytest.mark.parametrize("kind", ["sincos", "learned"])
@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_graph_needs_no_operator_of_ours(kind: str, patch_size: int, dynamic: bool) -> None:
    """ONNX, or a process without this package, could not run it otherwise. Dynamic sides work at other sizes, too."""
    torch.manual_seed(0)
    model = tiny(position_embedding_type=kind, default_patch_size=patch_size)
    images = torch.randn(2, 3, 32, 32)
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, None, None) if dynamic else None
    program = export(model, (images, None, 0.0), dynamic_shapes=shapes, strict=False)
    assert not [node.target for node in program.graph.nodes if "accel_vit" in str(node.target)]
    for size in [(32, 32), (48, 64)] if dynamic else [(32, 32)]:
        images = torch.randn(2, 3, *size)
        expected = model(images).last_hidden_state
        output = program.module()(images, None, 0.0).last_hidden_state
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_an_export_leaves_real_tables_behind() -> None:
    """An export traces with fake tensors. No other test uses the sizes here."""
    model = tiny(patch_size=11, image_size=33)
    images = torch.randn(1, 3, 38, 57)
    export(model, (images, 19), strict=False)
    assert type(resize_patch_kernel(model.embeddings.patch_embeddings.projection.weight, 19)) is torch.Tensor
    assert type(sincos_waves(3, 2, 8, device=torch.device("cpu"), dtype=torch.float32)) is torch.Tensor
    assert model(images, 19).last_hidden_state.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter warns about its own tree specs
@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_onnx_at_a_patch_size_given_at_load_time(kind: str, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = tiny(position_embedding_type=kind, default_patch_size=16)
    images = torch.randn(2, 3, 48, 48)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    output = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    torch.testing.assert_close(torch.tensor(output), model(images).last_hidden_state, rtol=0, atol=1e-4)
