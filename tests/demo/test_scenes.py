import random
from collections import Counter

import numpy as np
import pytest
from caption_reader import answers, read_caption, read_kinds

from umarvel_ray.demo import wording
from umarvel_ray.demo.scenes import (
    COLORS,
    GROUNDS,
    SHAPES,
    SIDES,
    SIZES,
    Scene,
    Thing,
    clues,
    draw,
    near_misses,
    random_scene,
    things_on,
)
from umarvel_ray.errors import DataError


def some_scenes(count: int) -> list[Scene]:
    rng = random.Random(5)
    return [random_scene(rng, num_things=2 + n % 3) for n in range(count)]


def test_a_word_means_one_thing():
    words = [word for table in (SHAPES, COLORS, SIZES, GROUNDS) for row in table.values() for word in row]
    assert [word for word, count in Counter(words).items() if count > 1] == []


def test_a_caption_tells_its_scene_and_no_other():
    """Read back by rules of the test's own, over every pattern and number of things."""
    for seed, scene in enumerate(some_scenes(300)):
        assert read_caption(wording.describe(scene, seed=seed)) == scene


def test_another_seed_gives_other_words():
    scene = some_scenes(3)[2]
    assert len({wording.describe(scene, seed=seed) for seed in range(50)}) > 45


def test_a_scene_refuses_two_things_of_one_name_or_place():
    red_ring = Thing(0, "small", "red", "ring")
    with pytest.raises(DataError, match="2 things: 2 places and 1 pairs"):
        Scene((red_ring, Thing(1, "large", "red", "ring")))
    with pytest.raises(DataError, match="2 things: 1 places"):
        Scene((red_ring, Thing(0, "small", "blue", "ring")))


def test_the_seed_decides_the_drawing():
    scene = some_scenes(3)[2]
    pictures = [np.asarray(draw(scene, seed=seed, pixels=56)) for seed in (1, 1, 2)]
    assert pictures[0].shape == (56, 56, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawing_shows_each_thing_in_its_place_and_size(shape):
    """A thing's quarter holds pixels unlike the ground, more for a large one; an empty quarter none."""
    scene = Scene((Thing(0, "small", "red", shape), Thing(3, "large", "blue", shape)))
    for seed in range(5):
        picture = np.asarray(draw(scene, seed=seed, pixels=56)).astype(int)
        differs = np.abs(picture - picture[28, 28]).sum(-1) > 60
        small, empty, also_empty, large = (
            int(differs[row : row + 28, column : column + 28].sum()) for row in (0, 28) for column in (0, 28)
        )
        assert (empty, also_empty) == (0, 0)
        assert 20 < small < large
        red, _, blue = picture[28:, 28:][differs[28:, 28:]].mean(0)
        assert blue > red


def test_near_misses_are_other_scenes_one_step_away():
    rng = random.Random(1)
    trades = 0
    for scene in some_scenes(30):
        found = near_misses(scene, rng, count=6)
        assert len({scene, *found}) == 7
        for other in found:
            gone = {*scene.things} - {*other.things}
            assert len(gone) in (1, 2)
            assert other.ground == scene.ground
            bag, other_bag = (
                Counter(part for thing in s.things for part in (thing.place, *thing.kind))
                for s in (scene, other)
            )
            trades += bag == other_bag
            if len(gone) == 2:
                assert bag == other_bag  # two things traded an attribute: only what goes with what differs
    assert trades > 30


def test_an_edit_changes_what_it_names():
    rng = random.Random(2)
    for scene in some_scenes(100):
        made = wording.edit(scene, rng)
        assert made.scene != scene
        assert made.scene.ground == scene.ground
        touched = {*scene.things} ^ {*made.scene.things}
        assert len(touched) <= 4
        named = [word for words in SHAPES.values() for word in words if f" {word}" in made.text]
        assert named, made.text
        assert wording.edit_twice(scene, rng).scene != scene


def test_a_side_is_told_in_full_and_nothing_else():
    for seed, scene in enumerate(some_scenes(60)):
        for side in SIDES:
            things = things_on(scene, side)
            if not things:
                with pytest.raises(DataError, match="side is empty"):
                    wording.describe_side(scene, side, seed=seed)
                continue
            told = read_kinds(wording.describe_side(scene, side, seed=seed))
            assert sorted(told) == sorted(thing.kind for thing in things)
            assert wording.ask_beside(scene, side, seed=seed).endswith("?")
            line = "row" if side in ("top", "bottom") else "column"
            assert line in wording.ask_beside(scene, side, seed=seed)
            assert side in wording.ask_side(side, seed=seed)


def test_a_question_is_answered_by_the_scenes_with_its_clue():
    everything = some_scenes(60)
    everything += near_misses(everything[0], random.Random(3), count=12)
    for seed, clue in enumerate(sorted(clues(everything[0]))):
        for wording_seed in range(8):
            question = wording.ask_clue(clue, seed=100 * seed + wording_seed).lower()
            assert [answers(question, scene) for scene in everything] == [
                clue in clues(scene) for scene in everything
            ]


def test_a_headline_names_things_of_its_scene():
    for seed, scene in enumerate(some_scenes(30)):
        named = read_kinds(wording.headline(scene, seed=seed))
        assert len(named) == 2
        assert {*named} <= {thing.kind for thing in scene.things}
