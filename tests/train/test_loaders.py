"""What is built in other processes is what is built here."""

import numpy as np
import pytest

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import DataError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.train.loaders import Loaders


@pytest.mark.slow
def test_processes_build_the_same_items_in_order(backbone, pictures):
    builder = Encoder.load(backbone).builder
    records = [Candidate(did=f"9:{name}", img_path=path) for name, path in pictures.items()]
    records += [Query(qid=f"9:{n}", txt="a kite " * n, instruction="Find.") for n in range(1, 6)]
    loaders = Loaders(builder, 2)
    try:
        built = loaders.build([(record,) for record in records])
        for item, record in zip(built, records, strict=True):
            own = builder.build(record)
            assert np.array_equal(item.ids, own.ids) and np.array_equal(item.pooled, own.pooled)
            patches = [(a.patches, b.patches) for a, b in zip(item.visuals, own.visuals, strict=True)]
            assert all(np.array_equal(mine, theirs) for mine, theirs in patches)
        with pytest.raises(DataError, match="absent"):  # a fault there is told in the same words
            loaders.build([(Candidate(did="9:1", img_path="absent.png"),)])
    finally:
        loaders.close()
