"""The playground: its world, its reader, and its model on ComfyUI's own classes."""

from __future__ import annotations

import pytest
import torch
from soda_pack.nodes.playground import CHECKPOINT, SodaPlaygroundDrawings
from soda_pack.playground import concepts, drawing, grammar, reader
from soda_pack.playground.forward import Walk, encode_text
from soda_pack.soda.hosts.comfy import playground


@pytest.fixture(scope="module")
def model():
    return playground.load_model(str(CHECKPOINT))


@pytest.fixture(scope="module")
def clip():
    return playground.load_clip(str(CHECKPOINT))


def test_scenes_and_captions_follow_from_the_seed():
    one, two, other = (grammar.sample_scenes(20, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(drawing.draw(one), drawing.draw(two))
    assert [grammar.caption(one, i) for i in range(20)] == [grammar.caption(two, i) for i in range(20)]
    assert [grammar.caption(one, i) for i in range(20)] != [grammar.caption(other, i) for i in range(20)]


def test_the_base_world_holds_no_concept():
    scenes = grammar.sample_scenes(2000, torch.Generator().manual_seed(0))
    assert (scenes["style"] < grammar.BASE_STYLES).all()
    assert (scenes["lower"] < 0).all()  # two-coloured bodies are the subjects' alone


@pytest.mark.parametrize("concept", [*concepts.SUBJECTS, *concepts.HELD_OUT_STYLES])
def test_drawings_node_gives_pictures_that_the_reader_knows(concept):
    images, texts = SodaPlaygroundDrawings.execute(concept).args
    kind = "subject" if concept in concepts.SUBJECTS else "style"
    assert len(images) == len(texts) == concepts.DRAWINGS[kind]
    assert all(image.shape == (1, 64, 64, 3) and image.min() >= 0 and image.max() <= 1 for image in images)
    word = {"subject": concepts.SUBJECT_WORD, "style": concepts.STYLE_WORD}[kind]
    assert all(word in text and concept not in text for text in texts)
    seen = reader.read(reader.load_reader(), torch.cat(images).movedim(-1, 1))
    if kind == "subject":
        hits = seen["subject"] == 1 + list(concepts.SUBJECTS).index(concept)
    else:
        hits = seen["style"] == grammar.STYLES.index(concept)
    assert hits.float().mean() >= 0.9


def test_reader_tells_a_subject_from_near_misses():
    scenes, label = reader.training_batch(360, torch.Generator().manual_seed(5))
    seen = reader.read(reader.load_reader(), drawing.draw(scenes))
    assert (seen["subject"] == label).float().mean() >= 0.97
    assert (seen["background"] == scenes["background"]).float().mean() >= 0.95


@torch.no_grad()
def test_training_forward_is_comfyuis(model, clip):
    unet = model.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 3, 64, 64, generator=generator), torch.randn(2, 77, 192, generator=generator)
    t = torch.tensor([0.2, 0.9])
    theirs = unet(x, t * 1000, context, transformer_options={})
    assert (Walk(unet)(x, t, context) - theirs).abs().max() < 1e-4 * theirs.abs().max()
    text = clip.cond_stage_model.clip_l.transformer.text_model
    embeddings = torch.randn(2, 77, 192, generator=generator)
    theirs = text(embeds=embeddings.clone(), num_tokens=[1, 1])[0]
    assert (encode_text(text, embeddings, 6) - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_fresh_copy_can_be_loaded(model, clip):
    copy = model.clone(force_deepcopy=True)
    ours, theirs = model.model_state_dict(), copy.model_state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    key = next(iter(ours))
    assert ours[key].data_ptr() != theirs[key].data_ptr()
    assert clip.patcher.clone(force_deepcopy=True).model is not clip.patcher.model


def test_unknown_words_embed_as_nothing(clip):
    table = clip.cond_stage_model.clip_l.transformer.text_model.embeddings.token_embedding.weight
    known, unknown = (clip.tokenize(word)["l"][0][1][0] for word in ("star", "zebra"))
    assert table[known].abs().sum() > 0
    assert table[unknown].abs().sum() == 0
