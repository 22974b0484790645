import json
import math

from evopress.search.record import GenerationRecord, StageRecord


def test_a_record_reads_back_from_json_with_null_for_what_is_not_finite():
    record = GenerationRecord(
        generation=3,
        genome=(1, 2),
        fitness=0.5,
        accepted=True,
        parent_fitness=None,
        stages=(StageRecord(8, 3, (0.5, math.nan, math.inf), (0,)),),
        switches=((0, 2, 1), (1, 1, 2)),
        tokens=24,
        evaluations=3,
        cost=7,
    )
    read = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert read == {
        "generation": 3,
        "genome": [1, 2],
        "fitness": 0.5,
        "accepted": True,
        "parent_fitness": None,
        "stages": [{"tokens": 8, "num_candidates": 3, "fitnesses": [0.5, None, None], "survivors": [0]}],
        "switches": [[0, 2, 1], [1, 1, 2]],
        "tokens": 24,
        "evaluations": 3,
        "cost": 7,
    }
