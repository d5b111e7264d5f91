"""Options, presets and further inputs of SODA Train as nodes in queued workflows."""

import pytest
import safetensors.torch
import torch
from prompts import PIXELS, Playground, Prompt

from runner.client import PromptFailed, Refused

EVERYTHING = {
    "loss": "dco", "loss.beta": 500.0, "min_snr_gamma": 5.0, "timesteps": "logit-normal", "timesteps.mean": 0.3,
    "timesteps.std": 0.8, "caption_dropout": 0.5, "noise_offset": 0.05, "schedule": "linear", "warm_up": 0.2,
    "spectrum_rate": 0.5, "accumulation": 2, "gradient_clip": 0.5, "ema": 0.9, "layers": "*to_[qkv]", "augment": "on",
    "augment.views": 2, "augment.flip": True, "augment.crop": 0.1, "augment.colour": 0.1,
}  # fmt: skip
SINGLY = {
    "dco": {"loss": "dco", "loss.beta": 500.0}, "min_snr_gamma": {"min_snr_gamma": 0.5},
    "uniform": {"timesteps": "uniform"},
    "logit-normal": {"timesteps": "logit-normal", "timesteps.mean": 0.3, "timesteps.std": 0.8},
    "shifted": {"timesteps": "shifted", "timesteps.shift": 3.0}, "caption_dropout": {"caption_dropout": 0.7},
    "noise_offset": {"noise_offset": 0.1}, "linear": {"schedule": "linear"}, "constant": {"schedule": "constant"},
    "warm_up": {"warm_up": 1.0}, "spectrum_rate": {"spectrum_rate": 0.5}, "accumulation": {"accumulation": 2},
    "gradient_clip": {"gradient_clip": 0.01}, "ema": {"ema": 0.9}, "layers": {"layers": "*attn2.to_k"},
}  # fmt: skip
# Views that vary in nothing.
COPIES = {"augment": "on", "augment.views": 2, "augment.flip": False, "augment.crop": 0.0, "augment.colour": 0.0}


def graph() -> tuple[Prompt, Playground]:
    prompt = Prompt()
    return prompt, Playground(prompt)


def saved(client, adapters, prompt, playground, node, prefix) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the tensors of the trained file, what the training node said)."""
    playground.save((node, 0), prefix)
    result = client.run(prompt)
    return safetensors.torch.load_file(max(adapters.glob(f"{prefix}_0*"))), result.texts[node]


def test_all_options_at_once(client, adapters, base_unchanged):
    prompt, playground = graph()
    drawings = prompt.add("SodaPlaygroundDrawings", concept="fip")
    node = playground.train(
        playground.text("sks monster"), images=(drawings, 0), vae=playground.vae, clip=playground.clip,
        options=playground.options(**EVERYTHING),
    )  # fmt: skip
    tensors, texts = saved(client, adapters, prompt, playground, node, "everything")
    assert all(".to_q." in name or ".to_k." in name or ".to_v." in name for name in tensors)
    assert "step 3/3" in texts[-1]


@pytest.fixture(scope="module")
def plain(client, adapters):
    return singly(client, adapters, {})


@pytest.fixture(scope="module")
def copies(client, adapters):
    return singly(client, adapters, COPIES)


def singly(client, adapters, options, **settings) -> dict[str, torch.Tensor]:
    """What a short training on small pictures gives under one option alone; the node itself encodes them."""
    prompt, playground = graph()
    drawings = (prompt.add("SodaPlaygroundDrawings", concept="fip"), 0)
    size = {"width": PIXELS, "height": PIXELS, "upscale_method": "area", "crop": "disabled"}
    images = (prompt.add("ImageScale", image=drawings, **size), 0)
    node = playground.train(
        playground.text("sks monster"), images=images, vae=playground.vae, clip=playground.clip,
        options=playground.options(**options), **{"targets": "cross-attention", **settings},
    )  # fmt: skip
    return saved(client, adapters, prompt, playground, node, "singly")[0]


@pytest.mark.parametrize("name", SINGLY)
def test_each_option_changes_what_is_learnt(client, adapters, plain, name):
    found = singly(client, adapters, SINGLY[name])
    assert any(name not in found or not torch.equal(tensor, found[name]) for name, tensor in plain.items())
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize(("view", "value"), [("flip", True), ("crop", 0.2), ("colour", 0.3)])
def test_each_kind_of_augmentation_changes_what_is_learnt(client, adapters, copies, view, value):
    found = singly(client, adapters, {**COPIES, f"augment.{view}": value})
    assert any(not torch.equal(tensor, copies[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("targets", "part"), [("cross-attention", ".attn2."), ("self-attention", ".attn1.")])
def test_targets_choose_the_layers(client, adapters, targets, part):
    assert all(part in name for name in singly(client, adapters, {}, targets=targets))


def test_options_as_they_stand_change_nothing(client, adapters):
    found = []
    for prefix, wired in (("plain", False), ("wired", True)):
        prompt, playground = graph()
        latents, positive = playground.drawings()
        more = {"options": playground.options()} if wired else {}
        node = playground.train(positive, latents=latents, seed=77, reuse=False, **more)
        found.append(saved(client, adapters, prompt, playground, node, prefix)[0])
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("role", "part", "rate"), [("subject", ".attn2.", "0.00875"), ("style", ".attn1.", "0.05"), ("other", "", "0.01")]
)
def test_role_and_run_is_a_preset(client, adapters, role, part, rate):
    prompt, playground = graph()
    latents, positive = playground.drawings()
    node = playground.train(positive, latents=latents, role=role, targets="auto", learning_rate=0.0)
    tensors, texts = saved(client, adapters, prompt, playground, node, f"preset_{role}")
    assert all(part in name for name in tensors) and f"learning rate {rate}." in texts[-1]


def test_prior_pictures(client, adapters, base_unchanged):
    prompt, playground = graph()
    latents, positive = playground.drawings("fip")
    prior_latents, prior_positive = playground.drawings("comic")
    more = {"prior_latents": prior_latents, "prior_positive": prior_positive}
    node = playground.train(positive, latents=latents, options=playground.options(prior_weight=2.0), **more)
    with_prior, _ = saved(client, adapters, prompt, playground, node, "prior")
    prompt, playground = graph()
    latents, positive = playground.drawings("fip")
    without, _ = saved(client, adapters, prompt, playground, playground.train(positive, latents=latents), "no_prior")
    assert any(not torch.equal(tensor, without[name]) for name, tensor in with_prior.items())


def test_the_text_encoder_trains_along_and_its_layers_load(client, adapters, base_unchanged):
    prompt, playground = graph()
    drawings = prompt.add("SodaPlaygroundDrawings", concept="fip")
    latents, positive = playground.dataset((drawings, 0), (drawings, 1))
    node = playground.train(
        positive, latents=latents, texts=(drawings, 1), clip=playground.clip, vae=playground.vae,
        sample_prompt="a sks monster", options=playground.options(text_encoder_rate=0.5, caption_dropout=0.3),
    )  # fmt: skip
    tensors, texts = saved(client, adapters, prompt, playground, node, "words")
    layers = {name.rsplit(".", 1)[0] for name in tensors}
    inside = {name for name in layers if name.startswith("diffusion_model.")}
    assert "step 3/3" in texts[-1] and "failed" not in texts[-1]
    for part in (inside, layers - inside):
        assert part and all(tensors[f"{name}.soda_lq"].any() for name in part)
    for wired in (True, False):
        prompt, playground = graph()
        name = max(adapters.glob("words*")).name
        clip = {"clip": playground.clip} if wired else {}
        loader = prompt.add("SodaLoader", model=playground.model, adapter_name=name, strength=1.0, **clip)
        if wired:
            playground.clip = (loader, 1)
        playground.sample((loader, 0))
        said = client.run(prompt).texts[loader][-1]
        assert said.startswith(f"{len(layers if wired else inside)} layers changed")
        assert ("Wire clip" in said) != wired


def test_texts_alone_train_no_text_encoder_and_that_is_said(client, adapters):
    prompt, playground = graph()
    latents, positive = playground.drawings()
    node = playground.train(positive, latents=latents, texts="a sks monster", steps=1)
    tensors, texts = saved(client, adapters, prompt, playground, node, "silent")
    assert all(name.startswith("diffusion_model.") for name in tensors) and "The texts are not used" in texts[-1]


def test_going_on_from_an_adapter_and_training_beside_it(client, adapters, subject, base_unchanged):
    found = {}
    for how in ("start", "beside"):
        prompt, playground = graph()
        loader = playground.load(subject)
        latents, positive = playground.drawings("comic")
        if how == "beside":
            playground.model = (loader, 0)
        more = {"start_from": (loader, 2)} if how == "start" else {}
        node = playground.train(positive, latents=latents, learning_rate=1e-6, seed=3, **more)
        found[how], _ = saved(client, adapters, prompt, playground, node, how)
    before = safetensors.torch.load_file(adapters / subject)
    for name, tensor in before.items():
        if "soda_log" in name and tensor.numel():
            assert torch.allclose(found["start"][name], tensor, atol=1e-4)
            assert found["beside"][name].abs().max() < 1e-4


WRONG = [
    ({"options": {"caption_dropout": 0.5}}, "wire a clip"),
    ({"options": {"layers": "*nowhere*"}}, "matches none"),
    ({"options": {"text_encoder_rate": 0.5}}, "wire clip and texts"),
    ({"options": {"augment": "on", "augment.views": 2, "augment.flip": True, "augment.crop": 0.1,
                  "augment.colour": 0.0}}, "wire images and vae"),
    ({"prior": True}, "prior_positive"),
    ({"start_from": True, "factors": 2}, "set decomposition and factors"),
    ({"beside": True, "decomposition": "svd"}, "set decomposition and factors"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_cannot_be_is_refused_with_the_remedy(client, subject, base_unchanged, wrong, says):
    wrong = dict(wrong)
    prompt, playground = graph()
    latents, positive = playground.drawings()
    if "options" in wrong:
        wrong["options"] = playground.options(**wrong["options"])
    if wrong.pop("prior", False):
        wrong["prior_latents"] = latents
    if wrong.pop("start_from", False):
        wrong["start_from"] = (playground.load(subject), 2)
    if wrong.pop("beside", False):
        playground.model = (playground.load(subject), 0)
    playground.save((playground.train(positive, latents=latents, **wrong), 0), "never")
    with pytest.raises(PromptFailed) as caught:
        client.run(prompt)
    assert says in str(caught.value) and caught.value.result.error["type"] == "SodaTrain"


@pytest.mark.parametrize("value", [{"ema": 1.0}, {"warm_up": 2.0}, {"schedule": "stairs"}, {"accumulation": 0}])
def test_options_out_of_range_are_refused_by_name(client, value):
    prompt, playground = graph()
    latents, positive = playground.drawings()
    options = playground.options(**value)
    playground.save((playground.train(positive, latents=latents, options=options), 0), "never")
    with pytest.raises(Refused) as caught:
        client.run(prompt)
    assert caught.value.status == 400 and next(iter(value)) in caught.value.body


@pytest.mark.parametrize("memory", ["frugal", "low VRAM"])
def test_a_memory_plan_learns_the_same(client, adapters, base_unchanged, memory):
    found = []
    for plan in ("fast", memory):
        prompt, playground = graph()
        latents, positive = playground.drawings()
        options = playground.options(memory=plan)
        node = playground.train(positive, latents=latents, seed=78, reuse=False, options=options)
        found.append(saved(client, adapters, prompt, playground, node, f"plan_{plan.replace(' ', '_')}"))
    (fast, _), (other, texts) = found
    assert all(torch.allclose(tensor, other[name], atol=1e-4) for name, tensor in fast.items())
    assert f"Memory plan: {memory}" in texts[-1]
