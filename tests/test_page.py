"""How dense the product's code may be for a person who reads it once, by the counts of
benchmarks/readability.py. Tests and measurements are left out, tables of words may have long lines.
"""
import pytest
import readability

FILES = readability.source_files([])
FIGURES = readability.measure(FILES)
BARS = {
    "tokens_per_line": 8,
    "long_lines": 0,
    "conditional_expressions_per_1000": 20,
    "late_imports": 30,
}
LONGEST_FUNCTION = 100


def worst(figure):
    """The ten files with the largest count behind this figure, to know where to begin."""
    count_name = {"tokens_per_line": "tokens"}.get(figure, figure.removesuffix("_per_1000"))
    counts = [(readability.count(path)[count_name], path.name) for path in FILES]
    return sorted(counts, reverse=True)[:10]


@pytest.mark.parametrize("figure", BARS)
def test_the_bars_of_the_page(figure):
    assert FIGURES[figure] <= BARS[figure], worst(figure)


def test_a_function_is_read_in_one_sitting():
    functions = [function for path in FILES for function in readability.count(path)["functions"]]
    assert not [f"{name}: {lines} lines" for lines, name in functions if lines > LONGEST_FUNCTION]
