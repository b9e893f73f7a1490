"""The list of scripts/mutation_check.py against the kernels' sources; running it takes too long for a test."""

from collections import Counter

import pytest

from mutation_check import MACHINES, ROOT, Mutation, load_mutations

MUTATIONS = load_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_fits_its_file(mutation: Mutation) -> None:
    source = (ROOT / mutation.path).read_text()
    assert mutation.apply(source) != source
    assert mutation.machine in MACHINES


def test_every_kernel_file_has_ten_mutations() -> None:
    counts = Counter(mutation.path for mutation in MUTATIONS)
    kernels = {
        str(path.relative_to(ROOT))
        for pattern in ("int8_*", "float32_*")
        for path in (ROOT / "src" / "kernels").glob(pattern)
        if "evex" not in path.name  # includes int8_avxvnni.cc
    }
    assert set(counts) == kernels
    assert min(counts.values()) >= 10, counts
    assert len(set(MUTATIONS)) == len(MUTATIONS)


def test_text_that_is_missing_or_twice_is_an_error() -> None:
    mutation = Mutation("kernel.cc", "x86", "a + b", "a - b")
    assert mutation.apply("c = a + b;") == "c = a - b;"
    for source in ("", "a + b + a + b"):
        with pytest.raises(ValueError, match=r"kernel\.cc: a \+ b .* expected once"):
            mutation.apply(source)
