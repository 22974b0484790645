"""The levels of a genome that a database is built around, by the file that a run leaves."""

import json

import pytest

from evopress.errors import EvoPressError
from evopress.levels.around import keys_of_genome
from evopress.units import Level, Space, Unit

LEVELS = (Level("4 bits", 40, "4", 40), Level("2 bits", 20, "2", 20))
SPACE = Space(method="quant", units=tuple(Unit(name, 0, "q_proj", 10, LEVELS) for name in ("a", "b")))


def genome_of(tmp_path, **labels):
    units = [{"name": name, "level": 0, "label": label, "cost": 0} for name, label in labels.items()]
    (tmp_path / "genome.json").write_text(json.dumps({"schema": 1, "units": units}))
    return str(tmp_path)


def test_levels_are_known_by_their_labels_in_whatever_order(tmp_path):
    folder = genome_of(tmp_path, b="2 bits", a="4 bits")
    assert keys_of_genome(folder, SPACE) == keys_of_genome(f"{folder}/genome.json", SPACE) == {"a": "4", "b": "2"}


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"a": "4 bits"}, "of 1 units, 1 of which are among the 2 here"),
        ({"a": "4 bits", "b": "4 bits", "c": "4 bits"}, "of 3 units, 2 of which are among the 2 here"),
        ({"a": "4 bits", "b": "3 bits"}, "has b at 3 bits, expected one of 4 bits, 2 bits"),
    ],
)
def test_genomes_of_others_are_one_sentence(labels, sentence, tmp_path):
    with pytest.raises(EvoPressError, match=sentence):
        keys_of_genome(genome_of(tmp_path, **labels), SPACE)


def test_where_there_is_no_genome_it_is_said(tmp_path):
    (tmp_path / "genome.txt").write_text("a: 4")
    for given in (tmp_path, tmp_path / "nope", tmp_path / "genome.txt"):
        with pytest.raises(EvoPressError, match=r"is no genome\.json, nor a folder that has one"):
            keys_of_genome(str(given), SPACE)
