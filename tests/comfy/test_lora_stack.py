"""LORA_STACK in and out: what other packs' stack nodes hand over, and what they get."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from small_models import adapter, load, lora, same, small_clip, small_model, weights
from soda_pack.nodes.mix import SodaMix
from soda_pack.nodes.save import SodaSave
from soda_pack.nodes.stack import SodaStack
from soda_pack.soda.adapter import Adapter
from soda_pack.soda.errors import SodaFileError, SodaMixError
from soda_pack.soda.file import save
from soda_pack.soda.hosts.comfy.patch import apply
from soda_pack.soda.hosts.comfy.stock import register
from soda_pack.soda.mixing import mix

from nodes import LoraLoader


def run(node, **inputs):
    cls = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        return cls.execute(**inputs).args


@pytest.fixture
def root(output):
    """output/loras as ComfyUI registers it, with a SODA file and a LoRA."""
    paths = folder_paths.folder_names_and_paths["loras"][0]
    kept, paths[:] = list(paths), [*paths, str(output / "loras")]
    (output / "loras" / "soda").mkdir(parents=True)
    model = small_model()
    save(adapter(model, 1, name="a"), output / "loras" / "soda" / "a.safetensors")
    tensors = {}
    for key, patch in lora(model).items():
        up, down, alpha = patch.weights[:3]
        name = key.removesuffix(".weight")
        tensors |= {f"{name}.lora_up.weight": up.contiguous(), f"{name}.lora_down.weight": down.contiguous(),
                    f"{name}.alpha": torch.tensor(alpha)}  # fmt: skip
    save_file(tensors, output / "loras" / "ordinary.safetensors")
    yield output / "loras"
    paths[:] = kept
    folder_paths.filename_list_cache.pop("loras", None)


def computed(model) -> dict:
    load(model)
    result = weights(model)
    model.unpatch_model()
    return result


def test_soda_files_of_a_stack_join_the_mix_and_loras_go_on_top(root):
    model = small_model()
    wired, filed = adapter(model, 2, name="b"), adapter(model, 1, name="a")
    stack = [("ordinary.safetensors", 0.5, 0.5), ("soda/a.safetensors", 0.75, 0.1), ("None", 1.0, 1.0)]
    patched, _, mixed = run(SodaMix, model=model, row={"row": "none"}, adapters={"adapter0": wired}, lora_stack=stack)
    assert mixed.content_hash == mix([(wired, 1.0), (filed, 0.75)]).content_hash
    tensors = comfy.utils.load_torch_file(str(root / "ordinary.safetensors"))
    expected, _ = comfy.sd.load_lora_for_models(apply(model, [(wired, 1.0), (filed, 0.75)])[0], None, tensors, 0.5, 0.5)
    got = computed(patched)
    assert same(got, computed(expected))
    without = run(SodaMix, model=model, row={"row": "none"}, adapters={"adapter0": wired}, lora_stack=stack[1:])
    assert not same(got, computed(without[0]))


def test_the_text_encoder_gets_its_own_strength(root):
    model, clip = small_model(), small_clip()
    name = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    turning = adapter(model, 3, decomposition="none").layers
    terms = next(terms for layer, terms in turning.items() if layer.endswith("attn2.to_k"))  # of the encoder's width
    layers = {**adapter(model, 1).layers, name: terms}
    one = Adapter(layers, {}, "both")
    save(one, root / "soda" / "both.safetensors")
    stack = [("soda/both.safetensors", 0.5, 2.0)]
    _, got, _ = run(SodaMix, model=model, row={"row": "none"}, clip=clip, lora_stack=stack)
    _, expected, _ = apply(model, [(one, 0.5)], clip, [(one, 2.0)])
    after = computed(got.patcher)
    assert same(after, computed(expected.patcher)) and not same(after, computed(clip.patcher))


def test_a_stack_of_loras_alone_and_an_empty_one_pass(root):
    model = small_model()
    patched, _, mixed = run(SodaMix, model=model, row={"row": "none"}, lora_stack=[("ordinary.safetensors", 1.0, 1.0)])
    assert not same(computed(patched), computed(model)) and not mixed.layers
    nothing, _, _ = run(SodaMix, model=model, row={"row": "none"}, lora_stack=[])
    assert same(computed(nothing), computed(model))
    with pytest.raises(SodaFileError, match="no layer"):
        run(SodaSave, adapter=mixed, filename_prefix="x", trigger_words="")


@pytest.mark.parametrize(
    ("stack", "error", "said"),
    [
        ([("absent.safetensors", 1.0, 1.0)], SodaFileError, "'absent.safetensors'.*none of the loras folders"),
        ([("../../secret.safetensors", 1.0, 1.0)], SodaFileError, "none of the loras folders"),
        ([{"name": "x", "lora": {}, "strength": 1.0}], SodaMixError, "holds a dict"),
    ],
)
def test_a_stack_that_cannot_be_loaded_is_refused(root, stack, error, said):
    with pytest.raises(error, match=said):
        run(SodaMix, model=small_model(), row={"row": "none"}, lora_stack=stack)


def test_our_stack_is_what_other_packs_load_one_by_one(root):
    register()
    before = [("ordinary.safetensors", 0.0, 0.0)]
    (stack,) = run(SodaStack, adapter_name="a.safetensors", strength=0.5, strength_clip=1.0, lora_stack=before)
    assert stack == [*before, ("soda/a.safetensors", 0.5, 1.0)] and len(before) == 1
    model = small_model()
    patched = model
    for entry in stack:  # as CR Apply LoRA Stack and LoRA Manager do
        patched, _ = LoraLoader().load_lora(patched, None, *entry)
    here, _, _ = apply(model, [(adapter(model, 1), 0.5)])
    got, expected = computed(patched), computed(here)
    assert all(torch.allclose(got[key], expected[key], atol=1e-5) for key in got)
    assert not same(got, computed(model))


def test_a_file_that_lora_loaders_cannot_see_is_refused_with_the_remedy(root):
    with pytest.raises(SodaFileError, match="outside the loras folders.*copy it to"):
        run(SodaStack, adapter_name="soda_subject.safetensors", strength=1.0, strength_clip=1.0)
