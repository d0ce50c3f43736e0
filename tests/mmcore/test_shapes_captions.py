"""The captions of Shapes: those of the dataset never change, and an exhaustive caption names everything."""

import hashlib
import itertools
import re

from mmcore.data.shapes import SPLITS, clear_relation, make_scene, render_scene
from mmcore.data.shapes_captions import exhaustive_caption, scene_captions
from mmcore.data.shapes_oracle import judge_text
from mmcore.data.shapes_parser import parse_caption


def test_the_captions_of_datasets_stay_as_they_are() -> None:
    digest = hashlib.sha256()
    for split, index in itertools.product(SPLITS, range(200)):
        for caption in scene_captions(0, split, index, make_scene(0, split, index)):
            digest.update(caption.encode())
    assert digest.hexdigest() == "d7873fd6f84f9a50c6dc911c25b1812478b0c66bcbcf12039c509ae5e2eefece"


def test_an_exhaustive_caption_names_everything_and_is_true() -> None:
    known: set[str] = set()
    used: set[str] = set()
    openings: set[str] = set()
    for index in range(1000):
        split = ("train", "test")[index % 2]
        scene = make_scene(0, split, index)
        caption = exhaustive_caption(0, split, index, scene)
        parsed = parse_caption(caption)
        by_look = {(item.colour, item.shape): item for item in scene}
        found = [by_look[named.colour, named.shape] for named in parsed.objects]  # type: ignore[index]
        assert len(found) == len({id(item) for item in found}) == len(scene), caption
        for named, item in zip(parsed.objects, found, strict=True):
            assert (named.size, named.positions) == (item.size, (item.position,) if item.position else ()), caption
        told = sorted(sorted((each.first, each.second)) for each in parsed.relations)
        pairs = itertools.combinations(range(len(found)), 2)
        assert told == [[a, b] for a, b in pairs if clear_relation(found[a], found[b])], caption
        for each in parsed.relations:
            assert clear_relation(found[each.first], found[each.second]) == each.relation, caption
        score = judge_text(render_scene(scene, 64), caption).score
        assert score.num_correct == score.num_named, caption
        used |= set(re.findall(r"\w+|[,:]", caption))
        openings.add(" ".join(caption.split()[:2]))
        for usual in scene_captions(0, split, index, scene):
            known |= set(re.findall(r"\w+|[,:]", usual))
    assert used <= known
    assert {"there is", "a picture", "one shape:", "two shapes,", "three shapes:", "on the"} <= openings
