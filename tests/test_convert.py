"""Weights to and from PyTorch, and what a bad file says."""

import json
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from make_golden import draw_batch, draw_weights

import mindspore as ms
from mindspore import Tensor

from ms_diffusion import files
from ms_diffusion.convert import load_into, load_torch_state_dict, save_torch_state_dict
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.runtime import UserError, compiled


def small_unet(seed=0):
    return UnetConfig(dim=8, dim_mults=(1,)).build(seed)


def values(net) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy() for p in net.get_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def test_safetensors_round_trip_without_torch(tmp_path, without_torch):
    net, other = small_unet(0), small_unet(1)
    save_torch_state_dict(net, tmp_path / "net.safetensors")
    load_into(other, load_torch_state_dict(tmp_path / "net.safetensors"))
    assert_same(values(other), values(net))


def test_pytorch_loads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from benchmarks.torch_peer import Unet as Twin

    net, twin = small_unet(), Twin(8, dim_mults=(1,))
    save_torch_state_dict(net, str(tmp_path / "net.safetensors"))
    twin.load_state_dict(load_file(tmp_path / "net.safetensors"))
    x, t, _ = draw_batch(2, 8)
    with torch.no_grad():
        expected = twin(torch.from_numpy(x), torch.from_numpy(t).float()).numpy()
    np.testing.assert_allclose(net(Tensor(x), Tensor(t)).asnumpy(), expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_we_load_what_pytorch_writes(tmp_path, suffix, key):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_peer import Unet as Twin

    state = Twin(8, dim_mults=(1,)).state_dict()
    path = tmp_path / f"net{suffix}"
    torch.save(state if key is None else {key: state, "epoch": 3}, path)
    net = small_unet()
    load_into(net, load_torch_state_dict(path))
    assert_same(values(net), {name: value.numpy() for name, value in state.items()})


def shards(folder, stem="diffusion_pytorch_model", index=None):
    """Three arrays in two files and their index, as diffusers and transformers write them."""
    arrays = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abc")}
    names = {"a": f"{stem}-00001-of-00002.safetensors", "b": f"{stem}-00002-of-00002.safetensors"}
    names["c"] = names["a"]
    for file in set(names.values()):
        part = {name: arrays[name] for name in arrays if names[name] == file}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
    (folder / (index or f"{stem}.safetensors.index.json")).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return arrays


def test_several_files_with_an_index(tmp_path, without_torch):
    arrays = shards(tmp_path)
    assert_same(load_torch_state_dict(tmp_path / "diffusion_pytorch_model.safetensors.index.json"), arrays)
    assert_same(load_torch_state_dict(tmp_path), arrays)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "00002-of-00002.safetensors: no such file" in complaint(load_torch_state_dict, tmp_path)
    safetensors.numpy.save_file({"other": arrays["a"]}, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    assert "lacks b" in complaint(load_torch_state_dict, tmp_path)
    safetensors.numpy.save_file({"whole": arrays["b"]}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(load_torch_state_dict(tmp_path)) == ["whole"]  # before several


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "3", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', "[" * 10**5]
    + [f'{{"weight_map": {{"a": "{name}"}}}}' for name in ("../x.bin", "/x.bin", "x.pt", "", "..", ".bin", "x\\n.bin")],
)
def test_a_damaged_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "not the index" in complaint(load_torch_state_dict, tmp_path)


def test_variants_in_a_folder(tmp_path, without_torch):
    """No variant first; fp16 if there is nothing else, in one file or several."""
    (tmp_path / "model.bin").write_bytes(b"PK")
    assert "needs PyTorch" in complaint(load_torch_state_dict, tmp_path)
    arrays = shards(tmp_path, "model.fp16", "model.safetensors.index.fp16.json")
    assert_same(load_torch_state_dict(tmp_path), arrays)
    for name in ("model.fp16", "model"):
        half = {name: np.full(3, 0.5, np.float16)}
        safetensors.numpy.save_file(half, tmp_path / f"{name}.safetensors")
        found = load_torch_state_dict(tmp_path)
        assert list(found) == [name] and found[name].dtype == np.float32 and (found[name] == 0.5).all()
    both = tmp_path / "both"
    for name in ("unet", "vae", "scheduler"):
        (both / name).mkdir(parents=True)
    shards(both / "unet", "model")
    safetensors.numpy.save_file({"x": np.ones(2)}, both / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert set(load_torch_state_dict(both)) == {"unet.a", "unet.b", "unet.c", "vae.x"}


def test_what_lies_beside_the_weights_is_left_out(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for key in ("state_dict", "model", "weights"):
        content = {key: layer.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "losses": [1.0]}
        content |= {"optimizer_states": [optimizer.state_dict()], "epoch": torch.tensor(3)} if key == "state_dict" else {}
        torch.save(content, tmp_path / "net.pt")
        begin = "weights." if key == "weights" else ""
        assert set(load_torch_state_dict(tmp_path / "net.pt")) == {f"{begin}weight", f"{begin}bias"}
    itself = {"a": torch.ones(2)}
    itself["again"] = itself
    torch.save(itself, tmp_path / "net.pt")
    assert "again.again.a" in load_torch_state_dict(tmp_path / "net.pt")
    torch.save({"shadow_params": [torch.ones(2)], "decay": 0.9}, tmp_path / "net.pt")
    assert "shadow_params" in complaint(load_torch_state_dict, tmp_path / "net.pt")


def test_half_precision_is_read_as_float32(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    exact = torch.tensor([[1.5, -0.25, 96.0]])
    state = {"half": exact.half(), "bfloat": exact.bfloat16(), "steps": torch.tensor(7)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        arrays = load_torch_state_dict(tmp_path / name)
        for key in ("half", "bfloat"):
            assert arrays[key].dtype == np.float32
            np.testing.assert_array_equal(arrays[key], exact.numpy())
        assert arrays["steps"] == 7


def test_float16_halves_the_file_and_rounds_the_values(tmp_path):
    net, other = small_unet(0), small_unet(1)
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    save_torch_state_dict(net, full)
    save_torch_state_dict(net, half, np.float16)
    count = sum(value.size for value in values(net).values())
    assert full.stat().st_size - half.stat().st_size == pytest.approx(2 * count, abs=2000)  # the headers differ a little
    assert {a.dtype for a in safetensors.numpy.load_file(half).values()} == {np.dtype(np.float16)}
    rounded = {name: value.astype(np.float16).astype(np.float32) for name, value in values(net).items()}
    assert any((rounded[name] != value).any() for name, value in values(net).items())
    arrays = load_torch_state_dict(half)
    assert_same(arrays, rounded)
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    load_into(other, arrays)
    assert_same(values(other), rounded)


def test_loading_reaches_the_compiled_graph():
    net, other = small_unet(0), small_unet(1)
    x, t, _ = map(Tensor, draw_batch(1, 8))
    forward = compiled(function_of(net))
    before = forward(x, t).asnumpy()
    for weights in (values(other), draw_weights({name: v.shape for name, v in values(other).items()})):
        load_into(net, weights)
        load_into(other.get_parameters(), weights)
        after = forward(x, t).asnumpy()
        np.testing.assert_allclose(after, other(x, t).asnumpy(), atol=1e-5)
        assert abs(after - before).max() > 1e-3
        assert_same(values(net), weights)


def function_of(net):
    def forward(x, t):
        return net(x, t)

    return forward


def test_loading_some_parameters_keeps_their_type():
    step = ms.Parameter(Tensor([0], ms.int32), name="step")
    mean = ms.Parameter(Tensor([0.0], ms.float32), name="mean")
    load_into([step, mean], {"step": np.array([7]), "mean": np.array([0.5])})
    assert (step.dtype, step.asnumpy().tolist()) == (ms.int32, [7])
    assert (mean.dtype, mean.asnumpy().tolist()) == (ms.float32, [0.5])


# Errors: one line, what is wrong, what to do


def complaint(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_and_shapes_are_strict():
    net = small_unet()
    before, weights = values(net), values(small_unet(1))
    weights["init_conv.bias"] = weights["init_conv.bias"][None]
    del weights["init_conv.weight"]
    weights["module.weight"] = np.zeros(3, np.float32)
    message = complaint(load_into, net, weights)
    assert "missing: init_conv.weight;" in message
    assert "unexpected: module.weight;" in message
    assert "init_conv.bias (1, 4) instead of (4,)" in message
    assert_same(values(net), before)  # nothing was half loaded


def test_the_message_ends_with_advice():
    net, weights = small_unet(), {"weight": np.zeros(3)}
    assert complaint(load_into, net, weights).endswith("): build it with the options of the saved network")
    before = values(net)
    assert complaint(load_into, net, weights, "give others").endswith("): give others")
    assert complaint(load_into, net.get_parameters(), weights, "give others").endswith("): give others")
    assert_same(values(net), before)


def test_few_names_are_listed():
    message = complaint(load_into, small_unet(), {})
    assert f"and {len(values(small_unet())) - 4} more" in message
    assert len(message) < 400


def test_missing_file_and_unknown_kind(tmp_path):
    assert "no such file" in complaint(load_torch_state_dict, tmp_path / "none.pt")
    assert "contains no weights" in complaint(load_torch_state_dict, tmp_path)
    (tmp_path / "net.h5").write_bytes(b"")
    assert ".safetensors" in complaint(load_torch_state_dict, tmp_path / "net.h5")
    assert ".safetensors" in complaint(save_torch_state_dict, small_unet(), tmp_path / "net.pt")


def test_damaged_safetensors(tmp_path):
    whole = safetensors.numpy.save({"a": np.arange(100.0)})
    path = tmp_path / "net.safetensors"
    for data in (whole[:-8], whole[:20], b"", b"<html>not found</html>", whole + b"\0"):
        path.write_bytes(data)
        assert "not a complete .safetensors file" in complaint(load_torch_state_dict, path)


def test_unsupported_number_type_in_safetensors(tmp_path):
    path = tmp_path / "net.safetensors"
    header = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert "a has the unsupported type F8_E4M3" in complaint(load_torch_state_dict, path)


def with_header(header: bytes, data: bytes = bytes(8)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


ENTRY = '{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}}'


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        (10**8).to_bytes(8, "little") + b"{}",
        with_header(b"[" * 100_000),
        with_header(b"\xff\xfe"),
        with_header(b"null"),
        *(
            with_header((ENTRY % values).encode())
            for values in (
                ("F32", "[2]", "[0,9]"),
                ("F32", "[2]", "[8,0]"),
                ("F32", "[2]", "[-8,0]"),
                ("F32", "[3]", "[0,8]"),
                ("F32", "[-2]", "[0,8]"),
                ("F32", "2", "[0,8]"),
                ("F32", "[4294967296,4294967296]", "[0,8]"),
                ("F32", "[99999999999999999999]", "[0,8]"),
                ("float32", "[2]", "[0,8]"),
                ("F32", "[2" + ",1" * 99 + "]", "[0,8]"),
            )
        ),
        with_header((ENTRY % ("F32", "[0,4611686018427387904]", "[0,0]")).encode(), b""),
    ],
)
def test_safetensors_that_lie_are_refused(tmp_path, content):
    (tmp_path / "net.safetensors").write_bytes(content)
    complaint(load_torch_state_dict, tmp_path / "net.safetensors")


def test_weights_that_do_not_fit_in_memory(tmp_path, monkeypatch):
    net = small_unet()
    path = tmp_path / "net.safetensors"
    save_torch_state_dict(net, path)
    monkeypatch.setattr(files, "available_memory", lambda: path.stat().st_size // 2)
    assert "memory" in complaint(load_torch_state_dict, path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(bad):
    """Also those that are too large for float32."""
    net = small_unet()
    before, weights = values(net), {name: value.astype(np.float64) for name, value in values(small_unet(1)).items()}
    weights["init_conv.bias"][1] = bad
    message = complaint(load_into, net, weights, "", "a.pt")
    assert message.startswith("a.pt: ") and "init_conv.bias" in message
    assert_same(values(net), before)


def odd_tensors(torch):
    x = torch.ones(2, 2)
    return {
        "sparse": x.to_sparse(),
        "compressed": x.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "float8": x.to(torch.float8_e4m3fn),
        "complex": x * 1j,
        "conjugate": (x * 1j).conj(),
        "meta": x.to("meta"),
        "huge": torch.ones(1).expand(10**14),
    }


@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_in_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    for name, tensor in odd_tensors(torch).items():
        torch.save({"fine": torch.ones(3), name: tensor}, path)
        assert "net.pt" in complaint(load_torch_state_dict, path), name
    state = {"minus": torch._neg_view(torch.ones(2)), "part": torch.arange(9.0).reshape(3, 3).T[1:], "\n": torch.ones(())}
    torch.save(state, path)
    arrays = load_torch_state_dict(path)
    assert arrays["minus"].tolist() == [-1, -1] and arrays["part"].tolist() == [[1, 4, 7], [2, 5, 8]]
    for content in ({1: torch.ones(2)}, {"state_dict": {"model": 3}}, {"model": {"a": [torch.ones(2)]}}, torch.ones(2)):
        torch.save(content, path)
        assert "no state dict" in complaint(load_torch_state_dict, path)
    torch.save({"state_dict": {"model": {"a": torch.ones(2)}}}, path)
    assert load_torch_state_dict(path)["a"].tolist() == [1, 1]


def test_pytorch_files_that_lie_are_refused(tmp_path):
    """More numbers than there are bytes, which PyTorch itself would read beyond the end; and a bomb."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    torch.save({"a": torch.arange(200.0)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    assert members[pickled].count(b"K\xc8") == 2  # the sizes of the storage and of the array
    for change, compression in ((b"M\x00\x40", zipfile.ZIP_STORED), (b"K\xc8", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content.replace(b"K\xc8", change) if name == pickled else content + bytes(10_000))
        assert "not a complete" in complaint(load_torch_state_dict, path)

    torch.save({"a": torch.arange(200.0)}, path)
    whole = path.read_bytes()
    at = whole.index(np.arange(200.0, dtype=np.float32).tobytes()) + 400
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    assert "not a complete" in complaint(load_torch_state_dict, path)
    torch.save({"a": torch.arange(200.0)}, path, _use_new_zipfile_serialization=False)  # of PyTorch before 1.6
    assert load_torch_state_dict(path)["a"].tolist() == list(range(200))


def test_damaged_pytorch_file(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    torch.save({"a": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    for data in (whole[:-8], whole[:20], b"", b"<html>not found</html>", b"PK\x03\x04"):
        path.write_bytes(data)
        assert "not a complete PyTorch state dict" in complaint(load_torch_state_dict, path)


def test_pytorch_file_without_state_dict(tmp_path):
    torch = pytest.importorskip("torch")
    for content in (3, [torch.zeros(2)], {"epoch": 3, "a": [torch.zeros(2)], 4: torch.zeros(2)}):
        torch.save(content, tmp_path / "net.pt")
        assert "contains no state dict" in complaint(load_torch_state_dict, tmp_path / "net.pt")


def test_a_pickle_cannot_run_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": Creates(tmp_path / "ran")}, tmp_path / "net.pt")
    assert "save only model.state_dict()" in complaint(load_torch_state_dict, tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


class Creates:
    """Its pickle creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_pytorch_file_without_pytorch(tmp_path, without_torch):
    (tmp_path / "net.pt").write_bytes(b"PK")
    assert "needs PyTorch: pip install torch" in complaint(load_torch_state_dict, tmp_path / "net.pt")
