"""SODA Convert and SODA Transport on ComfyUI's own models and loaders."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_train import LoraModelLoader
from safetensors import safe_open
from small_models import adapter, load, small_model, weights
from soda_pack.nodes.convert import SodaConvert, SodaTransport
from soda_pack.soda.adapter import Adapter, Layer
from soda_pack.soda.decomposition import decompose, spectral_change
from soda_pack.soda.errors import SodaError
from soda_pack.soda.fingerprint import sketch
from soda_pack.soda.hosts.comfy.base import layer_weight
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.targets import attention_weights


def run(node, **inputs):
    cls = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        return cls.execute(**inputs).args


def sketched(one: Adapter, model) -> Adapter:
    """The adapter as trained on this model."""
    layers = {}
    for name, (term,) in one.layers.items():
        w = layer_weight(model, name).float()
        change = spectral_change(decompose(w, term.decomposition), term.delta, w)
        layers[name] = (Layer(term.decomposition, term.delta, term.logs, sketch(change)),)
    return Adapter(layers, {**one.metadata, "soda.base_model": "first"}, one.name)


def neighbour(noise: float):
    """A fine-tune of `small_model()`, by random steps of this relative size."""
    model, other = small_model(), small_model(seed=9)
    with torch.inference_mode():
        for p, q in zip(model.model.parameters(), other.model.parameters(), strict=True):
            p.data.add_(noise * q.data)
    return model


def computed(model) -> dict:
    load(model)
    result = weights(model)
    model.unpatch_model()
    return result


@pytest.mark.parametrize(
    ("to", "tolerance"), [({"to": "full difference"}, 2e-3), ({"to": "LoRA", "rank": 64}, 4e-3)], ids=["diff", "lora"]
)
def test_what_is_saved_does_what_the_adapter_does(output, to, tolerance):
    """Rank 64 is the full rank here; fp16 is what is lost."""
    model = small_model()
    one = adapter(model)
    on_top, _, _ = apply(model, [(adapter(model, 7), 1.0)])  # patches on the model do not count
    (lora,) = run(SodaConvert, model=on_top, adapter=one, to=to, filename_prefix="x/mine")
    (path,) = (output / "loras" / "x").iterdir()
    assert path.name == "mine_00001_.safetensors"
    expected = computed(apply(model, [(one, 1.0)])[0])
    got = computed(LoraModelLoader.execute(model, lora, 1.0).args[0])
    base = computed(model)
    for key in attention_weights(model).values():
        assert not torch.equal(got[key], base[key])
        assert (got[key] - expected[key]).abs().max() < tolerance * expected[key].abs().max(), key


def test_a_lora_of_low_rank_says_what_it_keeps(output):
    model = small_model()
    run(SodaConvert, model=model, adapter=adapter(model), to={"to": "LoRA", "rank": 2}, filename_prefix="low")
    with safe_open(output / "loras" / "low_00001_.safetensors", "pt") as file:
        metadata, up = file.metadata(), next(key for key in file.keys() if key.endswith("lora_up.weight"))  # noqa: SIM118
        assert file.get_tensor(up).shape[1] == 2
    assert metadata["ss_network_dim"] == "2" and '"energy_kept": 0.' in metadata["soda.export"]


def test_one_by_one_convolutions_keep_their_shape(output):
    model = small_model()
    key = "diffusion_model.input_blocks.1.1.proj_in"
    shape = model.model_state_dict()[f"{key}.weight"].shape
    assert len(shape) == 4
    one = Adapter({key: (Layer("none", None, (torch.randn(shape[1] * (shape[1] - 1) // 2) * 0.1,)),)}, {}, "conv")
    (lora,) = run(SodaConvert, model=model, adapter=one, to={"to": "full difference"}, filename_prefix="conv")
    (diff,) = lora.values()
    assert diff.shape == shape
    expected = computed(apply(model, [(one, 1.0)])[0])[f"{key}.weight"]
    got = computed(comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0])[f"{key}.weight"]
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("decomposition", ["lq", "svd"])
def test_transport_brings_a_refused_spectrum_back(decomposition):
    """On a base too far away Loader leaves the spectrum out; the transported adapter comes with one that is near."""
    first, second = small_model(), neighbour(0.3)
    one = sketched(adapter(first, decomposition=decomposition), first)
    rotated, _, report = apply(second, [(one, 1.0)])
    assert "only its rotation" in report.text() and "SODA Transport" in report.text()
    (moved,) = run(SodaTransport, model=first, new_model=second, adapter=one)
    patched, _, report = apply(second, [(moved, 1.0)])
    assert not report.warnings
    key = next(iter(attention_weights(first).values()))
    name = key.removesuffix(".weight")
    (term,) = one.layers[name]
    wanted = spectral_change(decompose(layer_weight(first, name), decomposition), term.delta, layer_weight(first, name))
    plain = Adapter({name: (Layer("none", None, term.logs),)}, {}, "rotation")
    exact = apply(_with(second, key, wanted), [(plain, 1.0)])[0]
    exact_weight = computed(exact)[key]
    errors = [(computed(model)[key] - exact_weight).norm() for model in (patched, rotated)]
    kept = float(moved.layers[name][0].delta.square().sum() / term.delta.square().sum())
    assert float(errors[0] / errors[1]) ** 2 == pytest.approx(1 - kept, rel=0.02) and kept > 0.1


def _with(model, key, change):
    """A copy of the small model with `change` added to one weight."""
    copy = neighbour(0.3)
    with torch.inference_mode():
        dict(copy.model.named_parameters())[key].data.add_(change)
    return copy


def test_the_wrong_original_and_another_architecture_are_named(output):
    first, far, wide = small_model(), neighbour(3.0), small_model(width=64)
    one = sketched(adapter(first), first)
    with pytest.raises(SodaError, match="trained on other weights .first."):
        run(SodaTransport, model=far, new_model=first, adapter=one)
    with pytest.raises(SodaError, match="trained on other weights .first."):
        run(SodaConvert, model=far, adapter=one, to={"to": "LoRA", "rank": 4}, filename_prefix="x")
    with pytest.raises(SodaError, match="does not fit"):
        run(SodaTransport, model=first, new_model=wide, adapter=one)
    with pytest.raises(SodaError, match="SD15 has no weight for the adapter's layer 'diffusion_model.absent'"):
        absent = Adapter({"diffusion_model.absent": next(iter(one.layers.values()))}, {}, "x")
        run(SodaConvert, model=first, adapter=absent, to={"to": "LoRA", "rank": 4}, filename_prefix="x")
    assert not list((output / "loras").rglob("*.safetensors"))
