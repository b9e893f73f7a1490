"""The list of scripts/mutation_check.py against the kernels' sources; running it takes too long for a test."""

from collections import Counter

import pytest

from mutation_check import MACHINES, ROOT, Mutation, load_mutations

MUTATIONS = load_mutations()
# Nothing of a kernel in them.
ONLY_INCLUDES = {"int8_avxvnni_evex.cc", "int8_avxvnni_evex.h", "int8_avx512vbmi.cc", "int8_avx512vnni.cc"}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_fits_its_file(mutation: Mutation) -> None:
    source = (ROOT / mutation.path).read_text()
    assert mutation.apply(source) != source
    assert mutation.machine in MACHINES


def test_every_kernel_file_has_ten_mutations() -> None:
    counts = Counter(mutation.path for mutation in MUTATIONS)
    kernels = {
        str(path.relative_to(ROOT))
        for pattern in ("int8_*", "float32_*", "base3_*")
        for path in (ROOT / "src" / "bitcore" / "kernels").glob(pattern)
        if path.name not in ONLY_INCLUDES
    }
    assert set(counts) == kernels | {"src/bitcore/quantize/quantize_avx512-inl.h"}
    assert min(counts.values()) >= 10, counts
    assert len(set(MUTATIONS)) == len(MUTATIONS)


def test_text_that_is_missing_or_twice_is_an_error() -> None:
    mutation = Mutation("kernel.cc", "x86", "a + b", "a - b")
    assert mutation.apply("c = a + b;") == "c = a - b;"
    for source in ("", "a + b + a + b"):
        with pytest.raises(ValueError, match=r"kernel\.cc: a \+ b .* expected once"):
            mutation.apply(source)
